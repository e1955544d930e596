"""One operator of a gradient graph a file, written out in operators that every backend computes, and computes rightly.

`WRITTEN_OUT` are operators of the forward pass in a form that can be traced with free sizes and whose derivative is
made of plain operators; the derivative follows by autograd. `RULES` are what is put, in the traced graph, in the place
of operators that have no form of their own in ONNX, or one that a backend has wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from export.decompositions.attention import attention
from export.decompositions.convolution_backward import convolution_backward
from export.decompositions.group_norm import group_norm, group_norm_backward
from export.decompositions.layer_norm import layer_norm, layer_norm_backward
from export.decompositions.linear import linear
from export.decompositions.squeeze import squeeze
from export.decompositions.upsample_nearest import upsample_nearest

__all__ = ["RULES", "WRITTEN_OUT"]

_aten: Any = torch.ops.aten
WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    _aten.linear.default: linear,
    _aten.scaled_dot_product_attention.default: attention,
    _aten.upsample_nearest2d.vec: upsample_nearest,
}
RULES: dict[Any, Callable[..., Any]] = {
    _aten.convolution_backward.default: convolution_backward,
    _aten.native_group_norm.default: group_norm,
    _aten.native_group_norm_backward.default: group_norm_backward,
    _aten.native_layer_norm.default: layer_norm,
    _aten.native_layer_norm_backward.default: layer_norm_backward,
    _aten.squeeze.dims: squeeze,
}
