"""ONNX graph -> TensorRT engine, by TensorRT or by TensorRT for RTX: one API, two modules.

Neither needs a GPU to build for RTX: an engine is built ahead of time for the architectures that are named, or, with
none named, for every one that TensorRT for RTX supports. An engine of TensorRT itself is built on the GPU that runs it.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.contract import Network
from engines.errors import EngineError, InputError, reason
from engines.rtx import architectures
from engines.select import PORTABLE, gpu
from engines.trt_cache import keep, kept
from engines.trt_log import quiet_log
from engines.variant import Bounds

__all__ = ["MODULES", "BuildFacts", "capabilities", "to_tensorrt"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
POLL_S = 0.1
# Called with what is being done, and how much of it: the fraction is that of the phase named.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildFacts:
    """What a build tells of itself: the network's layers, the engine's bytes, the time, and the GPUs it is for."""

    layers: int
    bytes: int
    seconds: float
    capabilities: tuple[str, ...]
    refittable: int

    def notes(self) -> dict[str, int | str | list[str]]:
        """For the manifest."""
        return {"layers": self.layers, "capabilities": list(self.capabilities), "refittable": self.refittable}


def capabilities(backend: str, architecture: str) -> list[Any]:
    """TensorRT's names for the architectures in "sm80,sm89"; none for "rtx", the portable engine.

    Raises:
        InputError: one is not of the form sm89, or the backend builds none for it.
        EngineError: the backend's module does not load.
    """
    if architecture == PORTABLE:
        return []
    trt = _module(backend)
    known = architectures()
    found = []
    for name in architecture.split(","):
        if name.strip() not in known:
            raise InputError(
                f"gpu_arch={name.strip()}: {backend} {trt.__version__} builds ahead of time for {', '.join(known)}; "
                "leave --gpu-arch out for an engine that all of these take"
            )
        found.append(known[name.strip()])
    return found


def to_tensorrt(
    onnx: Path,
    path: Path,
    network: Network,
    bounds: Sequence[Bounds],
    *,
    backend: str,
    architecture: str,
    refittable: Sequence[str] = (),
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> BuildFacts:
    """Build `path` from the graph at `onnx`, whose weights lie beside it.

    Ctrl-C stops the build at its next step. The file appears whole or not at all.

    Args:
        onnx: the graph, in the precision that the engine shall compute in: both builders are strongly typed.
        path: of the engine.
        network: the contract.
        bounds: one optimization profile each; every symbol has an end.
        backend: "tensorrt" or "tensorrt-rtx".
        architecture: "sm80,sm89", ahead of time and for RTX alone; "rtx" for every GPU that RTX supports; for
            TensorRT itself, the GPU at hand.
        refittable: names of initializers whose values can be replaced in the built engine.
        timing_cache: TensorRT's own, kept between builds; read, and written if it grew.
        progress: called with the phase, steps done and steps in all.

    Raises:
        InputError: bounds without an end, or an architecture that is not built for.
        EngineError: the backend is missing, the graph holds what it does not know, or the build failed.
        OSError: the file cannot be written.
    """
    for one in bounds:
        endless = [symbol for symbol, (_, _, most) in one.items() if most is None]
        if endless:
            raise InputError(
                f"{network.name}: {backend} needs an end to {', '.join(endless)}; give --batch, --height and --width "
                "as MIN:OPT:MAX"
            )
    trt = _module(backend)
    log = quiet_log(trt)
    started = time.perf_counter()
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _apart(lambda: _parse(trt, onnx, definition, log, network, backend))
    config = _config(trt, builder, backend)
    for one in bounds:
        config.add_optimization_profile(_profile(builder, network, one))
    targets = capabilities(backend, architecture) if backend == "tensorrt-rtx" else []
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    if refittable:
        if gpu() is None:
            raise EngineError(
                f"{network.name}: {backend} makes weights replaceable on a CUDA GPU alone (without one its compiler "
                "fails), and torch finds none here; build on the GPU, or with --lora-mode fused"
            )
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        for name in refittable:
            if not definition.mark_weights_refittable(name):
                raise EngineError(f"{network.name}: {backend} finds no weights {name!r} in the graph; export it again")
    # TensorRT for RTX times nothing at the build, and its timing cache does nothing.
    cache = _load_cache(config, timing_cache if backend == "tensorrt" else None)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    layers = definition.num_layers
    serialized = _apart(lambda: builder.build_serialized_network(definition, config), monitor)
    if serialized is None:
        raise EngineError(f"{network.name}: {backend} cannot build it ({log.fault()}); see --debug, or another backend")
    content = memoryview(serialized)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _save_cache(cache, timing_cache)
    names = tuple(target.name.lower() for target in targets) or (architecture,)
    return BuildFacts(layers, content.nbytes, time.perf_counter() - started, names, len(refittable))


def _module(backend: str) -> Any:
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        raise EngineError(
            f"engine {backend!r}: does not load ({reason(error)}); run `pip install 'smooth-rt[{backend}]'`"
        ) from error


def _config(trt: Any, builder: Any, backend: str) -> Any:
    """A builder's configuration, in which fp32 is fp32: TF32, on by default, has ten bits of mantissa."""
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if backend == "tensorrt-rtx":
        # Runs then allocate nothing, so that they can be captured as CUDA graphs.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return config


