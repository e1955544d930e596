"""Guidance calls the UNet with each image twice, and the two differ in their text alone: what does not depend on it, up
to the first cross-attention, is computed once for both. Of Stable Diffusion 1.5 that is a tenth of the attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from openvino import Model
from openvino import opset13 as ops
from torch import Tensor

from engines.contract import TEXT

__all__ = ["crossings", "first_half", "number_sizes", "shared"]


def first_half(inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The inputs that `shared` takes of a call, if its two halves [B / 2] differ in `TEXT` alone; else None."""
    rows = len(inputs[TEXT])
    rest = {name: tensor for name, tensor in inputs.items() if name != TEXT}
    if rows % 2 or not all(torch.equal(tensor[: rows // 2], tensor[rows // 2 :]) for tensor in rest.values()):
        return None
    return {name: tensor[: rows // 2] for name, tensor in rest.items()} | {TEXT: inputs[TEXT]}


def shared(half: Model, whole: Model) -> Model:
    """The graph of `whole`, in which what depends on no text is computed as in `half`, and put in each half's place.

    Args:
        half: the graph at the fixed size of half a call, and `whole` at that of the whole call. Both are used up.

    Returns:
        a graph that takes `TEXT` of the whole call and of everything else the first half.

    Raises:
        ValueError: something that is shared is neither as large as in `half` nor twice as many rows of it.
    """
    for graph in (half, whole):
        number_sizes(graph)
    once = {node.get_friendly_name(): node for node in half.get_ordered_ops()}
    for port, targets in crossings(whole, [_input(whole, TEXT)]):
        source = _twice(once[port.get_node().get_friendly_name()].output(port.get_index()), port)
        for target in targets:
            target.replace_source_output(source)
    inputs = [one for one in half.get_parameters() if TEXT not in one.output(0).get_names()]
    return Model(whole.get_results(), [*inputs, _input(whole, TEXT)], whole.get_friendly_name())


def _input(graph: Model, name: str) -> Any:
    return graph.input(name).get_node()


def number_sizes(graph: Model) -> None:
    """Sizes that are read off a tensor become numbers: such a tensor may be of the other part of a graph."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ShapeOf":
            size = np.array(node.input_value(0).get_shape(), node.get_output_element_type(0).to_dtype())
            number = ops.constant(size).output(0)
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(number)


def crossings(graph: Model, parameters: list[Any]) -> list[tuple[Any, list[Any]]]:
    """What depends on inputs, but on none of `parameters`, and is taken where one of them matters: each such output, in
    the graph's order, and those who take it there."""
    apart, varying = _reached(parameters), _reached(graph.get_parameters())
    found = []
    for node in graph.get_ordered_ops():
        if node.get_friendly_name() in apart or node.get_friendly_name() not in varying:
            continue
        for port in node.outputs():
            targets = [one for one in port.get_target_inputs() if one.get_node().get_friendly_name() in apart]
            if targets:
                found.append((port, targets))
    return found


def _reached(parameters: list[Any]) -> Set[str]:
    """The names of all nodes that depend on one of `parameters`."""
    found = set()
    left = list(parameters)
    while left:
        node = left.pop()
        if node.get_friendly_name() not in found:
            found.add(node.get_friendly_name())
            left += [target.get_node() for port in node.outputs() for target in port.get_target_inputs()]
    return found


def _twice(one: Any, both: Any) -> Any:
    size, wanted = list(one.get_shape()), list(both.get_shape())
    if size == wanted:
        return one
    if wanted != [2 * size[0], *size[1:]]:
        raise ValueError(f"{one.get_node().get_friendly_name()} is {size} for half of the rows and {wanted} for all")
    return ops.concat([one, one], 0).output(0)
