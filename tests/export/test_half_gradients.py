"""The shipped model's gradients in half precision: what the README promises, at several seeds, and that a wrong one is
refused at each of them though half precision keeps little of some."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import Dims, NetworkName, contract
from engines.eager import EagerEngine, gradient_networks, torch_networks
from engines.errors import ParityError
from engines.ort import OrtEngine
from engines.variant import Precision
from export.build import VERIFY_SEED
from export.half import in_half
from export.to_onnx import to_onnx
from export.verify import verify
from smooth_rt.model import load_model

pytestmark = pytest.mark.slow

SEEDS = (VERIFY_SEED, 1, 2)  # of a build, of `engines verify --parity`, and one more


@cache
def of_the_default_model(name: NetworkName) -> tuple[nn.Module, Dims]:
    model = load_model("default")
    unet = torch_networks(model.text_encoder, model.unet, model.vae)["unet"]
    return gradient_networks(unet, [name])[name], model.dims


class Altered(Engine):
    """An engine whose gradients are altered."""

    backend = "altered"

    def __init__(self, engine: Engine, alter: Callable[[Tensor], Tensor]) -> None:
        super().__init__(engine.network)
        self.engine, self.alter = engine, alter

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        outputs = self.engine.infer(**inputs)
        return {name: self.alter(one) if name.startswith("grad_") else one for name, one in outputs.items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["unet_vjp_text", "unet_vjp_sample"])
def test_gradients_in_half_precision(name: NetworkName, precision: Precision) -> None:
    module, dims = of_the_default_model(name)
    network = contract(name, dims)
    engine = EagerEngine(network, in_half(module, network, dims, precision)[0])
    for seed in SEEDS:
        for parity in verify(engine, module, network, dims, precision, seed):
            print(name, precision, seed, parity)
            assert parity.relative <= parity.tolerance <= 0.5
        for wrong in (torch.zeros_like, torch.neg, lambda grad: 1.6 * grad, lambda grad: grad.flip(1)):
            with pytest.raises(ParityError, match="differs from torch's"):
                verify(Altered(engine, wrong), module, network, dims, precision, seed)


def test_a_graph_in_fp16_on_onnxruntime(tmp_path: Path) -> None:
    name: NetworkName = "unet_vjp_text"
    module, dims = of_the_default_model(name)
    network = contract(name, dims)
    to_onnx(in_half(module, network, dims, "fp16")[0], network, dims, tmp_path / "model.onnx")
    with OrtEngine(network, tmp_path / "model.onnx") as engine:
        for seed in SEEDS:
            for parity in verify(engine, module, network, dims, "fp16", seed):
                print(seed, parity)
