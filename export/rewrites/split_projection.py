"""GEGLU's projection as two linear layers, where the exporter computes one and cuts the result in two.

The cut is a copy of the largest tensor of a transformer block, and a layer of its own lets ONNX Runtime add the bias
within the GELU. The weight stays whole in the graph and keeps its name, so that another can be put in its place: ONNX
Runtime cuts it as it opens the graph.
"""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import RewriteRule, RewriteRuleSet

__all__ = ["split_projection"]


def split_projection(model: Any) -> int:
    """Cut the weights in two, in place of the result, wherever `model` (onnx_ir) cuts that of a linear layer.

    Returns:
        how many layers were cut.
    """
    return int(RewriteRuleSet([RewriteRule(_pattern, _replacement, _fits)]).apply_to_model(model))


def _pattern(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    result = op.Add(op.MatMul(x, weight), bias)
    return op.Split(result, num_outputs=2, _outputs=["left", "right"], _allow_other_attributes=True)


def _fits(_: Any, weight: Any, bias: Any, left: Any, **__: Any) -> bool:
    node = left.producer()
    if weight.const_value is None or bias.const_value is None or weight.const_value.shape.rank() != 2:
        return False
    rank = None if left.shape is None else left.shape.rank()
    axis = node.attributes.get_int("axis", 0)
    return rank is not None and axis in (-1, rank - 1) and weight.const_value.shape[1] % 2 == 0


def _replacement(op: Any, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
    weights = op.Split(weight, num_outputs=2, axis=1, _outputs=2)
    biases = op.Split(bias, num_outputs=2, axis=0, _outputs=2)
    return tuple(op.Add(op.MatMul(x, w), b) for w, b in zip(weights, biases, strict=True))
