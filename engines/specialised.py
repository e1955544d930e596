"""What a backend holds for the sizes of its calls: a form of the graph for each fixed one, and one for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines import forks
from engines.locks import ReadWriteLock
from engines.variant import Bounds

__all__ = ["Specialised", "one_size"]

_Key = tuple[tuple[str, int], ...] | None  # sizes by symbol; None: free ones


class Specialised:
    """Forms of one graph, each opened when it is first needed. Serves several threads.

    Args:
        bounds: of the engine.
        opener: opens the form of the sizes it is given, or the one of free sizes for None.
        own: within bounds of free sizes, how many sizes get a form of their own: the first that calls come with.
    """

    def __init__(
        self, bounds: Sequence[Bounds], opener: Callable[[Mapping[str, int] | None], Any], own: int = 0
    ) -> None:
        self._fixed = [one_size(one) for one in bounds]
        self._opener = opener
        self._most = own
        self._own: set[_Key] = set()
        self._opened: dict[_Key, Any] = {}
        self._last: _Key = None
        self._lock = ReadWriteLock()

    def any(self) -> Any:
        """The form that serves the first bounds: opening an engine opens it, so that a damaged file shows at once."""
        return self.of(0 if self._fixed else None)

    def of(self, profile: int | None, sizes: Mapping[str, int] | None = None) -> Any:
        """The form for the bounds of index `profile`, or one of its own for a call of `sizes` within them."""
        with self._lock.write():
            self._last = self._key(None if profile is None else self._fixed[profile], sizes)
            return self._form(self._last)

    def _key(self, fixed: Mapping[str, int] | None, sizes: Mapping[str, int] | None) -> _Key:
        if fixed is not None or sizes is None:
            return None if fixed is None else tuple(sorted(fixed.items()))
        asked = tuple(sorted(sizes.items()))
        if len(self._own) < self._most:
            self._own.add(asked)
        return asked if asked in self._own else None

    def _form(self, key: _Key) -> Any:
        if key not in self._opened:
            self._opened[key] = self._opener(None if key is None else dict(key))
        return self._opened[key]

    def drop(self, profile: int | None, sizes: Mapping[str, int]) -> None:
        """Let go of the form that a call of `sizes` would have, if it is one of fixed sizes."""
        with self._lock.write():
            key = self._key(None if profile is None else self._fixed[profile], sizes)
            if key is not None:
                self._opened.pop(key, None)

    def renew(self) -> None:
        """Let go of all of them, and open the one that was used last anew; sizes keep having forms of their own."""
        with self._lock.write():
            used = bool(self._opened)
            self._opened.clear()
            if used:
                self._form(self._last)

    def abandon(self) -> None:
        """Open all of them again, in a forked process; see `engines.forks`."""
        forks.abandon(self._opened)
        self._opened = {}

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock.write():
            self._opened.clear()


def one_size(bounds: Bounds) -> dict[str, int] | None:
    """The size of each symbol where the bounds are of one size, else None."""
    if all(least == most for least, _, most in bounds.values()):
        return {symbol: least for symbol, (least, _, _) in bounds.items()}
    return None
