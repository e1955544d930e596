"""The shipped model's gradients in fp32: every one of them on ONNX Runtime and OpenVINO, in batches of 1 to 4 at two
sizes, held to what a build holds them to; and the inversion that runs on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import Dims, NetworkName
from engines.errors import ParityError
from engines.recipes import RECIPES
from engines.select import open_engine, target
from engines.variant import LoraMode, Variant, every_size
from export.build import VERIFY_SEED
from export.graphs import Case
from export.stages import Stages
from export.verify import JUDGED, verify
from smooth_rt.build import ensure_engines
from smooth_rt.evaluation import examples
from smooth_rt.images import read
from smooth_rt.metrics import psnr
from smooth_rt.pipeline import SmoothPipeline

pytestmark = pytest.mark.slow

BATCHES = (1, 2, 3, 4)
SEEDS = (VERIFY_SEED + 1, VERIFY_SEED + 2)  # that no build draws its inputs by


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs that both backends are made from."""
    return tmp_path_factory.mktemp("exported")


@pytest.mark.parametrize(
    ("name", "backend", "lora_mode"),
    [
        *itertools.product(
            ["unet_vjp_text", "unet_vjp_sample", "unet_vjp"],
            ["onnxruntime", "openvino"],
            cast("list[LoraMode]", ["fused"]),
        ),
        ("unet_vjp_text", "openvino", "runtime"),
        ("unet_vjp_sample", "openvino", "runtime"),
    ],
)
def test_gradients_are_those_of_autograd(
    default_gradient: Callable[..., tuple[nn.Module, Dims]],
    altered: Callable[[Engine, Callable[[Tensor], Tensor]], Engine],
    exported: Path,
    tmp_path: Path,
    name: NetworkName,
    backend: str,
    lora_mode: LoraMode,
) -> None:
    """An item is off by 1e-4 at most, or by ten times what torch's own is by float64 or roundings move it by where that
    is more: some are ill-conditioned (docs/measurements/2026-11-25-gradients.md)."""
    module, dims = default_gradient(name, lora_mode)
    variant = Variant(backend=backend, precision="fp32", lora_mode=lora_mode, architecture=target(backend))
    network = variant.network(name, dims)
    side, unit = dims.sample_size, dims.latent_multiple
    # Of each batch the timesteps are spread over 0 to 999, a draw from each equal part.
    tried = [
        Case({"batch": batch, "height": height, "width": width}, 1.0)
        for height, width in ((side, side), (side - unit, side + unit))
        for batch in BATCHES
    ]
    bounds = every_size(dims).bounds(network, dims)
    graph = Stages(exported, dims, None, lambda *_: None).build(network, module, variant, "fp32", bounds, tmp_path)
    with open_engine(backend, network, graph.path, RECIPES[backend]["fp32"][name].hint) as engine:
        for seed in SEEDS:
            found = verify(engine, module, network, dims, "fp32", seed, tried)
            print(backend, seed, *found, sep="\n")
            assert [parity.output for parity in found] == [spec.name for spec in network.outputs]
            assert found[0].relative <= 1e-4
            assert all(parity.relative <= parity.tolerance <= JUDGED for parity in found)
            # Nearly all of them are judged.
            items = sum(case.sizes["batch"] for case in tried)
            assert all(parity.unjudged <= items / 10 for parity in found)
        for wrong in (lambda grad: 1.01 * grad, lambda grad: grad.flip(1)):
            with pytest.raises(ParityError, match=rf"{name}: altered's grad_\w+ differs from torch's"):
                verify(altered(engine, wrong), module, network, dims, "fp32", SEEDS[0], tried)


def test_null_text_inversion_comes_as_near_as_eagers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fastest engine of the processor's, every round of every step."""
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    example = next(one for one in examples() if "heart" in one.caption)
    bundle = ensure_engines("default", "default", backends=["openvino"], gradients=["text"]).bundle
    found: dict[str, float] = {}
    for backend in ("eager", "openvino"):
        with SmoothPipeline.from_engines(bundle, engine=backend) as pipe:
            pixels = read([example.path], *pipe.image_size(None, None))
            back = pipe.invert(
                pixels, example.caption, method="null-text", keep=False, early_stop=False, output_type="pt"
            ).images
            assert isinstance(back, Tensor)
            found[backend] = psnr(pixels[0], back[0])
            found["bound"] = psnr(pixels[0], torch.as_tensor(pipe.decode(pipe.encode_image(pixels), "pt"))[0])
            assert pipe._eager_unet is None
            assert pipe.evaluations["gradient"] == 50 * 10
    print(found)
    assert abs(found["openvino"] - found["eager"]) <= 0.1
    assert found["bound"] - found["openvino"] <= 0.3
