"""Fréchet distances in closed form, a classifier that knows the shipped pictures, and the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smooth_rt import cli
from smooth_rt.errors import InputError, ModelError
from smooth_rt.evaluation import examples
from smooth_rt.evaluation.quality import summarise_quality
from smooth_rt.metrics.attributes import load_attributes
from smooth_rt.metrics.frechet import Gaussian, fit, frechet, frechet_intervals, load_reference, vae_features


def diagonal(mean: list[float], deviations: list[float]) -> Gaussian:
    return Gaussian(np.array(mean), np.diag(np.square(deviations)), 100)


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    one, other = diagonal([0.0, 1.0, 2.0], [1.0, 2.0, 0.0]), diagonal([3.0, 1.0, 0.0], [2.0, 0.5, 1.0])
    assert frechet(one, other) == pytest.approx(9 + 4 + 1 + 1.5**2 + 1)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    both = [Gaussian(turned @ g.mean, turned @ g.covariance @ turned.T, 9) for g in (one, other)]
    assert frechet(*both) == pytest.approx(frechet(one, other))
    with pytest.raises(InputError, match="2 dimensions, the images' have 3"):
        frechet(one, diagonal([0.0, 0.0], [1.0, 1.0]))


def test_the_distance_follows_what_is_drawn() -> None:
    rng = np.random.default_rng(1)
    real = fit(rng.normal(size=(4000, 6)))
    near, far = rng.normal(size=(400, 6)), rng.normal(size=(400, 6)) * 1.5 + 0.5
    assert frechet(fit(near), real) < 0.1 < frechet(fit(far), real)
    assert frechet_intervals(near, real)[0] == frechet_intervals(near, real)[1]
    (low, high), (less, more) = frechet_intervals(far, real, near)
    assert low < high
    assert 0 < less < more
    assert low > less  # the nearer one is a little apart too
    _, (less, more) = frechet_intervals(near, real, near)
    assert less == more == 0
    with pytest.raises(InputError, match="1; give at least 2"):
        fit(near[:1])


def test_features_are_means_of_cells() -> None:
    latents = torch.arange(64.0).view(1, 1, 8, 8)
    assert vae_features(latents).shape == (1, 16)
    assert vae_features(latents)[0, 0] == (0 + 1 + 8 + 9) / 4


def test_the_classifier_knows_the_shipped_pictures() -> None:
    attributes = load_attributes()
    assert attributes.accuracy["object"] > 0.95
    assert attributes.accuracy["colour"] > 0.99
    shown = examples()
    images = np.stack([np.asarray(example.image(), np.float32) / 255 for example in shown])
    captions = [example.caption for example in shown]
    judged = attributes.judge(images, captions)
    assert all(judged.objects)
    assert all(judged.colours)
    wrong = attributes.judge(images, ["tomato on red background"] * len(shown))
    assert not any(wrong.objects)
    assert attributes.judge(images[:1], ["something else"]).objects == (None,)
    with pytest.raises(InputError, match="captions: 1 for 8"):
        attributes.judge(images, ["x"])


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"a\.safetensors: not a classifier"):
        load_attributes(tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors: not a reference"):
        load_reference(tmp_path / "a.safetensors")
    assert load_reference().count >= 8192


def test_a_summary_by_hand() -> None:
    def row(x: float, right: bool | None) -> dict[str, object]:
        return {"features": [[x, 0.0], [0.0, x]], "objects": [right, right], "colours": [None, None], "apart": x}

    reference = diagonal([0.0, 0.0], [1.0, 1.0])
    base = [row(1.0, True), row(2.0, True), row(3.0, False)]
    smooth = [row(1.0, True), row(2.0, False), row(3.0, False)]
    found = summarise_quality(smooth, reference, base)
    assert found["images"] == 6
    assert found["object_accuracy"] == pytest.approx(1 / 3)
    assert found["colour_accuracy"] is None
    assert found["diversity"] == 2.0
    low, high = found["object_accuracy_less_base_95_percent"]
    assert -1 <= low < high <= 0
    assert found["vae_frechet_less_base_95_percent"] == [0.0, 0.0]


def test_the_command_measures_and_goes_on(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        Image.effect_noise((16, 16), 60 + index).convert("RGB").save(tmp_path / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("dog on blue background\na cat\n")
    command = ["evaluate", "quality", "--model", str(tiny_model), "--engine", "eager", "--num-inference-steps", "2"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--images", "8", "--output", str(tmp_path / "o"), "--json"]
    assert cli.main(command) == 2
    assert "--reference: name a folder of real images" in capsys.readouterr().err
    assert cli.main([*command, "--reference", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: not a folder" in capsys.readouterr().err
    command += ["--reference", str(tmp_path), "--batch", "3"]
    assert cli.main([*command, "--clip", "nobody/nothing"]) == 2
    assert "nobody/nothing is not at hand" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert cli.main(command) == 0
    first = json.loads(capsys.readouterr().out)["results"][0]
    assert first["vae_frechet"] > 0
    assert first["object_accuracy"] is None
    table = (tmp_path / "o" / "quality.md").read_text()
    assert "not measured" in table
    assert "less base" not in table  # there is no LoRA to compare
    (rows,) = (tmp_path / "o" / "rows").glob("*.jsonl")
    kept = sorted(rows.with_suffix("").iterdir())
    assert [path.name for path in kept[:3]] == ["00000-0.png", "00000-1.png", "00001-0.png"]
    assert len(kept) == 8
    assert "Not measured: FID" in table
    assert "Not measured: CLIP score: openai/clip-vit-large-patch14 is not at hand; hf download" in table
    held = rows.read_text()
    assert len(held.splitlines()) == 1 + 4
    assert cli.main(command) == 0
    again = json.loads(capsys.readouterr().out)["results"][0]
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert rows.read_text() == held
    kept[5].unlink()
    assert cli.main(command) == 2
    assert "00002-1.png: is gone; remove the file of rows" in capsys.readouterr().err


def test_istd_by_several_processes_is_the_same(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    command = ["evaluate", "istd", "--model", str(tiny_model), "--engine", "eager", "--num-inference-steps", "2"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--frames", "3", "--pairs", "2", "--batch", "2", "--json"]
    found = []
    for processes in ("1", "2"):
        output = tmp_path / processes
        assert cli.main([*command, "--processes", processes, "--output", str(output)]) == 0
        found.append(json.loads(capsys.readouterr().out)["results"][0])
        assert (output / "istd.svg").read_text().startswith("<svg")
        assert "| base |" in (output / "istd.md").read_text()
    assert len(found[0]["per_prompt"]) == 6
    assert found[0]["per_prompt"] == found[1]["per_prompt"]
    assert found[0]["diversity"] == found[1]["diversity"]
