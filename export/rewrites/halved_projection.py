"""GEGLU's projection as two linear layers in an OpenVINO graph, where the exporter computes one and cuts its result.

The cut is a copy of the largest tensor of a transformer block: a fiftieth of a call of SD1.5's UNet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import opset13 as ops

__all__ = ["halved_projection"]


def halved_projection(model: Any) -> int:
    """Cut the weights in two, in place of the result, wherever `model` (openvino.Model) cuts that of a linear layer.

    Returns:
        how many layers were cut.
    """
    hits = 0
    for node in model.get_ordered_ops():
        found = _layer(node)
        if found is None:
            continue
        product, weight, bias = found
        turned = bool(product.get_attributes().get("transpose_b"))
        name = product.get_friendly_name()
        parts = zip(_halves(weight, 0 if turned else 1), _halves(bias, -1), strict=True)
        for index, (part, offset) in enumerate(parts):
            layer = ops.matmul(product.input_value(0), _constant(part), False, turned)
            layer.set_friendly_name(f"{name}_{index}")
            fresh = ops.add(layer, _constant(offset)).output(0)
            for target in list(node.output(index).get_target_inputs()):
                target.replace_source_output(fresh)
        hits += 1
    if hits:
        model.validate_nodes_and_infer_types()
    return hits


def _layer(node: Any) -> tuple[Any, NDArray[np.float32], NDArray[np.float32]] | None:
    """The product, weight [in, out] or [out, in] and bias whose sum `node` cuts in two along the last axis, or None."""
    if node.get_type_name() not in ("Split", "VariadicSplit") or len(node.outputs()) != 2:
        return None
    rank = node.input_value(0).get_partial_shape().rank
    axis = node.input_value(1).get_node()
    if rank.is_dynamic or axis.get_type_name() != "Constant" or axis.data.item() not in (-1, rank.get_length() - 1):
        return None
    left, right = (output.get_partial_shape()[rank.get_length() - 1] for output in node.outputs())
    summed = node.input_value(0).get_node()
    if left != right or left.is_dynamic or summed.get_type_name() != "Add" or not _once(summed):
        return None
    one, other = (summed.input_value(index).get_node() for index in range(2))
    product, bias = (one, other) if one.get_type_name() == "MatMul" else (other, one)
    if product.get_type_name() != "MatMul" or product.get_attributes().get("transpose_a") or not _once(product):
        return None
    weight = product.input_value(1).get_node()
    if any(part.get_type_name() != "Constant" for part in (weight, bias)) or weight.data.ndim != 2:
        return None
    return product, weight.data, bias.data


def _once(node: Any) -> bool:
    """Whether one node alone reads its result."""
    return len(node.output(0).get_target_inputs()) == 1


def _halves(values: NDArray[np.float32], axis: int) -> list[NDArray[np.float32]]:
    return [part.copy() for part in np.split(values, 2, axis)]


def _constant(values: NDArray[np.float32]) -> Any:
    return ops.constant(values, shared_memory=True)
