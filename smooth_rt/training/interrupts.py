"""What belongs together is done together, Ctrl-C or not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["undivided"]

HELD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def undivided() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block is done, then let them come as they would have.

    Only the main thread is ever interrupted, and only there does this do anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[signal.Signals, Callable[..., Any] | int] = {}
    try:
        for number in HELD:
            handler = signal.getsignal(number)
            if handler is not None:  # None: set by something that is not Python, and cannot be put back
                before[number] = handler
                signal.signal(number, lambda received, _: came.append(received))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for received in came:
        signal.raise_signal(received)
