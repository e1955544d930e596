"""A linear layer on rows: torch's own form reads the sizes of what is not contiguous as numbers, and fixes them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: [..., in] -> [..., out] with `weight` [out, in]."""
    rows = x.reshape(-1, weight.shape[1])
    made = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return made.reshape(*x.shape[:-1], weight.shape[0])
