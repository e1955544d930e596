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

__all__ = ["HELD", "CachedRequest", "Rounds", "split"]

HELD = ("sample", "timestep")


class Rounds:
    """A compiled graph in two parts: one that depends on `HELD` alone and runs when they change, and the rest.

    Args:
        model: the graph, at a fixed size; it is used up.
        compiled: compiles a graph.
    """

    def __init__(self, model: Model, compiled: Callable[[Model], Any]) -> None:
        self._parts = [compiled(part) for part in split(model)]

    def create_infer_request(self) -> CachedRequest:
        """Make a request that caches the first part's outputs for itself."""
        first, rest = (part.create_infer_request() for part in self._parts)
        return CachedRequest(first, rest)


class CachedRequest:
    """An infer request of each part. It serves one call at a time."""

    def __init__(self, first: Any, rest: Any) -> None:
        self._first, self._rest = first, rest
        self._held: dict[str, Any] = {}
        # The second part reads the first one's outputs in place.
        for number, port in enumerate(first.model_outputs):
            rest.set_tensor(_between(number), first.get_tensor(port))

    def fits(self, arrays: Mapping[str, Any]) -> bool:
        """Check that the first part's outputs are those of these inputs."""
        return bool(self._held) and all(np.array_equal(arrays[name], self._held[name]) for name in HELD)

    def infer(self, arrays: Mapping[str, Any], **how: bool) -> Any:
        """Run on inputs by name, as `openvino.InferRequest.infer` does."""
        if not self.fits(arrays):
            held = {name: arrays[name] for name in HELD}
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
