"""The tiny model's networks, and one bundle of them for all tests of this folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.bundle import Bundle
from engines.contract import Dims, Network, NetworkName, contract
from engines.eager import gradient_networks, torch_networks
from engines.lora import LoraWeights
from engines.manifest import LoraSource, Source
from engines.runtime_lora import RuntimeUnet
from engines.select import architecture
from engines.variant import Order, Precision, Profile, Variant, every_size
from export import stages
from export.build import build_bundle
from smooth_rt.lora import lora_weights, read_lora
from smooth_rt.model import load_model

BACKENDS = ("onnxruntime", "openvino")
SOURCE = Source(
    model="tiny",
    digests={name: name[0] * 64 for name in ("text_encoder", "unet", "vae", "tokenizer", "scheduler")},
    lora=LoraSource(source="some/lora", digest="d" * 64, strength=0.5),
)


@dataclass
class Built:
    """A bundle and what was reported while it was built."""

    bundle: Bundle
    steps: list[tuple[str, int, int]] = field(default_factory=list)


def write_config(folder: Path) -> None:
    (folder / "model.json").write_text(json.dumps({"scaling_factor": 0.5}))


@pytest.fixture(scope="session")
def dims() -> Dims:
    """Of the tiny model."""
    return Dims(
        tokens=12,
        text_width=32,
        vocabulary=539,
        latent_channels=4,
        image_channels=3,
        vae_factor=2,
        latent_multiple=4,
        sample_size=8,
        up_channels=(32, 32, 16),
    )


@pytest.fixture(scope="session")
def networks(tiny_model: Path) -> dict[NetworkName, nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    return torch_networks(
        CLIPTextModel.from_pretrained(tiny_model / "text_encoder"),
        UNet2DConditionModel.from_pretrained(tiny_model / "unet"),
        AutoencoderKL.from_pretrained(tiny_model / "vae"),
    )


@pytest.fixture(scope="session")
def runtime(networks: dict[NetworkName, nn.Module], dims: Dims) -> tuple[nn.Module, Network]:
    """The UNet with a LoRA of a linear layer and of a convolution whose strength is an input."""
    generator = torch.Generator().manual_seed(0)
    names = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1")
    base = {f"unet.{name}.weight": networks["unet"].get_parameter(f"unet.{name}.weight") for name in names}
    down = {name: 0.2 * torch.randn(2, *weight.shape[1:], generator=generator) for name, weight in base.items()}
    up = {name: torch.randn(len(weight), 2, generator=generator) for name, weight in base.items()}
    module = RuntimeUnet(networks["unet"], LoraWeights(base, down, up, dict.fromkeys(base, 1.0)))
    return module.eval(), contract("unet", dims, lora_strength=True)


@pytest.fixture(scope="session")
def built(networks: dict[NetworkName, nn.Module], dims: Dims, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built once, for both backends, by the code that users run."""
    target = tmp_path_factory.mktemp("built") / "bundle"
    steps: list[tuple[str, int, int]] = []
    orders = [order_of(backend, dims) for backend in BACKENDS]
    bundle = build_bundle(
        networks, dims, SOURCE, orders, target, write_config, progress=lambda *step: steps.append(step)
    )
    return Built(bundle, steps)


def order_of(backend: str, dims: Dims, precision: Precision = "fp32", profiles: Sequence[Profile] = ()) -> Order:
    variant = Variant(backend=backend, precision=precision, lora_mode="fused", architecture=architecture())
    return Order(variant=variant, profiles=tuple(profiles) or (every_size(dims),))


@pytest.fixture(scope="session")
def order(dims: Dims) -> Callable[..., Order]:
    """An order of a backend, for every size unless profiles are named."""
    return lambda backend, precision="fp32", profiles=(): order_of(backend, dims, precision, profiles)


@pytest.fixture
def ready_made(built: Built, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the exporter by a copy of what it made before; lists the networks it was asked for."""
    asked: list[str] = []

    def copy(module: nn.Module, network: Network, dims: Dims, path: Path) -> None:
        asked.append(network.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", ".data"):
            shutil.copy(
                built.bundle.path / "onnxruntime-fp32" / network.name / f"model.onnx{suffix}", f"{path}{suffix}"
            )

    monkeypatch.setattr(stages, "to_onnx", copy)
    return asked


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def default_gradient() -> Callable[..., tuple[nn.Module, Dims]]:
    """A gradient network of the model that ships, in torch, and the model's sizes; of `lora_mode` "runtime" with the
    strength of its LoRA as an input, else without a LoRA."""

    @cache
    def of(name: NetworkName, lora_mode: str = "fused") -> tuple[nn.Module, Dims]:
        model = load_model("default")
        unet = torch_networks(model.text_encoder, model.unet, model.vae)["unet"]
        if lora_mode == "runtime":
            unet = RuntimeUnet(unet, lora_weights(model.unet, read_lora("default")))
        return gradient_networks(unet, [name])[name], model.dims

    return of


class _Altered(Engine):
    """An engine whose gradients are altered."""

    backend = "altered"

    def __init__(self, engine: Engine, alter: Callable[[Tensor], Tensor]) -> None:
        super().__init__(engine.network)
        self.engine, self.alter = engine, alter

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        outputs = self.engine.infer(**inputs)
        return {name: self.alter(one) if name.startswith("grad_") else one for name, one in outputs.items()}


@pytest.fixture(scope="session")
def altered() -> Callable[[Engine, Callable[[Tensor], Tensor]], Engine]:
    return _Altered
