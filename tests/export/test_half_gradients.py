"""The shipped model's gradients in half precision: what the README promises, at several seeds, and that a wrong one is
refused at each of them though half precision keeps little of some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import Dims, NetworkName, contract
from engines.eager import EagerEngine
from engines.errors import ParityError
from engines.ort import OrtEngine
from engines.variant import Precision
from export.build import VERIFY_SEED
from export.half import in_half
from export.to_onnx import to_onnx
from export.verify import verify

pytestmark = pytest.mark.slow

SEEDS = (VERIFY_SEED, 1, 2)  # of a build, of `engines verify --parity`, and one more

DefaultGradient = Callable[[NetworkName], tuple[nn.Module, Dims]]
Altered = Callable[[Engine, Callable[[Tensor], Tensor]], Engine]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["unet_vjp_text", "unet_vjp_sample"])
def test_gradients_in_half_precision(
    default_gradient: DefaultGradient, altered: Altered, name: NetworkName, precision: Precision
) -> None:
    module, dims = default_gradient(name)
    network = contract(name, dims)
    engine = EagerEngine(network, in_half(module, network, dims, precision)[0])
    for seed in SEEDS:
        for parity in verify(engine, module, network, dims, precision, seed):
            print(name, precision, seed, parity)
            assert parity.relative <= parity.tolerance <= 0.5
        for wrong in (torch.zeros_like, torch.neg, lambda grad: 1.6 * grad, lambda grad: grad.flip(1)):
            with pytest.raises(ParityError, match="differs from torch's"):
                verify(altered(engine, wrong), module, network, dims, precision, seed)


def test_a_graph_in_fp16_on_onnxruntime(default_gradient: DefaultGradient, tmp_path: Path) -> None:
    name: NetworkName = "unet_vjp_text"
    module, dims = default_gradient(name)
    network = contract(name, dims)
    to_onnx(in_half(module, network, dims, "fp16")[0], network, dims, tmp_path / "model.onnx")
    with OrtEngine(network, tmp_path / "model.onnx") as engine:
        for seed in SEEDS:
            for parity in verify(engine, module, network, dims, "fp16", seed):
                print(seed, parity)
