"""The default size of a request, as diffusers' StableDiffusionPipeline reads it from old and new configs."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest

from engines.contract import Dims
from engines.variant import every_size, few_images
from smooth_rt import cli
from smooth_rt.checkpoint import quiet
from smooth_rt.commands.train import _square_side
from smooth_rt.errors import InputError, ModelError
from smooth_rt.model import load_model
from smooth_rt.pipeline import SmoothPipeline


class FoundError(Exception):
    """Ends diffusers' pipeline once it knows the size."""


def folder_of(tiny_model: Path, folder: Path, **unet: Any) -> Path:
    """A copy of the tiny model with another config of the UNet; None leaves a key out."""
    shutil.copytree(tiny_model, folder)
    path = folder / "unet" / "config.json"
    config = {**json.loads(path.read_text()), **unet}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def default_of_diffusers(folder: Path) -> tuple[int, int]:
    """Height and width of diffusers' own pipeline where a request names none."""
    found: list[tuple[int, int]] = []

    def stop(_: Any, height: int, width: int, *rest: Any, **more: Any) -> None:
        found.append((height, width))
        raise FoundError

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the size that it corrects
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        pipe.check_inputs = stop
        with pytest.raises(FoundError):
            pipe("dog")
    return found[0]


@pytest.mark.parametrize(
    ("size", "version", "expected"),
    [
        (8, "0.42.1", (16, 16)),
        (32, "0.2.2", (128, 128)),
        (8, "0.6.0", (128, 128)),
        (63, "0.8.1", (128, 128)),
        (64, "0.6.0", (128, 128)),
        (96, "0.6.0", (192, 192)),
        (32, "0.8.0.dev0", (128, 128)),
        (32, "0.9.0.dev0", (64, 64)),
        (32, "0.9.0rc1", (64, 64)),
        (32, "0.9.0", (64, 64)),
        (32, "0.10.2", (64, 64)),
        (32, None, (64, 64)),
        ([32, 32], "0.6.0", (64, 64)),
        ([8, 16], "0.42.1", (16, 32)),
        ([16, 8], "0.6.0", (32, 16)),
        ([6, 10], "0.42.1", (12, 20)),
    ],
)
def test_default_size_equals_that_of_diffusers(
    tiny_model: Path, tmp_path: Path, size: Any, version: str | None, expected: tuple[int, int]
) -> None:
    folder = folder_of(tiny_model, tmp_path / "model", sample_size=size, _diffusers_version=version)
    assert default_of_diffusers(folder) == expected
    with SmoothPipeline.from_pretrained(folder, engine="eager") as pipe:
        assert pipe.size == pipe.dims.image_size == expected


def test_default_image_has_the_default_size(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_of(tiny_model, tmp_path / "model", sample_size=[8, 16])
    with SmoothPipeline.from_pretrained(folder, engine="eager") as pipe:
        assert pipe("dog", num_inference_steps=1).images[0].size == (32, 16)  # width and height
        assert pipe("dog", num_inference_steps=1, width=16).images[0].size == (16, 16)


def test_corrected_size_survives_saving(tiny_model: Path, tmp_path: Path) -> None:
    """A saved folder is of the installed diffusers, from which on sizes are no longer corrected."""
    old = load_model(folder_of(tiny_model, tmp_path / "old", sample_size=32, _diffusers_version="0.6.0"))
    old.save(tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    assert saved.dims == old.dims
    assert saved.dims.image_size == default_of_diffusers(tmp_path / "saved") == (128, 128)
    assert saved.digests == old.digests
    # Folders of other versions whose sizes read alike are other models.
    new = load_model(folder_of(tiny_model, tmp_path / "new", sample_size=32, _diffusers_version="0.42.1"))
    assert new.digests["unet"] != old.digests["unet"]
    assert old.network_configs()["unet"]["sample_size"] == 64


def test_size_of_the_vae_serves_a_unet_without_one(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_of(tiny_model, tmp_path / "model", sample_size=None)
    assert load_model(folder).dims.image_size == (16, 16)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": [16, 32]}))
    assert load_model(folder).dims.image_size == (16, 32)


@pytest.mark.parametrize("size", [[8], [8, 8, 8], [8, "8"], "8", 8.5, -8, [0, 8], {"height": 8}])
def test_size_that_is_none_is_refused(tiny_model: Path, tmp_path: Path, size: Any) -> None:
    folder = folder_of(tiny_model, tmp_path / "model", sample_size=size)
    with pytest.raises(ModelError, match=r"unet/config.json: sample_size is .*; give one number, or height and width$"):
        load_model(folder)


@pytest.mark.parametrize("version", ["unknown", 6])
def test_version_that_is_none_is_refused(tiny_model: Path, tmp_path: Path, version: Any) -> None:
    folder = folder_of(tiny_model, tmp_path / "model", _diffusers_version=version)
    with pytest.raises(ModelError, match=r"unet/config.json: _diffusers_version is .*; give the version of diffusers"):
        load_model(folder)


def test_default_size_that_engines_do_not_take_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tiny_model, tmp_path / "model", sample_size=[6, 8])
    command = ["generate", "--model", str(folder), "--prompt", "dog", "--num-inference-steps", "1", "--engine"]
    for engine in ("openvino", "eager"):  # before an engine is built
        assert cli.main([*command, engine, "--output", str(tmp_path / engine)]) == 2
        said = capsys.readouterr().err
        assert "height: its default is 12; name a multiple of 8, such as 8" in said
        assert not (tmp_path / engine).exists()
    assert cli.main([*command, "eager", "--height", "16", "--output", str(tmp_path / "out")]) == 0


def test_sizes_of_builds_follow_from_the_dims() -> None:
    sizes: dict[str, Any] = {
        "tokens": 12, "text_width": 32, "vocabulary": 99, "latent_channels": 4, "image_channels": 3, "vae_factor": 8,
        "latent_multiple": 8,
    }  # fmt: skip
    square, wide, odd = (Dims(**sizes, sample_size=h, sample_width=w) for h, w in ((64, None), (48, 96), (60, 80)))
    assert [dims.image_size for dims in (square, wide, odd)] == [(512, 512), (384, 768), (480, 640)]
    assert [dims.supported_latent_size for dims in (square, wide, odd)] == [(64, 64), (48, 96), (56, 80)]
    assert odd.supported_image_size == (448, 640)
    assert str(every_size(square)) == "batch 1:1:*, height 64:512:*, width 64:512:*"
    assert str(every_size(wide)) == "batch 1:1:*, height 64:384:*, width 64:768:*"
    assert str(few_images(wide)) == "batch 1:1:4, height 384, width 768"
    for dims in (square, wide, odd):
        every_size(dims).check(dims)
        few_images(dims).check(dims)
    assert [_square_side(dims) for dims in (square, wide, odd)] == [512, 512, 512]


def test_pipeline_of_an_own_size_is_not_that_of_the_model(tiny_model: Path) -> None:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        pipe.size = (12, 16)
        with pytest.raises(InputError, match=r"^height: its default is 12; name a multiple of 8, such as 8$"):
            pipe.image_size(None, None)
        assert pipe.image_size(24, None) == (24, 16)
