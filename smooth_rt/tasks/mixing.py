"""Between two tensors: along the sphere and along the line."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lerp", "slerp"]

NEARLY_PARALLEL = 0.9995


def slerp(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of two tensors taken as flat vectors, computed in float64.

        sin((1 - alpha) * theta) / sin(theta) * start + sin(alpha * theta) / sin(theta) * end

    theta is the angle between them. Where |cos(theta)| > 0.9995, or one of them is zero, the line is taken instead.

    Args:
        start: any shape.
        end: the shape of `start`.
        alpha: 0 gives `start`, 1 gives `end`.

    Returns:
        The shape and dtype of `start`.
    """
    a, b = start.double().flatten(), end.double().flatten()
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    if not abs(cosine) <= NEARLY_PARALLEL:  # so written that NaN, from a zero vector, takes the line too
        mixed = lerp(a, b, alpha)
    else:
        theta = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
        mixed = (torch.sin((1 - alpha) * theta) * a + torch.sin(alpha * theta) * b) / torch.sin(theta)
    return mixed.reshape(start.shape).to(start.dtype)


def lerp(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) * start + alpha * end`."""
    return (1 - alpha) * start + alpha * end