def _parse(trt: Any, onnx: Path, definition: Any, log: Any, network: Network, backend: str) -> None:
    parser = trt.OnnxParser(definition, log)
    # From the file, so that the weights beside it are found.
    if parser.parse_from_file(str(onnx)):
        return
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    first = faults[0] if faults else None
    where = f"node {first.node_name()!r} ({first.node_operator()})" if first is not None else str(onnx)
    said = " ".join(first.desc().split()) if first is not None else log.fault()
    raise EngineError(f"{network.name}: {backend} does not take {where}: {said[:200]}; use another backend")


def _profile(builder: Any, network: Network, bounds: Bounds) -> Any:
    profile = builder.create_optimization_profile()
    for spec in network.inputs:
        ends = [spec.shape({symbol: sizes[index] or 0 for symbol, sizes in bounds.items()}) for index in range(3)]
        profile.set_shape(spec.name, *ends)
    return profile


def _load_cache(config: Any, path: Path | None) -> Any:
    """The timing cache of the config. One that cannot be read is begun anew: it only saves time."""
    if path is None:
        return None
    content = kept(path)
    cache = config.create_timing_cache(content) or config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_cache(cache: Any, path: Path | None) -> None:
    """Keep the cache for the next build."""
    if cache is not None and path is not None:
        keep(path, bytes(memoryview(cache.serialize())), "the timing cache is")


def _apart(work: Callable[[], Any], monitor: Any = None) -> Any:
    """Run a build, or what comes before it, in a thread of its own. Ctrl-C is then raised here, and not in a callback
    of TensorRT's, where it would end the process or be lost: the build is told to stop, if it hears, and waited for,
    however often it is pressed, since a thread that lives on when Python ends takes the process down with it."""
    made: list[Any] = []
    faults: list[BaseException] = []
    # Thread.join takes a thread for ended once Ctrl-C has come while it waited (Python 3.11, bpo-45274).
    begun, ended = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        try:
            made.append(work())
        except BaseException as error:
            faults.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="tensorrt-build")
    interruption: BaseException | None = None
    try:
        thread.start()
    except BaseException as error:
        if not begun.wait(1.0):
            raise
        interruption = error
    while not ended.is_set():
        try:
            if monitor is not None:
                monitor.interruption = monitor.interruption or interruption
            ended.wait(POLL_S)
        except BaseException as error:
            interruption = interruption or error
    thread.join()
    if monitor is not None:
        interruption = interruption or monitor.interruption
    if interruption is not None:
        raise interruption
    if faults:
        raise faults[0]
    return made[0]


def _monitor(trt: Any, progress: Progress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Hands progress on; an exception from there, Ctrl-C among them, ends the build and is raised after it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.interruption: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self.steps[phase] = steps
            self._report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(phase, step + 1)
            return self.interruption is None

        def phase_finish(self, phase: str) -> None:
            self._report(phase, self.steps.get(phase, 0))

        def _report(self, phase: str, step: int) -> None:
            try:
                if progress is not None and self.interruption is None:
                    progress(phase, min(step, self.steps.get(phase, step)), self.steps.get(phase, step))
            except BaseException as error:  # it may not pass through TensorRT's own frames
                self.interruption = error

    return Monitor()
