"""What `evaluate` measures, on a tiny model with eager engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smooth_rt import cli
from smooth_rt.commands.measuring import measured
from smooth_rt.commands.options import RunOptions
from smooth_rt.errors import InputError
from smooth_rt.evaluation import (
    Example,
    InterpolationTask,
    captioned,
    examples,
    measure_inversion,
    measure_istd,
    read_prompts,
)
from smooth_rt.lora import Lora, LoraLayer, write_lora
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion import METHODS


@pytest.fixture(scope="module")
def eager(tiny_model: Path) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        yield pipe


def test_shipped_examples_and_prompts() -> None:
    found = examples()
    assert len(found) >= 2
    assert all(example.image().mode == "RGB" and example.caption for example in found)
    prompts = read_prompts()
    assert len(prompts) == len(set(prompts)) == 100


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog\n\n  a cat \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a dog", "a cat"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, said in (
        ("empty.txt", "no prompt"),
        ("binary.txt", "is UTF-16, not UTF-8"),
        ("none.txt", "none.txt: cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            read_prompts(tmp_path / name)


def test_istd_by_hand_and_in_any_batch(eager: SmoothPipeline) -> None:
    prompts = ["dog", "red apple", "dog on blue background"]
    settings = {"frames": 3, "num_inference_steps": 2, "seed": 5}
    told: list[tuple[int, int]] = []
    one = measure_istd(eager, prompts, prompts_per_batch=1, **settings)  # type: ignore[arg-type]
    many = measure_istd(eager, prompts, prompts_per_batch=2, progress=lambda *done: told.append(done), **settings)  # type: ignore[arg-type]
    assert many.istd.per_prompt == pytest.approx(one.istd.per_prompt, rel=1e-3)
    assert many.diversity == pytest.approx(one.diversity, rel=1e-3)
    assert told == [(2, 3), (3, 3)]
    # The ends of the second prompt are what its seeds draw alone.
    ends = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    images = eager("red apple", num_images_per_prompt=2, generator=ends, num_inference_steps=2, output_type="np").images
    alone = measure_istd(eager, prompts[1:2], frames=2, num_inference_steps=2, seed=7)
    assert alone.diversity == pytest.approx(
        255 * np.linalg.norm(np.asarray(images[0]) - np.asarray(images[1])), rel=1e-3
    )
    assert alone.istd.mean_step == pytest.approx(alone.diversity)


def test_istd_refuses_what_it_cannot_measure(eager: SmoothPipeline) -> None:
    with pytest.raises(InputError, match="prompts=0"):
        measure_istd(eager, [])
    with pytest.raises(InputError, match="frames=1"):
        measure_istd(eager, ["dog"], frames=1)
    with pytest.raises(InputError, match="images=0"):
        measure_inversion(eager, [])


def test_inversion_has_the_vae_as_its_bound(eager: SmoothPipeline, tmp_path: Path) -> None:
    pictures = []
    for value in (40, 160, 220):
        path = tmp_path / f"{value}.png"
        Image.new("RGB", (16, 16), (value, 90, 255 - value)).save(path)
        path.with_suffix(".txt").write_text("a dog")
        pictures.append(Example(path, "a dog"))
    assert sorted(captioned(tmp_path), key=str) == sorted(pictures, key=str)
    rebuilt, bound = measure_inversion(eager, pictures, num_inference_steps=2, images_per_batch=2)
    assert len(rebuilt) == len(bound) == 3
    latents = eager.encode_image([example.path for example in pictures])
    decoded = np.asarray(eager.decode(latents, "np"))
    for i, example in enumerate(pictures):
        original = np.asarray(example.image()) / 255
        assert bound[i].mse == pytest.approx(np.mean((decoded[i] - original) ** 2), rel=1e-3)
    assert all(one.mse != other.mse for one, other in zip(rebuilt, bound, strict=True))


def test_commands_write_json(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = LoraLayer(torch.ones(2, 32), torch.ones(32, 2))
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    lora = write_lora(Lora({path: layer}, "", ""), tmp_path / "lora.safetensors")
    common = ["--model", str(tiny_model), "--engine", "eager", "--num-inference-steps", "2", "--json"]
    istd = ["evaluate", "istd", *common, "--lora", str(lora), "--limit", "2", "--frames", "3"]
    assert cli.main([*istd, "--output", str(tmp_path / "o")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in result["results"]] == ["base", "smooth"]
    base, smooth = result["results"]
    assert base["istd"] != smooth["istd"]
    assert result["smooth_over_base"]["istd"] == pytest.approx(smooth["istd"] / base["istd"])
    assert json.loads((tmp_path / "o" / "istd.json").read_text())["results"] == result["results"]

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16), (9, 90, 200)).save(data / "a.png")
    (data / "a.txt").write_text("a dog")
    assert cli.main(["evaluate", "inversion", *common, "--data", str(data), "--output", str(tmp_path / "o")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in result["results"]] == ["VAE bound", "base"]
    assert result["results"][0]["psnr"] != result["results"][1]["psnr"]


def test_paths_by_every_way(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data", tmp_path / "o"
    data.mkdir()
    for index in range(5):  # the fifth has no other end
        Image.new("RGB", (16, 16), (9, 60 * index, 200)).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("a dog")
    common = ["evaluate", "interpolation", "--model", str(tiny_model), "--engine", "eager", "--frames", "4"]
    common += ["--num-inference-steps", "2", "--json", "--data", str(data), "--output", str(output)]
    ways = ["plain", "adain", "pixels", "adain+pixels", "attention+adain"]
    assert cli.main([*common, "--ways", ",".join(ways)]) == 0
    result = json.loads(capsys.readouterr().out)
    plain, *rest = result["results"]
    assert [row["way"] for row in result["results"]] == ways
    assert (result["paths"], len(plain["per_prompt"])) == (2, 2)
    assert plain["istd_over_mean_step"] == pytest.approx(plain["istd"] / plain["mean_step"])
    assert plain["longest_step"] >= 1
    assert plain["detour"] >= 1 - 1e-6
    for row in rest:
        assert row["istd"] != plain["istd"]
        assert row["psnr"] == pytest.approx(plain["psnr"], abs=1e-3)  # the ends stay
        assert row["certainty"] is None  # the classifier knows the default model's data alone
    assert "adain+pixels" in (output / "interpolation.md").read_text()
    for options, line in (
        (["--ways", "magic"], "way='magic': of plain, adain"),
        (["--ways", ","], "--ways=',': names none"),
        (["--frames", "2"], "--frames=2: give at least 3"),
        (["--ways", "attention", "--engine", "auto"], "--ways attention: built engines do not expose their attention"),
    ):
        assert cli.main([*common, *options]) == 2
        assert line in capsys.readouterr().err


def test_kept_rows_of_a_path_are_those_of_its_passes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other passes of rescheduling are measured anew."""
    options = RunOptions(model=str(tiny_model), lora="none", engine="eager", output=tmp_path)
    asked: list[int] = []
    own = SmoothPipeline.interpolate

    def interpolate(*given: Any, **named: Any) -> Any:
        asked.append(named["reschedule_passes"])
        return own(*given, **named)

    monkeypatch.setattr(SmoothPipeline, "interpolate", interpolate)
    for passes in (1, 2, 1):
        task = InterpolationTask(
            tuple(examples()[:2]), None, "pixels", frames=6, num_inference_steps=2, height=16, width=16, passes=passes
        )
        assert len(list(measured(options, "interpolation", task, 1))) == 1
    assert asked == [1, 2]
    assert len(list((tmp_path / "rows").iterdir())) == 2
    with pytest.raises(InputError, match="reschedule_passes=0: "):
        InterpolationTask(tuple(examples()[:2]), None, passes=0)


def test_inversion_by_every_method(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16), (9, 90, 200)).save(data / "a.png")
    (data / "a.txt").write_text("a dog")
    common = ["evaluate", "inversion", "--model", str(tiny_model), "--engine", "eager", "--num-inference-steps", "2"]
    common += ["--json", "--data", str(data), "--output", str(tmp_path / "o")]
    for said, methods in (("all", METHODS), ("negative-prompt, ddim", ("negative-prompt", "ddim"))):
        assert cli.main([*common, "--method", said]) == 0
        assert [row["method"] for row in json.loads(capsys.readouterr().out)["results"]] == ["", *methods]
    for said, line in (("magic", "--method='magic' is unknown"), (",", "--method=',': names none")):
        assert cli.main([*common, "--method", said]) == 2
        assert line in capsys.readouterr().err


def test_a_lora_that_is_none_is_said_before_the_base_model_is_measured(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"not a LoRA")
    istd = ["evaluate", "istd", "--model", str(tiny_model), "--engine", "eager", "--output", str(tmp_path / "o")]
    assert cli.main([*istd, "--lora", str(tmp_path / "lora.safetensors")]) == 2
    assert "lora.safetensors: truncated or no safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
