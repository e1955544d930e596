"""Attention by this project's own kernel in an OpenVINO graph (engines/native/attention.hpp).

OpenVINO's writes a row of scores for every query: 4096 numbers for Stable Diffusion's 512 px. Measured on SD1.5's UNet
(docs/experiments/native-kernels.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import opset13 as ops

from engines import kernels

__all__ = ["native_attention"]

# With fewer keys, such as the tokens of a prompt, OpenVINO's own is as fast.
LEAST_KEYS = 256
_HEADS_FIRST = [0, 2, 1, 3]  # [batch, tokens, heads, width] -> [batch, heads, tokens, width], and back


def native_attention(model: Any, bf16: bool) -> int:
    """Replace attention in `model` (openvino.Model), in place, where keys are many or of no fixed number.

    Args:
        bf16: whether products are formed in bf16, where the processor can.

    Returns:
        how many.

    Raises:
        EngineError: the kernels cannot be compiled here.
    """
    hits = 0
    for node in model.get_ordered_ops():
        scale = _scale(node)
        if scale is None:
            continue
        inputs = [_tokens_first(node.input_value(index)) for index in range(3)]
        fresh = kernels.operations().create("Attention", inputs, {"scale": scale, "bf16": bf16})
        fresh.set_friendly_name(node.get_friendly_name())
        _replace(node.output(0), fresh.output(0))
        hits += 1
    if hits:
        model.validate_nodes_and_infer_types()
    return hits


def _scale(node: Any) -> float | None:
    """What scores are multiplied by, of a node that shall be replaced; else None."""
    if node.get_type_name() != "ScaledDotProductAttention" or node.get_attributes().get("causal"):
        return None
    query, keys = node.input_value(0).get_partial_shape(), node.input_value(1).get_partial_shape()
    if len(query) != 4 or query[3].is_dynamic or query[3].get_length() > kernels.WIDEST:
        return None
    if not keys[2].is_dynamic and keys[2].get_length() < LEAST_KEYS:
        return None
    if node.get_input_size() == 3:
        return float(query[3].get_length() ** -0.5)
    mask = node.input_value(3).get_node()
    if mask.get_type_name() != "Constant" or np.any(mask.data):
        return None
    if node.get_input_size() == 4:
        return float(query[3].get_length() ** -0.5)
    given = node.input_value(4).get_node()
    return float(given.data.item()) if given.get_type_name() == "Constant" else None


def _tokens_first(output: Any) -> Any:
    """The tensor as [batch, tokens, heads, width]: mostly it was turned from that just before."""
    node = output.get_node()
    if _turns(node):
        return node.input_value(0)
    return ops.transpose(output, ops.constant(np.array(_HEADS_FIRST))).output(0)


def _replace(old: Any, fresh: Any) -> None:
    """Let those who read `old` read `fresh`, which has tokens first."""
    turned = None
    for target in list(old.get_target_inputs()):
        reader = target.get_node()
        if _turns(reader):
            for further in list(reader.output(0).get_target_inputs()):
                further.replace_source_output(fresh)
            continue
        if turned is None:
            turned = ops.transpose(fresh, ops.constant(np.array(_HEADS_FIRST))).output(0)
        target.replace_source_output(turned)


def _turns(node: Any) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    order = node.input_value(1).get_node()
    return order.get_type_name() == "Constant" and list(order.data) == _HEADS_FIRST
