"""What a backend holds for the sizes it was built for: a form of the graph for each fixed one, and one for the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.variant import Bounds

__all__ = ["Specialised", "one_size"]


class Specialised:
    """Forms of one graph, each opened when it is first needed.

    Args:
        bounds: of the engine.
        opener: opens the form of the sizes it is given, or the one of free sizes for None.
    """

    def __init__(self, bounds: Sequence[Bounds], opener: Callable[[Mapping[str, int] | None], Any]) -> None:
        self._fixed = [one_size(one) for one in bounds]
        self._opener = opener
        self._opened: dict[tuple[tuple[str, int], ...] | None, Any] = {}
        self._lock = threading.Lock()

    def any(self) -> Any:
        """The form that serves the first bounds: opening an engine opens it, so that a damaged file shows at once."""
        return self.of(0 if self._fixed else None)

    def of(self, profile: int | None) -> Any:
        """The form for the bounds of index `profile`."""
        sizes = None if profile is None else self._fixed[profile]
        key = None if sizes is None else tuple(sorted(sizes.items()))
        with self._lock:
            if key not in self._opened:
                self._opened[key] = self._opener(sizes)
            return self._opened[key]

    def clear(self) -> None:
        """Let go of all of them."""
        self._opened.clear()


def one_size(bounds: Bounds) -> dict[str, int] | None:
    """The size of each symbol where the bounds are of one size, else None."""
    if all(least == most for least, _, most in bounds.values()):
        return {symbol: least for symbol, (least, _, _) in bounds.items()}
    return None
