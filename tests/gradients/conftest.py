"""A bundle that gradients were added to, and pipelines on it and on eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engines.bundle import Bundle
from smooth_rt.build import Built, ensure_engines
from smooth_rt.pipeline import SmoothPipeline


@dataclass
class Grown:
    """A bundle without gradients, the same with those of the text, and what the second build said."""

    model: Path
    before: Bundle
    nodes: dict[str, int]
    built: Built
    steps: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def small_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a UNet of half the blocks: a gradient graph takes its time to trace."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("small") / "model")
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def grown(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    """Built for real, twice: the gradients are added to what is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = ensure_engines(small_model, backends=["onnxruntime"]).bundle
        nodes = {file.path: (before.path / file.path).stat().st_ino for file in before.manifest.files}
        steps: list[tuple[str, int, int]] = []
        built = ensure_engines(
            small_model, backends=["onnxruntime"], gradients=["text"], progress=lambda *step: steps.append(step)
        )
        yield Grown(small_model, before, nodes, built, steps)


@pytest.fixture(scope="module")
def pipe(grown: Grown) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_engines(grown.built.bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def eager(grown: Grown) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_pretrained(grown.model, engine="eager") as pipe:
        yield pipe
