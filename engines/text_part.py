"""The part of a network that depends on the text alone: run once for a text, not once for a step."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from engines.locks import ReadWriteLock
from engines.specialised import Specialised

__all__ = ["KEPT_BYTES", "TextPart"]

# Of results that are kept. A call of SD1.5 with four rows has 31 MB; one entry stays in any case.
KEPT_BYTES = 2**28

_Arrays = dict[str, np.ndarray]


class TextPart:
    """A graph of ONNX Runtime whose outputs another graph takes in the place of some of the network's inputs.

    Its results are kept by what its inputs hold, the latest that fit in `KEPT_BYTES`: images of several calls have
    texts of their own, which come again at the next step. Serves several threads.

    Args:
        sessions: of that graph.
        taken: the names of what the other graph takes.

    Attributes: `inputs` and `outputs` are the names of its tensors.
    """

    def __init__(self, sessions: Specialised, taken: Collection[str]) -> None:
        session = sessions.any()
        self.inputs = {value.name for value in session.get_inputs()}
        self.outputs = {value.name for value in session.get_outputs()}
        self._sessions = sessions
        self._taken = frozenset(taken)
        self._kept: OrderedDict[tuple[Any, ...], _Arrays] = OrderedDict()
        self._lock = ReadWriteLock()

    def put(self, given: Mapping[str, np.ndarray], profile: int | None) -> _Arrays:
        """`given`, by name, with what is made of the text in the text's place."""
        mine = {name: given[name] for name in sorted(self.inputs)}
        rest = {name: array for name, array in given.items() if name in self._taken}
        return rest | self._of(mine, profile)

    def _of(self, mine: _Arrays, profile: int | None) -> _Arrays:
        key = tuple((array.shape, hashlib.sha256(array.data).digest()) for array in mine.values())
        with self._lock.write():
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        names = sorted(self.outputs)
        found = dict(zip(names, self._sessions.of(profile).run(names, mine), strict=True))
        with self._lock.write():
            self._kept[key] = found
            while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return found

    def abandon(self) -> None:
        """Open the sessions again, in a forked process; see `engines.forks`."""
        self._sessions.abandon()

    def clear(self) -> None:
        """Let go of the sessions, and of what they gave."""
        with self._lock.write():
            self._kept.clear()
        self._sessions.clear()


def _size(arrays: _Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
