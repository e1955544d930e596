"""Group normalisation written out, and its gradient with respect to the input.

With `y = (x - mean) * rstd` over each group of N values, and `g` the gradient with respect to `y`:
`rstd * (g - mean(g) - y * mean(g * y))`. Half precision is computed in fp32, as torch does it: sums of
squares outgrow fp16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.decompositions.wide import wide

__all__ = ["group_norm", "group_norm_backward"]


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    inner: int,  # noqa: ARG001 - aten's signature
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, C, h, w] normalised over each of `groups` groups of channels; also their mean and 1/std, [B, groups]."""
    parts = wide(x).reshape(batch, groups, -1)
    mean = parts.mean(2, keepdim=True)
    centred = parts - mean
    rstd = torch.rsqrt((centred * centred).mean(2, keepdim=True) + eps)
    y = (centred * rstd).reshape(x.shape)
    if weight is not None:
        y = y * weight.reshape(channels, 1, 1)
    if bias is not None:
        y = y + bias.reshape(channels, 1, 1)
    return y.to(x.dtype), mean.reshape(batch, groups), rstd.reshape(batch, groups)


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    batch: int,
    channels: int,
    inner: int,  # noqa: ARG001 - aten's signature
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """The gradient with respect to `x`.

    Raises:
        NotImplementedError: with respect to the weight or the bias.
    """
    if output_mask[1] or output_mask[2]:
        raise NotImplementedError("a group norm's gradient is taken with respect to the input alone")
    if not output_mask[0]:
        return None, None, None
    weighted = wide(grad) if weight is None else wide(grad) * weight.reshape(channels, 1, 1)
    g = weighted.reshape(batch, groups, -1)
    scale = rstd.reshape(batch, groups, 1)
    y = (wide(x).reshape(batch, groups, -1) - mean.reshape(batch, groups, 1)) * scale
    made = (g - g.mean(2, keepdim=True) - y * (g * y).mean(2, keepdim=True)) * scale
    return made.reshape(x.shape).to(x.dtype), None, None
