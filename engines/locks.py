"""A lock that many readers share and one writer holds alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engines import forks

__all__ = ["ReadWriteLock"]


class ReadWriteLock:
    """Let calls run side by side, and let a change of what they run on wait until none does.

    A writer that waits goes before readers that come later, so that it waits for the running calls alone. A thread may
    take the lock again, in any order. One that reads and asks to write gives up its share while it waits, so another
    writer may come first; when it has written it reads on before any other writer writes. In a forked process the
    shares of threads that are not there are gone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._readers: dict[int, int] = {}  # shares by thread
        self._waiting_writers = 0
        self._writer: int | None = None
        self._depth = 0
        forks.watch(self)

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock together with other readers."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._readers and self._writer != me:
                while self._writer is not None or self._waiting_writers:
                    self._changed.wait()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone."""
        me = threading.get_ident()
        self._begin_writing(me)
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                self._changed.notify_all()

    def _begin_writing(self, me: int) -> None:
        with self._changed:
            if self._writer != me:
                shares = self._readers.pop(me, 0)
                self._waiting_writers += 1
                self._changed.notify_all()
                try:
                    while self._writer is not None or self._readers:
                        self._changed.wait()
                    self._writer = me
                finally:
                    self._waiting_writers -= 1
                    # Also where the wait was interrupted: the thread still gives these shares back.
                    if shares:
                        self._readers[me] = shares
                    self._changed.notify_all()
            self._depth += 1

    def after_fork(self) -> None:
        """Keep the shares of the one thread that there is; see `engines.forks`."""
        me = threading.get_ident()
        self._changed = threading.Condition(threading.Lock())
        self._readers = {thread: shares for thread, shares in self._readers.items() if thread == me}
        self._waiting_writers = 0
        if self._writer != me:
            self._writer, self._depth = None, 0
