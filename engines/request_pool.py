"""Infer requests of one compiled OpenVINO graph, so that several threads may run it at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["RequestPool"]


class RequestPool:
    """Run a compiled graph, with one infer request per call that runs.

    An infer request holds the inputs and outputs of one call; a second thread that used it at that time would read the
    first one's outputs. A request is cheap: what a graph computes in belongs to the compiled graph.

    Args:
        compiled: makes requests by `create_infer_request()`, as `openvino.CompiledModel` does. If its requests have a
            method `fits(arrays)`, a call takes the first free one that fits, such as one that cached its inputs.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._free: list[Any] = [compiled.create_infer_request()]
        self._lock = threading.Lock()

    def infer(self, arrays: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Return the outputs of these names as arrays of their own, by name."""
        request = self._take(arrays)
        # Outputs are copied out of the request before another call gets it.
        results = request.infer(arrays, share_inputs=True, share_outputs=False)
        found = {name: results[name] for name in outputs}
        with self._lock:  # a request that failed is given up
            self._free.append(request)
        return found

    def _take(self, arrays: Mapping[str, Any]) -> Any:
        with self._lock:
            fitting = (i for i, request in enumerate(self._free) if hasattr(request, "fits") and request.fits(arrays))
            if self._free:
                return self._free.pop(next(fitting, -1))
        return self._compiled.create_infer_request()
