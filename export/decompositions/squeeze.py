"""Axes of one element dropped, as a new shape: the exporter knows no more than one of them at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["squeeze"]


def squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    """`aten.squeeze.dims`: x [...] without those of `dims` that have one element."""
    among = {dim % x.ndim for dim in dims}
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in among or size != 1])
