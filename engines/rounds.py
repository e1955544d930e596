"""Null-text inversion takes a step's gradients by the text at one latent, ten times over: what depends on no text, up
to the first cross-attention, is computed at the first of them and kept for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from openvino import Model
from openvino import opset13 as ops

from engines.halves import crossings, number_sizes

__all__ = ["HELD", "Rounds", "split"]

HELD = ("sample", "timestep")


class Rounds:
    """A graph in two: what follows from `HELD` alone, which is computed where they change, and the rest.

    Args:
        model: the graph, at a fixed size; it is used up.
        compiled: makes the infer request of a graph.
    """

    def __init__(self, model: Model, compiled: Callable[[Model], Any]) -> None:
        first, rest = split(model)
        self._first, self._rest = compiled(first), compiled(rest)
        self._held: dict[str, Any] = {}
        # What the one leaves lies where the other reads it.
        for number, port in enumerate(self._first.model_outputs):
            self._rest.set_tensor(_between(number), self._first.get_tensor(port))

    def infer(self, arrays: Mapping[str, Any], **how: bool) -> Any:
        """As of an infer request, by the names of the inputs."""
        held = {name: arrays[name] for name in HELD}
        if not self._held or not all(np.array_equal(held[name], self._held[name]) for name in HELD):
            self._held = {}  # where the computation fails, nothing is kept
            self._first.infer(held)
            self._held = {name: array.copy() for name, array in held.items()}
        return self._rest.infer({name: array for name, array in arrays.items() if name not in HELD}, **how)


def split(model: Model) -> tuple[Model, Model]:
    """A graph's part that follows from `HELD` alone, and the rest, which takes what the first leaves, in its order."""
    number_sizes(model)
    held = [node for node in model.get_parameters() if not node.output(0).get_names().isdisjoint(HELD)]
    others = [node for node in model.get_parameters() if node not in held]
    left: list[Any] = []
    taken: list[Any] = []
    for number, (port, targets) in enumerate(crossings(model, others)):
        between = ops.parameter(list(port.get_shape()), port.get_element_type(), _between(number))
        between.output(0).set_names({_between(number)})
        taken.append(between)
        left.append(ops.result(port))
        for target in targets:
            target.replace_source_output(between.output(0))
    return Model(left, held, "first"), Model(model.get_results(), [*taken, *others], model.get_friendly_name())


def _between(number: int) -> str:
    return f"between_{number}"
