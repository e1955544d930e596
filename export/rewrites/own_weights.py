"""Give transposed convolutions weights that OpenVINO cannot take for those of a convolution.

The gradient of a convolution with a stride is a transposed convolution by the same weights. OpenVINO's CPU plugin packs
weights for each and keeps what it packed under the address of the constant and the layout that was wanted, but not the
one it came from. A convolution reads the constant as [out, in, kh, kw] and a transposed one as [in, out, kh, kw], so
that with as many channels in as out both want one layout, and whichever comes second is given the weights packed for
the first: it computes with its channels exchanged (docs/upstream/openvino-shared-weights.md).

A copy does not help. A saved IR holds equal constants once, so that they have one address again. The weights are
therefore negated, and so is what they are multiplied with, which changes no bit of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["own_weights"]

_TRANSPOSED = "ConvolutionBackpropData"
_PLAIN = "Convolution"
_WEIGHTS = 1  # the input that holds them


def own_weights(model: Any) -> int:
    """Negate the weights, and the input, of each transposed convolution whose weights a convolution has as well.

    Args:
        model: an openvino.Model; it is changed.

    Returns:
        how many were changed.
    """
    from openvino import opset13 as ops

    layers = [(node, node.input_value(_WEIGHTS).get_node()) for node in model.get_ordered_ops() if _has_weights(node)]
    plain = [constant for node, constant in layers if node.get_type_name() == _PLAIN]
    hits = 0
    for node, constant in layers:
        if node.get_type_name() == _TRANSPOSED and any(_equal(constant, other) for other in plain):
            negated = ops.constant(np.negative(constant.get_data()), name=f"{constant.get_friendly_name()}.negated")
            node.input(_WEIGHTS).replace_source_output(negated.output(0))
            node.input(0).replace_source_output(ops.negative(node.input_value(0)).output(0))
            hits += 1
    return hits


def _has_weights(node: Any) -> bool:
    """Whether the node is one of the two kinds, its weights held in the graph."""
    return (
        node.get_type_name() in (_PLAIN, _TRANSPOSED)
        and node.input_value(_WEIGHTS).get_node().get_type_name() == "Constant"
    )


def _equal(one: Any, other: Any) -> bool:
    shape = list(one.get_output_shape(0))
    if shape != list(other.get_output_shape(0)) or shape[0] != shape[1]:
        return False
    return bool(np.array_equal(one.get_data(), other.get_data()))
