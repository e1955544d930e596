"""What depends on the text alone as a graph of its own: the keys and values that cross-attention takes from it.

They are the same at every step of a sampling, so whoever runs the graphs computes them once for a text, and the graph
that runs at each step takes them as inputs in its place. They are found by what they follow from, not by their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["text_apart"]

_TEXT = "encoder_hidden_states"


def text_apart(model: Any) -> tuple[Any, int]:
    """Cut `model` (onnx_ir) where what follows from the text meets what follows from the latent or the timestep.

    `model` is changed: inputs in the place of the text, of the same names as the other graph's outputs.

    Returns:
        the graph of the text, and how many outputs it has; if they are 0, `model` is as it was, and the graph None.
    """
    cut = _cut(model.graph)
    if not cut:
        return None, 0
    text = model.clone()
    outputs = {output.name: output for node in text.graph for output in node.outputs}
    text.graph.outputs[:] = [outputs[value.name] for value in cut]
    for value in cut:
        taken = onnx_ir.Value(name=value.name, type=value.type, shape=_shape(value))
        value.replace_all_uses_with(taken)
        model.graph.inputs.append(taken)
        value.name = f"{value.name}.apart"  # gone in a moment
    for one in (model, text):
        RemoveUnusedNodesPass()(one)
        _drop_inputs(one.graph)
    return text, len(cut)


def _cut(graph: Any) -> list[Any]:
    """The values that follow from the text and from nothing else, and that others take."""
    follows: dict[Any, frozenset[str]] = {value: frozenset([value.name]) for value in graph.inputs}
    mine = []
    for node in graph:
        sources = frozenset[str]().union(*(follows[value] for value in node.inputs if value in follows))
        follows.update(dict.fromkeys(node.outputs, sources))
        if sources == {_TEXT}:
            mine.append(node)
    own = set(mine)
    return [value for node in mine for value in node.outputs if _taken(value.uses(), own) or value.is_graph_output()]


def _taken(uses: Iterable[Any], own: set[Any]) -> bool:
    return any(use.node not in own for use in uses)


def _shape(value: Any) -> Any:
    """The batch by its name in the contract, and the sizes that are numbers: others have names of the graph's own."""
    if value.shape is None:
        return None
    first, *rest = value.shape
    sizes = [size if isinstance(size, int) else None for size in rest]
    return onnx_ir.Shape([first if isinstance(first, int) else "batch", *sizes])


def _drop_inputs(graph: Any) -> None:
    graph.inputs[:] = [value for value in graph.inputs if list(value.uses())]
