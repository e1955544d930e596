"""Convolutions with fewer multiplications: the same numbers, where they pay, and nothing else in the graph touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as ops
from torch import nn

from engines.contract import Dims, NetworkName, contract
from engines.eager import gradient_networks
from engines.errors import InputError
from engines.ov import OvEngine, core
from engines.recipes import check_convolution
from engines.select import architecture
from engines.variant import Order, Profile, Span, Variant, every_size
from export.build import build_bundle
from export.graphs import Case, random_inputs
from export.rewrites import winograd as rewrite
from export.to_onnx import to_onnx
from export.to_openvino import to_winograd
from export.verify import TOLERANCES


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small it is."""
    monkeypatch.setattr(rewrite, "LEAST_PAIRS", 0)
    monkeypatch.setattr(rewrite, "LEAST_TILES", 1)


@pytest.mark.parametrize("size", rewrite.TILES)
def test_a_tile_is_what_the_direct_form_gives(size: int) -> None:
    outputs, kernel, inputs = rewrite.cook_toom(size)
    generator = np.random.default_rng(0)
    taps, cells = generator.standard_normal((3, 3)), generator.standard_normal((size + 2, size + 2))
    found = outputs @ ((kernel @ taps @ kernel.T) * (inputs @ cells @ inputs.T)) @ outputs.T
    windows = np.lib.stride_tricks.sliding_window_view(cells, (3, 3))
    np.testing.assert_allclose(found, np.einsum("ijab,ab->ij", windows, taps), atol=1e-12)


def convolution(
    weights: torch.Tensor, shape: Sequence[int], stride: int = 1, pad: int = 1, dilation: int = 1
) -> openvino.Model:
    image = ops.parameter(list(shape), np.float32, name="x")
    pads = [pad, pad]
    found = ops.convolution(image, ops.constant(weights.numpy()), [stride] * 2, pads, pads, [dilation] * 2)
    image.output(0).get_tensor().set_names({"x"})
    return openvino.Model([ops.relu(found)], [image], "one")


def answer(model: openvino.Model, x: torch.Tensor) -> torch.Tensor:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy()])[0])


@pytest.mark.parametrize("native", [False, True], ids=["operations", "kernels"])
@pytest.mark.parametrize("size", rewrite.TILES)
@pytest.mark.parametrize(("height", "width"), [(13, 8), (1, 3)])
def test_a_rewritten_layer_gives_the_same(
    native: bool,
    size: int,
    height: int,
    width: int,
    every_layer: None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(rewrite, "NATIVE" if native else "OPERATIONS", (size,))
    if native:
        request.getfixturevalue("own_kernels")
    generator = torch.Generator().manual_seed(size)
    weights = torch.randn(5, 7, 3, 3, generator=generator) / 8
    model = convolution(weights, (-1, 7, -1, -1))
    assert rewrite.winograd(model, {"x": (-1, 7, height, width)}, 2, native) == {size: 1}
    assert "Convolution" not in [node.get_type_name() for node in model.get_ops()]
    for rows in (1, 3):
        x = torch.randn(rows, 7, height, width, generator=generator)
        wanted = nn.functional.conv2d(x.double(), weights.double(), padding=1).relu()
        # Tiles of 6x6 sum numbers up to 21/4 times as large.
        assert (answer(model, x) - wanted).norm() < (6e-6 if size == 6 else 2e-6) * wanted.norm()


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"pad": 0}, {"pad": 2, "dilation": 2}, {"kernel": 1, "pad": 0}, {"kernel": 5, "pad": 2}],
    ids=str,
)
def test_other_convolutions_are_left_alone(other: dict[str, int], every_layer: None) -> None:
    kernel = other.pop("kernel", 3)
    model = convolution(torch.ones(4, 4, kernel, kernel), (1, 4, 8, 8), **other)
    assert not rewrite.winograd(model, {"x": (1, 4, 8, 8)}, 1)
    assert "Convolution" in [node.get_type_name() for node in model.get_ops()]


def test_only_sizes_that_gain_are_taken() -> None:
    assert rewrite.tile(2, 320, 320, 64, 64) == 4
    assert rewrite.tile(2, 1280, 1280, 16, 16) == 4
    assert rewrite.tile(2, 1280, 1280, 8, 8) == 2
    assert rewrite.tile(1, 1280, 1280, 8, 8) is None
    assert rewrite.tile(2, 4, 320, 64, 64) is None
    # 11 tiles of 6 for 16 of 4 a side; at 32 and 16 cells they multiply as often.
    assert [rewrite.tile(2, 320, 320, side, side, rewrite.NATIVE) for side in (96, 64, 32, 16)] == [6, 6, 4, 4]
    # Free sides give no tiles.
    free = convolution(torch.ones(256, 256, 3, 3), (1, 256, -1, -1))
    assert not rewrite.winograd(free, {"x": (1, 256, -1, -1)}, 1)


