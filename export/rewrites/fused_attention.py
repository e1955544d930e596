"""Attention as one node, in the place of two products, a softmax and what moves the axes around them.

`com.microsoft.MultiHeadAttention` takes queries, keys and values as the linear layers give them, and computes block by
block: the table of weights, as large as the number of cells squared, is never whole in memory. The operator is ONNX
Runtime's own, so that the graph is no plain ONNX any more.
"""

from __future__ import annotations

from typing import Any

from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

__all__ = ["fused_attention"]

_DOMAIN = "com.microsoft"


def fused_attention(model: Any) -> int:
    """Replace each attention of `model` (onnx_ir) that has several heads and no mask.

    Returns:
        how many were replaced.
    """
    rule = RewriteRule(_pattern, _replacement, _fits, remove_nodes=False)  # parts of it may serve others, too
    hits = int(RewriteRuleSet([rule]).apply_to_model(model))
    if hits:
        model.opset_imports[_DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return hits


def _pattern(
    op: Any,
    q: Any,
    k: Any,
    v: Any,
    q_heads: Any,
    k_heads: Any,
    v_heads: Any,
    fold: Any,
    back: Any,
    out: Any,
    root: Any,
) -> Any:
    """softmax(root * q . (root * k)^T) . v over heads; q, k, v are [B, L, H * D]."""
    queries = op.Transpose(op.Reshape(q, q_heads), perm=[0, 2, 1, 3])
    keys = op.Transpose(op.Reshape(k, k_heads), perm=[0, 2, 1, 3])
    values = op.Transpose(op.Reshape(v, v_heads), perm=[0, 2, 1, 3])
    # The exporter swaps the last two of the keys' axes with all others folded into one.
    turned = op.Reshape(op.Transpose(op.Reshape(keys, fold), perm=[0, 2, 1]), back)
    weights = op.Softmax(op.MatMul(op.Mul(queries, root), op.Mul(turned, root)), axis=-1)
    return op.Reshape(op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3]), out)


def _fits(_: Any, q_heads: Any, root: Any, **__: Any) -> bool:
    heads = _heads(q_heads)
    # One wide head, as the VAE's, took half as long again as one node (512 wide, 1024 cells).
    return heads is not None and heads > 1 and root.const_value is not None and root.const_value.size == 1


def _replacement(op: Any, q: Any, k: Any, v: Any, q_heads: Any, root: Any, **_: Any) -> Any:
    scale = float(root.const_value.numpy().reshape(())) ** 2
    return op.MultiHeadAttention(q, k, v, num_heads=_heads(q_heads), scale=scale, _domain=_DOMAIN)


def _heads(shape: Any) -> int | None:
    """The third of the four sizes of `shape`, a constant or a Concat of single sizes, where it is known."""
    if shape.const_value is not None:
        sizes = shape.const_value.numpy()
        return int(sizes[2]) if sizes.size == 4 else None
    node = shape.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 4 or node.inputs[2].const_value is None:
        return None
    return int(node.inputs[2].const_value.numpy()[0])
