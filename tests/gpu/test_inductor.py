"""A package for the GPU: the torch module's numbers, from CUDA graphs that know their shapes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from engines import inductor
from engines.contract import Dims, contract
from engines.eager import EagerEngine, torch_networks
from engines.inductor import InductorEngine
from engines.variant import Precision
from export.graphs import Case, random_inputs
from export.half import in_half
from export.to_inductor import cannot_build, to_inductor
from export.verify import TOLERANCES

NO_GPU = None if torch.cuda.is_available() else "needs a GPU that torch can use (CUDA)"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=f"{NO_GPU}")]

DIMS = Dims(
    tokens=12, text_width=32, vocabulary=539, latent_channels=4, image_channels=3, vae_factor=2, latent_multiple=4,
    sample_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def unet(tiny_model: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    return torch_networks(nn.Identity(), unet, nn.Identity())["unet"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", TOLERANCES["fp32"]), ("bf16", 5e-2), ("fp16", 7e-3)])
def test_the_unet_on_the_gpu(
    unet: nn.Module, precision: Precision, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = cannot_build("cuda")
    if fault is not None:
        pytest.skip(fault)
    monkeypatch.setattr(inductor, "GRAPHS", 2)
    network, path = contract("unet", DIMS), tmp_path / "made" / "unet.pt2"
    compiled = unet if precision == "fp32" else in_half(unet, network, DIMS, precision)[0]
    to_inductor(compiled, network, DIMS, path, precision=precision, device="cuda")
    assert os.listdir(path.parent) == ["unet.pt2"]
    assert next(unet.parameters()).device.type == "cpu"
    eager = EagerEngine(network, unet)
    generator = torch.Generator().manual_seed(3)
    with InductorEngine(network, path) as engine:
        # Three shapes for two graphs, each more than once: replayed, dropped and captured again.
        for batch, height, width in ((1, 8, 8), (2, 8, 12), (2, 8, 12), (3, 4, 8), (1, 8, 8), (3, 4, 8)):
            case = Case({"batch": batch, "height": height, "width": width}, 1.0)
            inputs = random_inputs(network, DIMS, case, generator)
            got, wanted = engine.infer(**inputs)["noise_pred"], eager.infer(**inputs)["noise_pred"]
            assert float((got - wanted).norm() / wanted.norm()) < tolerance
        kept = got.clone()
        engine.infer(**{**inputs, "sample": inputs["sample"] + 1})
        assert torch.equal(got, kept)
