"""FLOPs against hand-computed values; the matrix rate's own honesty check."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.floor import _check_fp32, count_flop, floor_seconds, matrix_rates
from bench.results import MatrixRate
from smooth_rt.errors import EngineError


def test_flop_of_a_linear_layer() -> None:
    assert count_flop(nn.Linear(5, 7), [torch.randn(3, 5)]) == 2 * 3 * 5 * 7


def test_flop_of_a_convolution() -> None:
    # 2 images, 8x8 places each, 4 filters of 3 channels x 3 x 3.
    assert count_flop(nn.Conv2d(3, 4, 3, padding=1), [torch.randn(2, 3, 8, 8)]) == 2 * (2 * 64) * 4 * 27


def test_flop_of_a_strided_convolution() -> None:
    assert count_flop(nn.Conv2d(3, 4, 3, stride=2, padding=1), [torch.randn(1, 3, 8, 8)]) == 2 * 16 * 4 * 27


def test_attention_is_counted_as_two_matrix_products() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 10, 8)
    assert count_flop(Attention(), [q, k]) == 2 * (2 * 2 * 16 * 10 * 8)


def test_floor_is_flop_over_rate() -> None:
    assert floor_seconds(3_000_000_000, MatrixRate(library="x", side=1, gflop_per_s=1.5)) == pytest.approx(2.0)


def test_every_library_is_measured() -> None:
    rates = matrix_rates(side=64, repeats=1)
    assert [rate.library.split()[0] for rate in rates] == ["torch", "numpy", "openvino"]
    assert all(rate.side == 64 and rate.gflop_per_s > 0 for rate in rates)


def test_a_product_in_bf16_does_not_pass_for_fp32() -> None:
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((32, 32), dtype=np.float32) for _ in range(2))

    def rounded() -> np.ndarray:
        return (torch.from_numpy(a).bfloat16() @ torch.from_numpy(b).bfloat16()).float().numpy()

    _check_fp32({"exact": lambda: a @ b}, a, b)
    with pytest.raises(EngineError, match=r"^rounded: .* fewer bits"):
        _check_fp32({"rounded": rounded}, a, b)
