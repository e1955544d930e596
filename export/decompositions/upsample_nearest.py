"""Nearest upsampling as repetition, so that its derivative is a sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["upsample_nearest"]


def upsample_nearest(x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None) -> Tensor:
    """[B, C, h, w] -> [B, C, fh*h, fw*w], each value repeated fh times down and fw times across.

    Raises:
        NotImplementedError: factors that are no whole numbers, or an output's size in their place.
    """
    if output_size is not None or scale_factors is None or any(factor != int(factor) for factor in scale_factors):
        raise NotImplementedError("upsampling to a size, or by a factor that is not whole, has no gradient rule")
    down, across = (int(factor) for factor in scale_factors)
    batch, channels, height, width = x.shape
    repeated = x[:, :, :, None, :, None].expand(batch, channels, height, down, width, across)
    return repeated.reshape(batch, channels, height * down, width * across)
