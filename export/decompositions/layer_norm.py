"""Layer normalisation written out with mean and rsqrt (TensorRT takes one output only from LayerNormalization), and its
gradient with respect to the input; the formula is that of `group_norm`, and so is fp32 within half precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.decompositions.wide import wide

__all__ = ["layer_norm", "layer_norm_backward"]


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` normalised over its last axes, those of `shape`; also mean and 1/std, of size 1 there."""
    axes = list(range(x.ndim - len(shape), x.ndim))
    mean = wide(x).mean(axes, keepdim=True)
    centred = wide(x) - mean
    rstd = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,  # noqa: ARG001 - aten's signature
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """The gradient with respect to `x`.

    Raises:
        NotImplementedError: with respect to the weight or the bias.
    """
    if output_mask[1] or output_mask[2]:
        raise NotImplementedError("a layer norm's gradient is taken with respect to the input alone")
    if not output_mask[0]:
        return None, None, None
    axes = list(range(x.ndim - len(shape), x.ndim))
    g = wide(grad) if weight is None else wide(grad) * weight
    y = (wide(x) - mean) * rstd
    made = (g - g.mean(axes, keepdim=True) - y * (g * y).mean(axes, keepdim=True)) * rstd
    return made.to(x.dtype), None, None
