"""A pipeline over fake engines: smooth formulas in the place of networks, of odd sizes, and a record of the calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from engines.base import Engine
from engines.contract import NETWORKS, OF, WRT, Dims, Network, contract
from engines.eager import UnetVjp
from smooth_rt.model import PipelineConfig
from smooth_rt.pipeline import SmoothPipeline

Noise = Callable[[Tensor, Tensor, Tensor], Tensor]


class Formula(nn.Module):
    """A formula as the torch form of a UNet."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return (self.noise(sample, timestep, encoder_hidden_states),)


class FakeEngine(Engine):
    """The VAE averages and repeats pixels, the text encoder looks words up, the UNet is the formula it is given."""

    backend: ClassVar[str] = "fake"

    def __init__(self, network: Network, dims: Dims, noise: Noise) -> None:
        super().__init__(network)
        if network.name == "unet":
            names = [name for name in WRT if OF[name] == "noise_pred"]
            self.gradients = {name: partial(FakeEngine, contract(name, dims), dims, noise) for name in names}
        self.dims = dims
        self.noise = noise
        self.batches: list[int] = []
        generator = Generator().manual_seed(0)
        self.words = torch.randn(dims.vocabulary, dims.text_width, generator=generator)

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        first = next(iter(inputs.values()))
        self.batches.append(len(first))
        factor = self.dims.vae_factor
        if self.network.name == "text_encoder":
            return {"last_hidden_state": self.words[first]}
        if self.network.name in WRT:
            vjp = UnetVjp(Formula(self.noise), WRT[self.network.name])
            taken = (inputs[spec.name] for spec in self.network.inputs)
            return dict(zip((spec.name for spec in self.network.outputs), vjp(*taken), strict=True))
        if self.network.name == "unet":
            return {"noise_pred": self.noise(first, inputs["timestep"], inputs["encoder_hidden_states"])}
        if self.network.name == "vae_encoder":
            mean = F.avg_pool2d(first, factor)
            return {"latent_mean": mean, "latent_logvar": torch.zeros_like(mean)}
        return {"sample": first.repeat_interleave(factor, 2).repeat_interleave(factor, 3)}


def by_text(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Depends on the text and the time and not on the latent: its inversion is exact."""
    return (text.mean(dim=(1, 2)) + t / 1000)[:, None, None, None] + 0 * x


def smooth(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Depends on all three, smoothly."""
    return 0.5 * torch.tanh(x) + by_text(x, t, text)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    from smooth_rt.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["red apple", "blue dog"], 6, tmp_path_factory.mktemp("tokenizer"))
    scheduler = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False,
        "num_train_timesteps": 1000,
    }  # fmt: skip
    return PipelineConfig(tokenizer, scheduler, 0.5)


@pytest.fixture
def fake(config: PipelineConfig) -> Callable[[Noise], SmoothPipeline]:
    """Makes a pipeline whose UNet is the given formula: images of 16 pixels, f = 2, three latent channels."""

    def make(noise: Noise) -> SmoothPipeline:
        dims = Dims(
            tokens=6, text_width=5, vocabulary=len(config.tokenizer), latent_channels=3, image_channels=3,
            vae_factor=2, latent_multiple=4, sample_size=8,
        )  # fmt: skip
        engines = {name: FakeEngine(contract(name, dims), dims, noise) for name in NETWORKS}
        return SmoothPipeline(engines, config, dims)

    return make


@pytest.fixture
def exact(fake: Callable[[Noise], SmoothPipeline]) -> SmoothPipeline:
    return fake(by_text)


@pytest.fixture
def pipe(fake: Callable[[Noise], SmoothPipeline]) -> SmoothPipeline:
    return fake(smooth)


@pytest.fixture
def images() -> Tensor:
    """Three images [3, 3, 16, 16] that the fake VAE keeps as they are: every 2x2 block has one colour."""
    blocks = torch.rand(3, 3, 8, 8, generator=Generator().manual_seed(9))
    return blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture(scope="session")
def eager(tiny_model: Path) -> SmoothPipeline:
    return SmoothPipeline.from_pretrained(tiny_model, engine="eager")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where inversions of this test are kept, if its pipeline has digests."""
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    return tmp_path / "inversions"
