"""Run on in a process that was forked from one where engines were in use.

A fork copies the calling thread alone. What waits for the other threads then waits for ever: torch's OpenMP threads, a
session's thread pool, a lock that another thread held. So each engine starts afresh in the child, what it had opened is
never freed there, and torch computes on one thread, as in the workers of its DataLoader.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["NO_CUDA", "NO_OPENMP", "abandon", "no_fork", "settle", "threads", "watch"]

NO_CUDA = (
    "opened before this process was forked, and CUDA does not run in a forked process; start processes by "
    "multiprocessing's method 'spawn', or open the engine after the fork"
)
NO_OPENMP = (
    "opened before this process was forked, and its OpenMP threads are not there; start processes by multiprocessing's "
    "method 'spawn', or use the engine openvino or onnxruntime"
)

LOG = logging.getLogger("smooth_rt")


class _Forkable(Protocol):
    def after_fork(self) -> None:
        """Replace locks and thread pools; called in the child, before any other code of it runs."""


_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()
_THREADS: int | None = None  # torch's number of them, once it may have started them
_in_child = False
_to_settle = False
_FORKING = threading.RLock()  # held during a fork, and by code that a fork must not divide


def watch(owner: _Forkable) -> None:
    """Have `owner.after_fork()` called in each process that is forked from this one."""
    _WATCHED.add(owner)


def abandon(value: Any) -> None:
    """Keep an object for ever: freeing it would wait for threads that are not there."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def settle() -> None:
    """Note that torch is used from now on; in a forked process, have it compute on one thread.

    Code that computes calls it first.
    """
    global _THREADS, _to_settle
    if _to_settle:
        import torch

        _to_settle = False
        if _THREADS is None:
            _THREADS = torch.get_num_threads()
        torch.set_num_threads(1)
        LOG.warning(
            "this process was forked after torch was loaded, so torch computes on one thread here, and last bits may "
            "differ; start processes by multiprocessing's method 'spawn' to use more"
        )
    elif not _in_child:
        import torch

        _THREADS = torch.get_num_threads()


def threads() -> int:
    """The number of threads for an engine that has its own: torch's, or in a forked process its parent's."""
    import torch

    return _THREADS if _in_child and _THREADS is not None else torch.get_num_threads()


@contextmanager
def no_fork() -> Iterator[None]:
    """Delay forks by other threads until the body ends: a lock that it holds would never be released in a child."""
    with _FORKING:
        yield


def _after_fork() -> None:
    global _in_child, _to_settle
    _FORKING.release()
    if "torch" not in sys.modules:
        return
    # Nothing tells if torch's threads were started, so they count as started.
    _in_child = _to_settle = True
    for owner in list(_WATCHED):
        owner.after_fork()


os.register_at_fork(before=_FORKING.acquire, after_in_parent=_FORKING.release, after_in_child=_after_fork)
