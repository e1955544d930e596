"""The demo, whole, on a tiny model: engines built and reused, the table, the page and its files."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from smooth_rt import cli, demo
from smooth_rt.build import Built
from smooth_rt.demo_report import (
    FEW_STEPS,
    MORPHS,
    EditScene,
    Outcome,
    Scene,
    Settings,
    command,
    describe,
    media,
    table,
)  # fmt: skip
from smooth_rt.errors import EngineError, InputError
from smooth_rt.lora import Lora, LoraLayer, write_lora

TINY = Settings(frames=3, num_inference_steps=2, null_text_steps=2, gradients=False)
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.Demo, list[str], list[str]]:
    """One run on both engines; its arguments and the stages that it told of."""
    folder = tmp_path_factory.mktemp("demo")
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    lora = write_lora(Lora({ATTENTION: layer}, "", ""), folder / "lora.safetensors")
    stages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(folder / "cache"))
        patch.setattr(demo, "SMALL", TINY)
        made = demo.run_demo(
            folder / "out", str(tiny_model), str(lora), small=True, progress=lambda stage, *_: stages.append(stage)
        )
    return made, [str(folder), str(tiny_model), str(lora)], stages


@pytest.mark.slow
def test_every_variant_on_every_engine(ran: tuple[demo.Demo, list[str], list[str]]) -> None:
    rows = ran[0].rows
    assert [(row["variant"], row["engine"]) for row in rows] == [
        ("base", "openvino"), ("base", "onnxruntime"), ("smooth", "openvino"), ("smooth", "onnxruntime"),
    ]  # fmt: skip
    assert all(row["seconds"][job] > 0 for row in rows for job in ("images", "seeds", "inversion", "edit"))
    # Embeddings are fitted on the first engine alone.
    assert [row["engine"] for row in rows if "null-text" in row["istd"]] == ["openvino", "openvino"]
    # The same seed on two engines: the images differ by rounding alone.
    others = [row for row in rows if row["engine"] == "onnxruntime"]
    assert all(row["same_as"] == "openvino" for row in others)
    assert all(row["same_as_psnr_db"] is None or row["same_as_psnr_db"] > 40 for row in others)
    assert rows[0]["inversion_psnr_db"] != rows[2]["inversion_psnr_db"]
    assert ran[0].reused == {"base": False, "smooth": False}


@pytest.mark.slow
def test_stages_are_told(ran: tuple[demo.Demo, list[str], list[str]]) -> None:
    told = list(dict.fromkeys(stage.split(":")[0] for stage in ran[2]))
    assert told[:2] == ["building base", "building smooth"]
    assert told[2:] == [f"{v} on {e}" for v in ("base", "smooth") for e in ("openvino", "onnxruntime")]


@pytest.mark.slow
def test_files_are_whole(ran: tuple[demo.Demo, list[str], list[str]]) -> None:
    made = ran[0]
    assert made.page.name == "index.html"
    assert sorted(made.files) == sorted(made.page.parent.iterdir())
    films = [path for path in made.files if path.suffix == ".mp4"]
    assert len(films) == 6
    assert all(iio.imread(path, plugin="pyav").shape == (3, 256, 256, 3) for path in films)
    for path in made.files:
        if path.suffix == ".webp":
            with Image.open(path) as film:
                assert (film.n_frames, film.size) == (4, (256, 256))
    assert json.loads((made.page.parent / "results.json").read_text())["rows"] == made.rows


@pytest.mark.slow
def test_page_shows_the_numbers_and_loads_nothing(ran: tuple[demo.Demo, list[str], list[str]]) -> None:
    text = ran[0].page.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    for row in ran[0].rows:
        assert f"PSNR {row['inversion_psnr_db']:.2f} dB" in text or row["same_as"] is not None
        assert f'<td class="number">{row["istd"]["seeds"]:.1f}</td>' in text
    assert "openvino, onnxruntime" in text
    assert FEW_STEPS in text  # two steps are fewer than the pictures take


@pytest.mark.slow
def test_second_run_reuses_and_says_so(
    ran: tuple[demo.Demo, list[str], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, lora = ran[1]
    monkeypatch.setenv("SMOOTH_RT_CACHE", f"{folder}/cache")
    monkeypatch.setattr(demo, "SMALL", TINY)
    arguments = ["demo", "--model", model, "--lora", lora, "--small", "--output", f"{folder}/again", "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reused"] == {"base": True, "smooth": True}
    assert len(result["results"]) == 4
    # The same seeds on the same engines give the same pictures.
    for row, before in zip(result["results"], ran[0].rows, strict=True):
        assert row["inversion_psnr_db"] == pytest.approx(before["inversion_psnr_db"], abs=0.01)


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, value))


def outcome(variant: str, engine: str, change: int) -> Outcome:
    morph = [picture(value + change) for value in (0, 100, 150)]
    images = {"images": morph, "seeds": morph, "inversion": [picture(9)], "edit": [picture(8)]}
    return Outcome(variant, engine, dict.fromkeys(images, 1.5), images)


def test_measure_counts_by_hand() -> None:
    scene = Scene((picture(0), picture(200)), ("a", "b"), "c", ())
    outcomes = [outcome("base", "openvino", 0), outcome("base", "onnxruntime", 0), outcome("base", "eager", 1)]
    rows = demo.measure(outcomes, scene)
    # Distances of 100 and 50 grey levels over 16 x 16 x 3 values; their standard deviation is half the difference.
    assert rows[0]["istd"]["seeds"] == pytest.approx(25 * np.sqrt(768), rel=1e-6)
    assert rows[0]["inversion_psnr_db"] == pytest.approx(20 * np.log10(255 / 9), rel=1e-6)
    assert [row["same_as"] for row in rows] == [None, "openvino", "openvino"]
    assert rows[1]["same_as_psnr_db"] is None
    assert rows[2]["same_as_psnr_db"] == pytest.approx(20 * np.log10(255), rel=1e-6)
    shown = table(rows)
    assert [row["vs first engine"] for row in shown] == ["", "identical", "48.1 dB"]


def test_pictures_are_those_of_the_first_engine() -> None:
    scene = Scene((picture(0), picture(200)), ("a", "b"), "c", ())
    files = media([outcome("smooth", "openvino", 0), outcome("smooth", "onnxruntime", 90)], scene)
    sheet = np.asarray(Image.open(io.BytesIO(files["morph-seeds-smooth.png"])))
    assert sheet[5, 5].tolist() == [0, 0, 0]


def test_scene_of_the_default_model() -> None:
    scene = demo._scene("default", None, "openvino", Settings())  # type: ignore[arg-type]
    assert {image.size for image in (*scene.images, *(edit.image for edit in scene.edits))} == {(64, 64)}
    assert all(edit.source_prompt != edit.prompt for edit in scene.edits)
    assert "Training saw the dog, the panda and the heart, and not on the backgrounds" in scene.note


def test_each_edit_stands_with_its_prompts() -> None:
    edits = tuple(EditScene(picture(7), f"source {i}", f"target {i}") for i in range(2))
    scene = Scene((picture(0), picture(200)), ("a", "b"), "c", edits)
    found = outcome("base", "openvino", 0)
    found.images["edit"] = [picture(30), picture(60)]
    page = describe([found], scene, demo.measure([found], scene), Settings(), "smooth-rt demo")
    assert [(e.source_prompt, e.prompt, e.after["base"].getpixel((0, 0))) for e in page.edits] == [
        ("source 0", "target 0", (30, 30, 30)), ("source 1", "target 1", (60, 60, 60)),
    ]  # fmt: skip
    assert {"edit-1-base.png", "edit-2-base.png"} <= set(media([found], scene))


def test_the_page_says_who_took_the_gradients_and_what_the_images_are() -> None:
    scene = Scene((picture(0), picture(200)), ("a", "b"), "c", (), note="Drawn by hand.")
    found = [outcome("base", "openvino", 0), outcome("smooth", "openvino", 0)]

    def lead() -> str:
        return describe(found, scene, demo.measure(found, scene), Settings(), "smooth-rt demo").lead

    assert "by gradients of PyTorch, for which none have to be built. Drawn by hand." in lead()
    found[0].gradients = found[1].gradients = "openvino"
    assert "by gradients of openvino. Drawn by hand." in lead()


def test_the_page_says_how_many_paths_the_lora_evens() -> None:
    scene = Scene((picture(0), picture(200)), ("a", "b"), "c", ())
    found = [outcome("base", "openvino", 0), outcome("smooth", "openvino", 0)]

    def lead() -> str:
        return describe(found, scene, demo.measure(found, scene), Settings(), "smooth-rt demo").lead

    paths = [name for name in MORPHS if name in found[0].images]
    assert f"With the Smooth-LoRA 0 of these {len(paths)} paths are evener" in lead()
    found[0].images[paths[0]] = [picture(0), picture(0), picture(200)]
    found[1].images[paths[0]] = [picture(0), picture(100), picture(200)]
    assert f"With the Smooth-LoRA 1 of these {len(paths)} paths are evener" in lead()
    found = found[:1]
    assert "With the Smooth-LoRA" not in lead()


def test_gradients_that_cannot_be_built_are_left_to_eager_aloud(caplog: pytest.LogCaptureFixture) -> None:
    built: Any = Built(None, True, "there")  # type: ignore[arg-type]
    more: Any = Built(None, False, "added")  # type: ignore[arg-type]

    def fails() -> Built:
        raise EngineError("it takes more memory than there is")

    assert demo._with_gradients(built, fails) is built
    assert "gradients: left to eager autograd, for they could not be built (it takes more memory" in caplog.text
    assert demo._with_gradients(built, lambda: more) == more


def test_command_says_what_is_not_the_default() -> None:
    assert command(Path("smooth-rt-demo"), "default", "default", False) == "smooth-rt demo --output smooth-rt-demo"
    typed = command(Path("my demo"), "some/model", None, True)
    assert typed == "smooth-rt demo --output 'my demo' --model some/model --small"
    assert command(Path("d"), "default", None, False).endswith("--lora none")


def test_an_output_whose_name_is_not_utf8(
    ran: tuple[demo.Demo, list[str], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, _ = ran[1]
    monkeypatch.setenv("SMOOTH_RT_CACHE", f"{folder}/cache")
    monkeypatch.setattr(demo, "SMALL", TINY)
    output = f"{folder}/a\udcff"
    arguments = ["demo", "--model", model, "--lora", "none", "--engine", "onnxruntime", "--small", "--output", output]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == f"{output}/index.html"
    assert "a\\udcff" in Path(output, "index.html").read_text(encoding="utf-8")


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="engines: none named"):
        demo.run_demo(tmp_path / "out", engines=())


def test_settings_are_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.SMALL.frames < Settings().frames
    assert demo.SMALL.num_inference_steps < Settings().num_inference_steps
    full = Settings()
    steps = {"num_inference_steps": full.num_inference_steps, "null_text_steps": full.null_text_steps}
    assert replace(demo.SMALL, frames=16, gradients=True, **steps) == full
