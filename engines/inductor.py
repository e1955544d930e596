"""AOTInductor: runs a package that torch compiled to native code ahead of time. No compiler is needed to run it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from engines import forks
from engines.base import Engine
from engines.contract import Axis, Network
from engines.errors import EngineError, InputError, reason
from engines.locks import ReadWriteLock
from engines.pt2 import Package, read_package
from engines.tf32 import no_tf32
from engines.variant import Bounds

__all__ = ["InductorEngine", "package_of"]

LOG = logging.getLogger("smooth_rt")
_TORCHS_LOG = logging.getLogger("torch._inductor.package.package")

GRAPHS = 8  # CUDA graphs kept, one for each shape; the one used longest ago goes first
_WARM_UP = 3  # runs before a CUDA graph is captured, as torch's documentation has it


def package_of(path: Path, index: int) -> Path:
    """The package of the bounds of that index: `model.pt2`, then `model-1.pt2`, `model-2.pt2` beside it."""
    return path if index == 0 else path.with_name(f"{path.stem}-{index}{path.suffix}")


class InductorEngine(Engine):
    """One .pt2 package. `infer` may be called from several threads; calls wait for each other.

    **A package holds native code, which runs from the moment it is loaded.** Open one only after its digest was
    compared with the manifest of a bundle that is trusted, as `engines.bundle` does; this class cannot tell good code
    from bad. What it refuses (another network, torch, processor or GPU) it refuses before any of the code is loaded.

    On a GPU the inputs are copied into buffers that stay, and each shape is captured as a CUDA graph at its first use.

    Args:
        network: the contract; the package must have been compiled for it.
        path: the .pt2 file of the first bounds; that of the next lies beside it, see `package_of`. Torch unpacks its
            library into a temporary folder (TMPDIR) for as long as the engine is open, so that folder must have room
            for the weights and allow execution.
        bounds: as in `Engine`; a package for each, opened at the first call that needs it.

    Raises:
        EngineError: the file is damaged or foreign, or was compiled for another network or machine.
    """

    backend: ClassVar[str] = "inductor"

    def __init__(self, network: Network, path: Path, bounds: Sequence[Bounds] = ()) -> None:
        super().__init__(network, bounds)
        self._path = path
        self._opened: dict[int, _Opened] = {}
        self._loading = ReadWriteLock()
        self._device = self._package(0).package.device

    @property
    def package(self) -> Package:
        """What the package of the first bounds says of itself."""
        return self._package(0).package

    def _package(self, index: int) -> _Opened:
        with self._loading.write():
            if index not in self._opened:
                self._opened[index] = self._open(package_of(self._path, index))
            return self._opened[index]

    def _open(self, path: Path) -> _Opened:
        package = read_package(path)
        fault = package.misfit(self.network)
        if fault is not None:
            raise EngineError(f"{path}: {fault}; rebuild on this machine")
        on_gpu = package.device == "cuda"
        # On a failure torch logs that the file is outdated, and tries again another way.
        _TORCHS_LOG.disabled = True
        try:
            # A CUDA graph cannot capture the events by which several threads would take turns.
            model = torch._inductor.aoti_load_package(str(path), run_single_threaded=on_gpu)
        except Exception as error:
            raise EngineError(f"{path}: inductor cannot open it ({reason(error)}); rebuild") from error
        finally:
            _TORCHS_LOG.disabled = False
        self.unchanged()
        # The loader itself: calling the model would parse its signature anew at each call.
        run = model.loader.run
        if not on_gpu:
            return _Opened(package, run)
        graphs = _Graphs(run)
        return _Opened(package, no_tf32()(graphs.run) if package.precision == "fp32" else graphs.run)

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        opened = self._package(profile or 0)
        self._check_bounds(inputs, opened.package)
        outputs = opened.run([inputs[spec.name] for spec in self.network.inputs])
        return {spec.name: output.contiguous() for spec, output in zip(self.network.outputs, outputs, strict=True)}

    def _check_bounds(self, inputs: dict[str, Tensor], package: Package) -> None:
        """The generated code checks no size: one that it was not compiled for would read past its buffers."""
        for spec in self.network.inputs:
            for size, axis in zip(inputs[spec.name].shape, spec.axes, strict=True):
                if not isinstance(axis, Axis):
                    continue
                low, high = package.bounds.get(axis.symbol, (1, None))
                got = size // axis.factor
                if got < low or (high is not None and got > high):
                    raise InputError(
                        f"{self.network.name}: {axis.symbol} is {got}, outside {low}..{high or 'any'} that the package "
                        "was compiled for; rebuild with wider bounds"
                    )

    def after_fork_impl(self) -> str:
        forks.abandon(self._opened)
        return forks.NO_OPENMP if self._device == "cpu" else forks.NO_CUDA

    def close_impl(self) -> None:
        """Free the libraries and what torch unpacked of them."""
        self._opened.clear()


@dataclass(frozen=True)
class _Opened:
    """A package that was loaded, and how to run it: inputs in the contract's order to outputs in that order."""

    package: Package
    run: Callable[[list[Tensor]], list[Tensor]]


class _Graphs:
    """Runs on the GPU: buffers that stay, one stream, a CUDA graph a shape."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # One pool for all: graphs run one at a time, and outputs leave the GPU before the next one runs.
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._captured: OrderedDict[tuple[torch.Size, ...], tuple[Any, list[Tensor], list[Tensor]]] = OrderedDict()
        self._capturing = True

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """CPU tensors in, fresh CPU tensors out."""
        with self._lock, torch.no_grad(), torch.cuda.stream(self._stream):
            shapes = tuple(tensor.shape for tensor in inputs)
            found = self._captured.get(shapes)
            if found is None and self._capturing:
                found = self._capture(shapes, inputs)
            if found is None:
                outputs = self._run([tensor.cuda(non_blocking=True) for tensor in inputs])
                return [output.cpu() for output in outputs]
            self._captured.move_to_end(shapes)
            graph, buffers, results = found
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            graph.replay()
            return [result.cpu() for result in results]

    def _capture(self, shapes: tuple[torch.Size, ...], inputs: list[Tensor]) -> Any:
        buffers = [tensor.cuda() for tensor in inputs]
        # Not inside the capture: an error of the package itself is the caller's to see.
        for _ in range(_WARM_UP):
            self._run(list(buffers))
        self._stream.synchronize()
        while len(self._captured) >= GRAPHS:
            self._captured.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                results = self._run(list(buffers))
        except RuntimeError as error:
            LOG.warning("inductor: no CUDA graph (%s); runs without", reason(error))
            self._capturing = False
            return None
        self._captured[shapes] = graph, buffers, results
        return self._captured[shapes]
