"""Kernels of this project's own for OpenVINO: the numbers, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from engines import kernels
from engines.contract import Dims, contract
from engines.errors import EngineError, reason
from engines.ov import OvEngine, core

HALF = 2.0**-8  # a rounding to bf16


def attention(q: Tensor, k: Tensor, v: Tensor, bf16: bool, scale: float | None = None) -> Tensor:
    """By the kernel; [B, tokens, heads, width] each."""
    kernels.register(core())
    inputs = [ops.parameter(list(tensor.shape), np.float32) for tensor in (q, k, v)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    node = kernels.operations().create("Attention", [port.output(0) for port in inputs], {"scale": scale, "bf16": bf16})
    model = openvino.Model([ops.result(node.output(0))], inputs, "attention")
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"})
    return torch.from_numpy(compiled([q.numpy(), k.numpy(), v.numpy()])[0].copy())


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = [tensor.double().transpose(1, 2) for tensor in (q, k, v)]
    return nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def drawn(batch: int, queries: int, keys: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys + width)
    sizes = [(batch, count, heads, width) for count in (queries, keys, keys)]
    q, k, v = (torch.randn(size, generator=generator) for size in sizes)
    return q, k, v


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [
        (2, 256, 256, 8, 40),  # Stable Diffusion's widths
        (1, 96, 192, 2, 80),
        (1, 64, 64, 1, 160),
        (3, 49, 77, 2, 64),  # neither queries, keys nor widths fill their blocks
        (1, 1, 1, 1, 8),
        (1, 47, 65, 3, 44),
        (1, 5, 9, 1, 3),
        (1, 10, 130, 1, 256),
    ],
)
def test_attention(batch: int, queries: int, keys: int, heads: int, width: int) -> None:
    q, k, v = drawn(batch, queries, keys, heads, width)
    exact = wanted(q, k, v)
    assert (attention(q, k, v, bf16=False) - exact).norm() < 2e-6 * exact.norm()
    # Each of the products' factors is rounded once.
    assert (attention(q, k, v, bf16=True) - exact).norm() < 4 * HALF * exact.norm()


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("bf16", [False, True])
def test_scores_that_outgrow_the_exponential(bf16: bool) -> None:
    q, k, v = drawn(1, 64, 200, 2, 40)
    # Of some thousands: one key has all the weight, and e^score is out of reach of fp32.
    exact = wanted(300 * q, 300 * k, v)
    found = attention(300 * q, 300 * k, v, bf16)
    assert torch.isfinite(found).all()
    if not bf16:  # in which other keys win
        assert (found - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.usefixtures("own_kernels")
def test_scores_that_rise_from_block_to_block() -> None:
    q, k, v = drawn(1, 50, 500, 1, 16)
    q = q.abs()
    k = k.abs() * torch.linspace(-8, 8, 500)[:, None, None]
    exact = wanted(q, k, v)
    assert (attention(q, k, v, bf16=False) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_a_number_is_not_hidden(which: int, bf16: bool) -> None:
    tensors = drawn(1, 40, 70, 1, 16)
    tensors[which][0, 7, 0, 3] = math.nan
    found = attention(*tensors, bf16=bf16)
    if which == 0:
        assert torch.isnan(found[0, 7, 0]).all()
        assert torch.isfinite(found[0, :7]).all()
    else:
        assert torch.isnan(found[..., 3]).all()


@pytest.mark.usefixtures("own_kernels")
def test_only_attention_of_many_keys_is_replaced_and_nothing_else_changes() -> None:
    from export.rewrites.native import LEAST_KEYS, native_attention

    def model(keys: int) -> openvino.Model:
        sizes = [(1, 4, 60, 40), (1, 4, keys, 40), (1, 4, keys, 40)]
        inputs = [ops.parameter(list(size), np.float32) for size in sizes]
        node = ops.scaled_dot_product_attention(*inputs)
        return openvino.Model([ops.result(ops.relu(node))], inputs, "one")

    few, many = model(LEAST_KEYS - 1), model(LEAST_KEYS)
    assert native_attention(few, bf16=False) == 0
    generator = np.random.default_rng(0)
    feed = [generator.standard_normal(list(port.shape)).astype(np.float32) for port in many.inputs]
    before = core().compile_model(many, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)[0].copy()
    assert native_attention(many, bf16=False) == 1
    assert "ScaledDotProductAttention" not in [node.get_type_name() for node in many.get_ops()]
    after = core().compile_model(many, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)[0]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def opened(
    operation: str, shapes: list[list[int]], attributes: dict[str, Any], feed: list[list[int]] | None = None
) -> None:
    """Make a graph of one operation, and run it where it is given shapes for its inputs."""
    kernels.register(core())
    inputs = [ops.parameter(shape, np.float32) for shape in shapes]
    node = kernels.operations().create(operation, [port.output(0) for port in inputs], attributes)
    model = openvino.Model([ops.result(port) for port in node.outputs()], inputs, "one")
    compiled = core().compile_model(model, "CPU")
    if feed is not None:
        compiled([np.zeros(shape, dtype=np.float32) for shape in feed])


WIDE = {"matrix": [1.0] * 16, "rows": 4, "height": 16, "width": 16}  # of WinogradInput
BACK = {"matrix": [1.0] * 8, "rows": 2, "height": 16, "width": 16}  # of WinogradOutput
PICTURE, CELLS = [1, 2, 16, 16], [1, 8, 8, 2]
HEADS = {"scale": 1.0, "bf16": False}


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    ("operation", "shapes", "attributes", "fault"),
    [
        ("WinogradInput", [PICTURE], WIDE | {"height": 0}, "0x16 is not taken"),
        ("WinogradInput", [PICTURE], WIDE | {"height": -5}, "-5x16 is not taken"),
        ("WinogradInput", [PICTURE], WIDE | {"width": 2**62}, "is not taken"),
        ("WinogradInput", [PICTURE], WIDE | {"height": 15}, "WinogradInput takes one picture"),
        ("WinogradInput", [PICTURE], WIDE | {"height": 160}, "WinogradInput takes one picture"),
        ("WinogradInput", [[1, 2, 16]], WIDE, "WinogradInput takes one picture"),
        ("WinogradInput", [PICTURE, PICTURE], WIDE, "WinogradInput takes one picture"),
        ("WinogradInput", [PICTURE], WIDE | {"matrix": [1.0] * 15}, "matrix is not of 4 rows"),
        ("WinogradInput", [PICTURE], WIDE | {"matrix": [1.0] * 4, "rows": 2}, "square matrix of 3 rows or more"),
        ("WinogradInput", [PICTURE], WIDE | {"matrix": [1.0] * 8, "rows": 4}, "square matrix of 3 rows or more"),
        ("WinogradInput", [PICTURE], WIDE | {"rows": 0}, "matrix is not of 0 rows"),
        ("WinogradInput", [PICTURE], WIDE | {"matrix": [1.0] * 81, "rows": 9}, "tiles of at most 8"),
        ("WinogradOutput", [CELLS] * 15, BACK, "one input a cell"),
        ("WinogradOutput", [*[CELLS] * 15, [1, 8, 4, 2]], BACK, "WinogradOutput takes tiles"),
        ("WinogradOutput", [*[CELLS] * 15, [1, 8, 8, 1]], BACK, "WinogradOutput takes tiles"),
        ("WinogradOutput", [CELLS] * 16, BACK | {"height": 32}, "WinogradOutput takes tiles"),
        ("WinogradOutput", [CELLS] * 16, BACK | {"width": 0}, "16x0 is not taken"),
        ("WinogradOutput", [CELLS] * 4, BACK | {"matrix": [1.0] * 4}, "2 columns more than rows"),
        ("Attention", [[1, 4, 2, 8], [1, 4, 2, 8]], HEADS, "takes q, k and v"),
        ("Attention", [[1, 4, 2, 8], [1, 4, 2, 8], [1, 3, 2, 8]], HEADS, "k and v of one shape"),
        ("Attention", [[2, 4, 2, 8], [1, 4, 2, 8], [1, 4, 2, 8]], HEADS, "the batch, heads and width of q"),
        ("Attention", [[1, 4, 2, 8], [1, 4, 1, 8], [1, 4, 1, 8]], HEADS, "the batch, heads and width of q"),
        ("Attention", [[1, 4, 2, 8], [1, 4, 2, 4], [1, 4, 2, 4]], HEADS, "the batch, heads and width of q"),
        ("Attention", [[1, 4, 2, 300]] * 3, HEADS, "heads of at most 256"),
        ("Attention", [[1, 4, 8]] * 3, HEADS, "batch, tokens, heads, width"),
    ],
)
def test_a_graph_that_would_read_outside_its_tensors_is_refused(
    operation: str, shapes: list[list[int]], attributes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        opened(operation, shapes, attributes)
    assert fault in reason(caught.value, -1)  # the line that a message of this project repeats


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    ("operation", "free", "attributes", "feed"),
    [
        ("WinogradInput", [[-1, 2, -1, -1]], WIDE, [[1, 2, 8, 16]]),
        ("WinogradOutput", [[-1, -1, -1, 2]] * 16, BACK, [[1, 4, 8, 2]] * 16),
        ("Attention", [[-1, -1, 2, 8]] * 3, HEADS, [[2, 4, 2, 8], [1, 4, 2, 8], [1, 4, 2, 8]]),
        ("Attention", [[1, 4, -1, -1]] * 3, HEADS, [[1, 4, 1, 257]] * 3),
    ],
)
def test_sizes_that_stay_free_are_checked_at_the_call(
    operation: str, free: list[list[int]], attributes: dict[str, Any], feed: list[list[int]]
) -> None:
    opened(operation, free, attributes)
    with pytest.raises(RuntimeError, match=rf"{operation} takes .+"):
        opened(operation, free, attributes, feed)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('height="6"', 'height="0"', "0x6 is not taken"),
        ('height="6"', 'height="15"', "WinogradInput takes one picture"),
        ("matrix=", 'matrix="" was=', "matrix is not of 4 rows"),
        ('rows="4"', 'rows="2"', "square matrix of 3 rows or more"),
    ],
)
def test_an_engine_of_such_a_graph_is_refused_in_one_line(
    dims: Dims, tmp_path: Path, old: str, new: str, fault: str
) -> None:
    kept = Path(__file__).with_name("kernels.xml").read_text()
    assert old in kept
    path = tmp_path / "model.xml"
    path.write_text(kept.replace(old, new))
    with pytest.raises(EngineError) as caught:
        OvEngine(contract("vae_decoder", dims), path)
    assert str(caught.value).startswith(f"{path}: openvino cannot open it (")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
