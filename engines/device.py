"""Calls of an engine on a device: one at a time, on one stream, through buffers that stay, a set of them a shape."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["SHAPES", "Held", "OnDevice"]

SHAPES = 8  # sets of buffers kept, one a shape; the one used longest ago goes first


class Held(Protocol):
    """What is kept for one shape: buffers on the device, bound by address, and a run over them.

    `lasting` ones are never dropped: a CUDA graph that the backend keeps reads and writes their addresses.
    """

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def outputs(self) -> Mapping[str, Tensor]: ...
    @property
    def lasting(self) -> bool: ...

    def replay(self) -> None:
        """Run on what the inputs' buffers hold, on the current stream."""


class OnDevice:
    """Runs what `prepare` makes of a shape, and keeps it for the next call of that shape.

    Args:
        device: torch's name of it: "cuda", or "cpu", which has no streams.
        prepare: from the index of the bounds and the inputs to what is kept for their shapes.

    Attributes: `stream` is the CUDA stream that all of it runs on, None on the CPU.
    """

    def __init__(self, device: str, prepare: Callable[[int | None, Mapping[str, Tensor]], Held]) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
        self._prepare = prepare
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[Any, ...], Held] = OrderedDict()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the device's stream; other threads wait."""
        current = torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()
        with self._lock, torch.no_grad(), current:
            yield

    def run(
        self, profile: int | None, inputs: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """CPU tensors in; fresh CPU tensors of `dtypes` out, which no later call writes over."""
        with self.turn():
            held = self._of(profile, inputs)
            for name, tensor in inputs.items():
                held.inputs[name].copy_(tensor, non_blocking=True)
            held.replay()
            # The copy waits for the stream.
            return {name: output.to(dtypes[name]).to("cpu", copy=True) for name, output in held.outputs.items()}

    def clear(self) -> None:
        """Let go of all that is kept."""
        self._held.clear()

    def _of(self, profile: int | None, inputs: Mapping[str, Tensor]) -> Held:
        key = (profile, *(tuple(tensor.shape) for tensor in inputs.values()))
        found = self._held.get(key)
        if found is None:
            passing = [old for old, held in self._held.items() if not held.lasting]
            for old in passing[: max(0, len(passing) - SHAPES + 1)]:
                del self._held[old]
            found = self._held[key] = self._prepare(profile, inputs)
        self._held.move_to_end(key)
        return found
