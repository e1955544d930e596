"""generate, interpolate, invert and edit: results as files and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from smooth_rt.pipeline import SmoothPipeline

FAST = ["--num-inference-steps", "2"]


def test_generate(opened: list[Any], run: Any, tmp_path: Path) -> None:
    code, out, _ = run(
        "generate", "--prompt", "dog", "--prompt", "red apple", *FAST, "--output", tmp_path / "o", "--json", "--seed", 3
    )
    assert code == 0
    result = json.loads(out)
    assert result["engine"] == "eager"
    assert result["lora_strength"] is None  # there is none
    assert [Path(file).name for file in result["files"]] == ["image-001.png", "image-002.png", "sheet.png"]
    assert [iio.imread(file).shape for file in result["files"][:2]] == [(16, 16, 3)] * 2
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["image-001.png", "image-002.png", "sheet.png"]
    # The second image is the one that the next seed makes alone.
    run("generate", "--prompt", "red apple", *FAST, "--output", tmp_path / "alone", "--seed", 4)
    alone = iio.imread(tmp_path / "alone" / "image-001.png").astype(int)
    assert np.abs(alone - iio.imread(tmp_path / "o" / "image-002.png")).max() <= 1


def test_result_for_people(opened: list[Any], run: Any, tmp_path: Path) -> None:
    code, out, _ = run("generate", "--prompt", "dog", *FAST, "--output", tmp_path / "o")
    assert code == 0
    assert "engine: eager" in out
    assert str(tmp_path / "o" / "image-001.png") in out


@pytest.mark.parametrize("ends", [["--seeds", 1, 2, "--prompt", "dog"], ["--prompt", "dog", "--prompt", "red apple"]])
def test_interpolate_from_noise(opened: list[Any], run: Any, tmp_path: Path, ends: list[Any]) -> None:
    code, out, _ = run("interpolate", *ends, *FAST, "--frames", 3, "--output", tmp_path / "o", "--json")
    assert code == 0
    result = json.loads(out)
    names = [Path(file).name for file in result["files"]]
    assert names == ["frame-001.png", "frame-002.png", "frame-003.png", "sheet.png", "morph.mp4", "morph.webp"]
    assert iio.imread(result["files"][4], plugin="pyav").shape == (3, 256, 256, 3)
    with Image.open(result["files"][5]) as film:
        assert (film.n_frames, film.size) == (4, (256, 256))
    assert len(result["distances"]) == 2
    assert result["istd"] == pytest.approx(abs(result["distances"][0] - result["distances"][1]) / 2, rel=0.5)


def test_interpolate_images(opened: list[Any], run: Any, picture: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "interpolate", picture, picture, "--prompt", "dog", *FAST, "--frames", 2, "--output", tmp_path / "o", "--json"
    )
    assert code == 0
    assert len(json.loads(out)["files"]) == 5


@pytest.mark.parametrize("method", ["ddim", "ddim-without-text", "negative-prompt"])
def test_invert(opened: list[Any], run: Any, picture: Path, tmp_path: Path, method: str) -> None:
    from safetensors.numpy import load_file

    arguments = ["invert", picture, "--prompt", "dog", "--method", method, *FAST, "--output", tmp_path / "o", "--json"]
    code, out, _ = run(*arguments)
    assert code == 0
    result = json.loads(out)
    original, rebuilt = (iio.imread(tmp_path / "o" / f"{name}-001.png") for name in ("original", "reconstruction"))
    assert np.array_equal(original, iio.imread(picture))
    error = np.mean((original / 255.0 - rebuilt / 255.0) ** 2)
    assert result["psnr"] == [pytest.approx(-10 * np.log10(error), abs=0.1)]
    assert load_file(tmp_path / "o" / "noise.safetensors")["latents"].shape == (1, 4, 8, 8)


def test_the_noise_of_an_inversion_samples_back(opened: list[Any], run: Any, picture: Path, tmp_path: Path) -> None:
    common = ["--prompt", "dog", "--guidance-scale", 1, *FAST]
    assert run("invert", picture, *common, "--output", tmp_path / "o")[0] == 0
    noise = tmp_path / "o" / "noise.safetensors"
    assert run("generate", *common, "--latents", noise, "--output", tmp_path / "again")[0] == 0
    rebuilt, again = (
        iio.imread(tmp_path / name).astype(int) for name in ("o/reconstruction-001.png", "again/image-001.png")
    )
    assert np.abs(rebuilt - again).max() <= 1


@pytest.mark.parametrize("method", [["eq15", "--source-prompt", "dog"], ["sdedit"]])
def test_edit(opened: list[Any], run: Any, picture: Path, tmp_path: Path, method: list[str]) -> None:
    arguments = ["edit", picture, picture, "--prompt", "red apple", "--edit-method", *method, *FAST]
    code, out, _ = run(*arguments, "--output", tmp_path / "o", "--json")
    assert code == 0
    names = [Path(file).name for file in json.loads(out)["files"]]
    assert names == ["before-001.png", "before-002.png", "after-001.png", "after-002.png", "sheet.png"]
    assert not np.array_equal(iio.imread(tmp_path / "o" / "after-001.png"), iio.imread(picture))


def test_json_stands_alone_on_stdout(
    opened: list[Any], eager: SmoothPipeline, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SmoothPipeline.decode

    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("a library says something")
        return decode(*args, **kwargs)

    monkeypatch.setattr(SmoothPipeline, "decode", chatty)
    code, out, err = run("generate", "--prompt", "dog", *FAST, "--output", tmp_path / "o", "--json")
    assert code == 0
    assert json.loads(out)["command"] == "generate"
    assert "a library says something" in err


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], ("default", "default", 1.0, "auto")),
        (["--lora", "none"], ("default", None, 1.0, "auto")),
        (["--model", "some/model"], ("some/model", None, 1.0, "auto")),
        (
            ["--model", "m", "--lora", "l", "--lora-strength", "0.5", "--engine", "openvino"],
            ("m", "l", 0.5, "openvino"),
        ),
    ],
)
def test_which_lora(opened: list[Any], run: Any, tmp_path: Path, options: list[str], asked: tuple[Any, ...]) -> None:
    assert run("generate", "--prompt", "dog", *FAST, *options, "--output", tmp_path / "o")[0] == 0
    assert opened == [asked]


def test_other_files_of_the_same_names_are_replaced(opened: list[Any], run: Any, tmp_path: Path) -> None:
    (tmp_path / "image-001.png").write_text("old")
    assert run("generate", "--prompt", "dog", *FAST, "--output", tmp_path)[0] == 0
    assert iio.imread(tmp_path / "image-001.png").shape == (16, 16, 3)
