"""Kernels of this project's own for OpenVINO: the numbers, and how they come to be compiled."""

from __future__ import annotations

import math
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from engines import kernels
from engines.errors import EngineError
from engines.ov import core

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


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without kernels."""
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    kernels.library.cache_clear()
    return tmp_path / "kernels"


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(EngineError, match=r"none of c\+\+.* is installed; install g\+\+"):
        kernels.library()
    monkeypatch.setenv("CXX", "g++-of-nowhere")
    with pytest.raises(EngineError, match=r"CXX=g\+\+-of-nowhere is no program"):
        kernels.library()
    assert not fresh.exists()


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EngineError, match=r"broken fails \(x.cpp:1: error: no such thing\); set CXX"):
        kernels.library()
    assert list(fresh.iterdir()) == []


def test_a_cache_that_takes_no_file(monkeypatch: pytest.MonkeyPatch, own_kernels: Path) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", "/proc/none")
    kernels.library.cache_clear()
    with pytest.raises(EngineError, match="set SMOOTH_RT_CACHE to a folder"):
        kernels.library()


def test_other_sources_are_other_kernels(
    fresh: Path, own_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernels._digest("c++")
    shutil.copytree(kernels.SOURCES, tmp_path / "native")
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "native")
    assert kernels._digest("c++") == before
    with (tmp_path / "native" / "vector.hpp").open("a") as source:
        source.write("// more\n")
    assert kernels._digest("c++") != before


def _compiled(_: int) -> str:
    return str(kernels.library())


def test_processes_that_compile_at_the_same_time(fresh: Path, own_kernels: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = set(pool.map(_compiled, range(2), chunksize=1))
    assert len(found) == 1
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
