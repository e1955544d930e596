"""Each rule of a gradient graph against autograd in float64, and the whole graph on ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.base import Engine
from engines.contract import Dims, Network, NetworkName, contract
from engines.eager import Unet, gradient_networks
from engines.ort import OrtEngine
from engines.ov import OvEngine
from engines.variant import Precision
from export.decompositions.attention import attention
from export.decompositions.convolution_backward import convolution_backward
from export.decompositions.group_norm import group_norm, group_norm_backward
from export.decompositions.layer_norm import layer_norm, layer_norm_backward
from export.decompositions.linear import linear
from export.decompositions.squeeze import squeeze
from export.decompositions.upsample_nearest import upsample_nearest
from export.graphs import Case, random_inputs
from export.half import in_half
from export.to_onnx import to_onnx
from export.to_openvino import to_openvino
from export.verify import TOLERANCES

MASK = [True, False, False]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def pulled(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A result, a cotangent of it and what autograd makes of that."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    cotangent = drawn(*y.shape)
    (grad,) = torch.autograd.grad(y, leaf, cotangent)
    return y.detach(), cotangent, grad


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [(3, 1, 1, 1, 1), (1, 1, 0, 1, 1), (3, 2, 1, 1, 1), (3, 1, 2, 2, 1), (3, 2, 0, 1, 2), (1, 2, 0, 1, 1)],
)
def test_convolution(kernel: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    x, weight = drawn(2, 4, 9, 12), drawn(6, 4 // groups, kernel, kernel)
    _, cotangent, wanted = pulled(
        lambda x: functional.conv2d(x, weight, None, stride, padding, dilation, groups), x
    )  # fmt: skip
    pairs = ([one] * 2 for one in (stride, padding, dilation))
    found, *others = convolution_backward(cotangent, x, weight, None, *pairs, False, [0, 0], groups, MASK)
    torch.testing.assert_close(found, wanted)
    assert others == [None, None]


def test_a_convolution_has_no_gradient_of_its_weight() -> None:
    x, weight = drawn(1, 2, 4, 4), drawn(2, 2, 3, 3)
    with pytest.raises(NotImplementedError, match="input alone"):
        convolution_backward(x, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])


def test_group_norm() -> None:
    x, weight, bias = drawn(2, 8, 3, 5), drawn(8), drawn(1, 8)[0]
    wanted, cotangent, grad = pulled(lambda x: functional.group_norm(x, 4, weight, bias, 1e-5), x)
    found, mean, rstd = group_norm(x, weight, bias, 2, 8, 15, 4, 1e-5)
    torch.testing.assert_close(found, wanted)
    _, *statistics = torch.native_group_norm(x, weight, bias, 2, 8, 15, 4, 1e-5)
    torch.testing.assert_close([mean, rstd], statistics)
    back = group_norm_backward(cotangent, x, mean, rstd, weight, 2, 8, 15, 4, [True, False, False])
    torch.testing.assert_close(back[0], grad)


def test_layer_norm() -> None:
    x, weight, bias = drawn(2, 5, 6), drawn(6), drawn(1, 6)[0]
    wanted, cotangent, grad = pulled(lambda x: functional.layer_norm(x, (6,), weight, bias, 1e-5), x)
    found, mean, rstd = layer_norm(x, (6,), weight, bias, 1e-5)
    torch.testing.assert_close(found, wanted)
    _, *statistics = torch.native_layer_norm(x, (6,), weight, bias, 1e-5)
    torch.testing.assert_close([mean, rstd], statistics)
    back = layer_norm_backward(cotangent, x, (6,), mean, rstd, weight, bias, [True, False, False])
    torch.testing.assert_close(back[0], grad)


QUERY, KEY, VALUE = drawn(2, 3, 5, 4), drawn(2, 3, 7, 4), drawn(2, 3, 7, 6)


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, -1) @ value


@pytest.mark.parametrize(
    ("written", "own", "shape"),
    [
        (lambda x: linear(x, drawn(3, 4), drawn(3)), lambda x: functional.linear(x, drawn(3, 4), drawn(3)), (2, 5, 4)),
        (lambda x: attention(x, KEY, VALUE), lambda x: exact_attention(x, KEY, VALUE), (2, 3, 5, 4)),
        (lambda x: attention(QUERY, x, VALUE), lambda x: exact_attention(QUERY, x, VALUE), (2, 3, 7, 4)),
        (lambda x: attention(QUERY, KEY, x), lambda x: exact_attention(QUERY, KEY, x), (2, 3, 7, 6)),
        (
            lambda x: attention(x, x, x, scale=0.3),
            lambda x: torch.softmax(0.3 * x @ x.transpose(2, 3), -1) @ x,
            (2, 3, 5, 4),
        ),
        (
            lambda x: upsample_nearest(x, None, [2.0, 3.0]),
            lambda x: functional.interpolate(x, scale_factor=(2.0, 3.0)),
            (2, 3, 4, 5),
        ),
        # Of the axes named, one has more than one element and stays.
        (lambda x: squeeze(x, (1, 2, 3)), lambda x: torch.ops.aten.squeeze.dims(x, (1, 2, 3)), (2, 1, 3, 1)),
        (lambda x: squeeze(x, (-1, -3)), lambda x: torch.ops.aten.squeeze.dims(x, (-1, -3)), (1, 1, 3, 1)),
    ],
    ids=[
        "linear",
        "attention by query",
        "by key",
        "by value",
        "by all at once",
        "upsample_nearest",
        "squeeze",
        "squeeze from the end",
    ],
)
def test_what_is_written_out(
    written: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = drawn(*shape)
    found, wanted = pulled(written, x), pulled(own, x)
    for got, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x, cotangent = (300 * drawn(2, 8, 6, 6)).to(dtype), drawn(2, 8, 6, 6).to(dtype)  # whose squares outgrow fp16
    weight, bias = drawn(8).to(dtype), drawn(1, 8)[0].to(dtype)
    found, mean, rstd = group_norm(x, weight, bias, 2, 8, 36, 4, 1e-5)
    back = group_norm_backward(cotangent, x, mean, rstd, weight, 2, 8, 36, 4, MASK)[0]
    y, exact_mean, exact_rstd = group_norm(x.double(), weight.double(), bias.double(), 2, 8, 36, 4, 1e-5)
    exact = group_norm_backward(
        cotangent.double(), x.double(), exact_mean, exact_rstd, weight.double(), 2, 8, 36, 4, MASK
    )[0]
    rows = x.permute(0, 2, 3, 1)
    across, m, r = layer_norm(rows, (8,), weight, bias, 1e-5)
    double = (weight.double(), bias.double())
    across_exact, exact_m, exact_r = layer_norm(rows.double(), (8,), *double, 1e-5)
    along = cotangent.permute(0, 2, 3, 1)
    pulled_across = layer_norm_backward(along, rows, (8,), m, r, weight, bias, MASK)[0]
    pulled_exact = layer_norm_backward(along.double(), rows.double(), (8,), exact_m, exact_r, *double, MASK)[0]
    assert exact is not None
    assert pulled_exact is not None
    for got, wanted in ((found, y), (back, exact), (across, across_exact), (pulled_across, pulled_exact)):
        assert got is not None
        assert got.dtype is dtype
        torch.testing.assert_close(
            got.double(), wanted, rtol=0, atol=float(torch.finfo(dtype).eps * wanted.abs().max())
        )
    # In fp32, of numbers in half precision.
    for statistic, of in ((mean, exact_mean), (rstd, exact_rstd), (m, exact_m), (r, exact_r)):
        assert statistic.dtype is torch.float32
        torch.testing.assert_close(statistic.double(), of, rtol=1e-5, atol=1e-5)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def small(network: Network, dims: Dims, rows: int, height: int, width: int) -> dict[str, Tensor]:
    """Inputs at late timesteps: at early ones latents of noise alone are none that a model knows, and a gradient there
    changes by a tenth where they change by 1e-4."""
    case = Case({"batch": rows, "height": height, "width": width}, 1.0)
    given = random_inputs(network, dims, case, torch.Generator().manual_seed(rows))
    return {**given, "timestep": torch.full((rows,), 900)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tiny_cotangents_do_not_vanish_in_half_precision(
    networks: dict[NetworkName, nn.Module], dims: Dims, precision: Precision
) -> None:
    name: NetworkName = "unet_vjp"
    network = contract(name, dims)
    module: Any = gradient_networks(networks["unet"], [name])[name]
    half, _ = in_half(module, network, dims, precision)
    given = small(network, dims, 2, 8, 8)
    wanted = module(*given.values())
    for size in (1.0, 1e-6, 1e-12):  # 6e-8 is the least number of fp16
        scaled = {**given, "cotangent": size * given["cotangent"], "cotangent_scale": size * given["cotangent_scale"]}
        for got, exact in zip(half(*scaled.values())[1:], wanted[1:], strict=True):
            assert error(got / size, exact) < TOLERANCES[precision]
    nothing = half(*{**given, "cotangent": 0 * given["cotangent"], "cotangent_scale": torch.zeros(1)}.values())
    assert all(bool((grad == 0).all()) for grad in nothing[1:])


LINEAR = {"use_linear_projection": True, "attention_head_dim": (2, 4, 4)}  # as SD2.x has it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "config"),
    [
        ("unet_vjp", "fp32", {}),
        ("unet_vjp", "fp32", LINEAR),
        ("unet_up_blocks_1_vjp", "fp32", {}),
        ("unet_up_blocks_0_vjp", "fp32", {}),  # whose sides are half the latent's
        ("unet_vjp", "fp16", {}),
    ],
    ids=["both", "SD2", "features", "an early block", "fp16"],
)
def test_the_graph_gives_autograds_gradients(
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    tmp_path: Path,
    name: NetworkName,
    precision: Precision,
    config: dict[str, Any],
) -> None:
    unet: Any = networks["unet"]
    if config:
        torch.manual_seed(0)
        unet = Unet(type(unet.unet)(**{**unet.unet.config, **config}).requires_grad_(False)).eval()
    module = gradient_networks(unet, [name])[name]
    network = contract(name, dims)
    traced, _ = (module, []) if precision == "fp32" else in_half(module, network, dims, precision)
    to_onnx(traced, network, dims, tmp_path / "model.onnx")
    engines: dict[str, Engine] = {"onnxruntime": OrtEngine(network, tmp_path / "model.onnx")}
    if precision == "fp32":
        to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
        one_size = {symbol: (size, size, size) for symbol, size in {"batch": 2, "height": 12, "width": 16}.items()}
        engines["openvino"] = OvEngine(network, tmp_path / "model.xml")
        engines["openvino, one size fixed"] = OvEngine(network, tmp_path / "model.xml", [one_size])
    for rows, height, width in ((1, 8, 8), (2, 12, 16), (3, 8, 4)):  # of one graph, whose sizes are free
        given = small(network, dims, rows, height, width)
        for (backend, engine), size in itertools.product(engines.items(), (1.0, 1e-6)):
            if "fixed" in backend and rows != 2:
                continue
            scaled = {**given, **{key: size * given[key] for key in ("cotangent", "cotangent_scale")}}
            got = engine.infer(**scaled)
            for spec, wanted in zip(network.outputs, module(*scaled.values()), strict=True):
                # Rounding gives 1e-6 to 1e-5 in fp32, some thousandths in fp16.
                assert error(got[spec.name], wanted) < TOLERANCES[precision], (backend, spec.name, rows, size)