def one_size(side: int = 16) -> Profile:
    sides = Span(min=side, opt=side, max=side)
    return Profile(batch=Span(min=1, opt=1, max=1), height=sides, width=sides)


def variant(**changes: Any) -> Variant:
    plain: dict[str, Any] = {"backend": "openvino", "precision": "fp32", "lora_mode": "fused"}
    return Variant(**{**plain, "architecture": architecture(), "convolution": "winograd", **changes})


@pytest.mark.usefixtures("ready_made")
def test_a_model_is_built_so_and_verified(
    networks: dict[NetworkName, nn.Module], dims: Dims, built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each layer takes most of a second to open: those of 64 channels in and 32 out.
    monkeypatch.setattr(rewrite, "LEAST_PAIRS", 20)
    monkeypatch.setattr(rewrite, "LEAST_TILES", 1)
    order = Order(variant=variant(), profiles=(one_size(),))
    bundle = build_bundle(networks, dims, built.bundle.source, [order], tmp_path / "bundle", lambda _: None)
    made = bundle.find("openvino")
    assert made.variant.name == "openvino-fp32-winograd"
    hits = made.engine("unet").notes
    assert hits["winograd_4x4"] + hits["winograd_2x2"] == 3
    assert hits["exact_timesteps"] == 10
    assert set(hits) == {"winograd_4x4", "winograd_2x2", "exact_timesteps"}
    assert not made.engine("text_encoder").notes
    (found,) = made.engine("unet").parity
    assert 0 < found.relative < 1e-5
    assert found.cases >= 2
    assert "--convolution winograd" in bundle.command(made)
    with bundle.open_network("unet", made) as engine:
        case = Case({"batch": 2, "height": 12, "width": 8}, 1.0)
        with pytest.raises(InputError, match="lies outside what the openvino engine was built for"):
            engine.infer(**random_inputs(engine.network, dims, case, torch.Generator()))


@pytest.mark.slow
@pytest.mark.usefixtures("every_layer")
def test_gradients_are_rewritten_as_well(
    networks: dict[NetworkName, nn.Module], dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "LEAST_PAIRS", 20)
    name: NetworkName = "unet_vjp_text"
    network, module = contract(name, dims), gradient_networks(networks["unet"], [name])[name]
    to_onnx(module, network, dims, tmp_path / "model.onnx")
    bounds = one_size().bounds(network, dims)
    hits = to_winograd(tmp_path / "model.onnx", tmp_path / "model.xml", network, bounds)
    assert sum(hits.values()) > 3  # more than forwards
    with OvEngine(network, tmp_path / "model.xml", bounds) as engine:
        given = random_inputs(network, dims, Case({"batch": 1, "height": 8, "width": 8}, 1.0), torch.Generator())
        given["timestep"] = torch.tensor([900])  # late, where the gradient is well-conditioned
        for got, wanted in zip(engine.infer(**given).values(), module(*given.values()), strict=True):
            assert float((got - wanted).norm() / wanted.norm()) < TOLERANCES["fp32"]


@pytest.mark.parametrize(
    ("changes", "profiles", "said"),
    [
        ({}, None, "a graph is for one height and one width, not height 8:16:"),
        ({}, [one_size(16), one_size(24)], "not height 16, width 16 or height 24, width 24"),
        ({}, [], "not every size; give both with --batch, and another --output for another size"),
        ({"backend": "onnxruntime"}, [one_size()], "openvino has it, in fp32, not onnxruntime in fp32"),
        ({"precision": "bf16"}, [one_size()], "not openvino in bf16"),
        ({"lora_mode": "refit"}, [one_size()], "cannot be replaced; choose fused or runtime"),
    ],
)
def test_what_cannot_be_built_so_is_said(
    changes: dict[str, str], profiles: list[Profile] | None, said: str, dims: Dims
) -> None:
    with pytest.raises(InputError, match="convolution=winograd") as caught:
        check_convolution(variant(**changes), [every_size(dims)] if profiles is None else profiles)
    assert said in str(caught.value)
