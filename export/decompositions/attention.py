"""Attention in its mathematical form: the derivative of the fused kernel for CPUs, traced, gave silently wrong
gradients, and torch's own mathematical form spends four passes on rows that are masked as a whole."""

from __future__ import annotations

from torch import Tensor

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(scale * query @ key.T) @ value`: [..., L, E], [..., S, E], [..., S, V] -> [..., L, V].

    Raises:
        NotImplementedError: a mask, dropout or grouped heads, which a UNet's attention does not have.
    """
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("attention with a mask, dropout or grouped heads has no gradient rule")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # The smaller of the two is scaled, not their product.
    return ((query * factor) @ key.transpose(-2, -1)).softmax(-1) @ value
