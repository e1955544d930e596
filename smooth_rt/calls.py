"""Calls of a pipeline: each runs on one set of weights, whatever other threads set meanwhile.

A call is the outermost method of a pipeline that a thread is in, such as `generate`; the methods that it calls are
parts of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar

from engines.locks import ReadWriteLock
from engines.torch_modes import default_modes

if TYPE_CHECKING:
    from smooth_rt.networks import Networks

__all__ = ["Call", "Calls", "Weights", "one_call"]

P = ParamSpec("P")
T = TypeVar("T")
N = TypeVar("N", bound="Networks")


@dataclass(frozen=True)
class Weights:
    """The weights that a call runs on.

    Args:
        lora_strength: the strength of a LoRA that is set at run time; None if setting it failed, so that the weights
            are not known.
        digests: what distinguishes them from others, the LoRA and its strength included.
    """

    lora_strength: float | None
    digests: Mapping[str, str]


def _no_evaluations() -> dict[str, int]:
    return {"forward": 0, "gradient": 0}


@dataclass
class Call:
    """One call.

    Args:
        calls: those of the pipeline that it is a call of.
        weights: that it runs on. A call may change them itself, from a callback.
        outer: the call that it was made in, of another pipeline.
        evaluations: rows that went through the UNet in this call, by kind.
        ended: the call is over. A context that was copied in it, as asyncio does, still refers to it.
    """

    calls: Calls
    weights: Weights
    outer: Call | None
    evaluations: dict[str, int] = field(default_factory=_no_evaluations)
    ended: bool = False


_RUNNING: ContextVar[Call | None] = ContextVar("smooth_rt_call", default=None)


class Calls:
    """The calls of one pipeline, from any number of threads.

    Where the LoRA's strength is set by replacing the engine's weights, `exclusive` is True: `setting` then waits until
    no other call runs. Else the strength is an input of each call, and nothing waits.

    Attributes: `evaluations` counts the rows of all calls so far, by kind.
    """

    def __init__(self) -> None:
        self.evaluations = _no_evaluations()
        self._weights = Weights(1.0, {})
        self._running = ReadWriteLock()
        self._counting = ReadWriteLock()
        self._setting = ReadWriteLock()

    @property
    def weights(self) -> Weights:
        """Those of this thread's call; outside of a call, those that the next one gets."""
        call = self._current()
        return self._weights if call is None else call.weights

    @weights.setter
    def weights(self, value: Weights) -> None:
        self._weights = value
        call = self._current()
        if call is not None:
            call.weights = value

    @contextmanager
    def one(self, exclusive: bool) -> Iterator[Call]:
        """Run the body as one call, or as a part of the call that this thread is in."""
        call = self._current()
        if call is not None:
            with default_modes():  # a callback may have left them
                yield call
            return
        with default_modes(), self._running.read() if exclusive else nullcontext():
            call = Call(self, self._weights, _RUNNING.get())
            token = _RUNNING.set(call)
            try:
                yield call
            finally:
                call.ended = True
                _RUNNING.reset(token)

    @contextmanager
    def setting(self, exclusive: bool) -> Iterator[None]:
        """Change `weights` in the body, one thread at a time; see the class for `exclusive`."""
        with default_modes(), (self._running if exclusive else self._setting).write():
            yield

    def count(self, kind: Literal["forward", "gradient"], rows: int) -> None:
        """Count rows that went through the UNet."""
        call = self._current()
        with self._counting.write():
            self.evaluations[kind] += rows
            if call is not None:
                call.evaluations[kind] += rows

    def _current(self) -> Call | None:
        call = _RUNNING.get()
        while call is not None and (call.calls is not self or call.ended):
            call = call.outer
        return call


def one_call(method: Callable[Concatenate[N, P], T]) -> Callable[Concatenate[N, P], T]:
    """Make a method of a pipeline run as one call; see `Networks.call`."""

    @functools.wraps(method)
    def run(pipe: N, /, *args: P.args, **options: P.kwargs) -> T:
        with pipe.call():
            return method(pipe, *args, **options)

    return run
