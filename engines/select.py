"""Which backends there are, which can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
import logging
import platform
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import EngineError, reason

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.contract import Network

__all__ = [
    "BACKENDS",
    "HINTS",
    "Choice",
    "architecture",
    "availability",
    "backend_version",
    "check_backend",
    "choose",
    "open_engine",
]

LOG = logging.getLogger("smooth_rt")

BACKENDS: tuple[str, ...] = ("eager", "onnxruntime", "openvino")
# Fastest first on a CPU: measured, OpenVINO f32 is level with or ahead of ONNX Runtime, both well ahead of eager.
AUTO_ORDER: tuple[str, ...] = ("openvino", "onnxruntime", "eager")
LATER = {
    "tensorrt": "this version does not build TensorRT engines yet",
    "tensorrt-rtx": "this version does not build TensorRT for RTX engines yet",
}
# The precision hint each backend is given. OpenVINO would compute in bf16 by itself where the processor can.
HINTS: dict[str, str | None] = {"eager": None, "onnxruntime": None, "openvino": "f32", "inductor": None}

_MODULES = {"eager": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino", "inductor": "torch._inductor"}
_DISTRIBUTIONS = {
    "eager": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "inductor": ("torch",),
}


@dataclass(frozen=True)
class Choice:
    """The backend that will run, and why it was taken."""

    backend: str
    reason: str


def check_backend(name: str) -> None:
    """Raise EngineError if `name` is not a backend that this version can build or run."""
    if name in LATER:
        raise EngineError(f"engine {name!r}: {LATER[name]}; choose from {', '.join(BACKENDS)}")
    if name not in _MODULES:
        raise EngineError(f"engine {name!r}: unknown; choose from auto, {', '.join(_MODULES)}")


def architecture() -> str:
    """What the engines of this machine run on, such as "cpu-x86_64"."""
    machine = platform.machine().lower()
    return "cpu-" + {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _installed(name: str) -> dict[str, str]:
    """Version by distribution, for those of the backend's distributions that are installed."""
    found = {}
    for distribution in _DISTRIBUTIONS[name]:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def backend_version(name: str) -> str:
    """The installed version of a backend's library.

    Raises:
        EngineError: the backend is unknown or not installed.
    """
    check_backend(name)
    found = _installed(name)
    if not found:
        raise EngineError(f"engine {name!r}: not installed; run `pip install {_DISTRIBUTIONS[name][0]}`")
    return next(iter(found.values()))


def availability(name: str) -> str | None:
    """None if the backend can run here, else one line: why it cannot, and the command that mends it.

    Raises:
        EngineError: the backend is unknown, or known and not supported by this version.
    """
    check_backend(name)
    found = _installed(name)
    if not found:
        return f"{name} is not installed; run `pip install {_DISTRIBUTIONS[name][0]}`"
    if len(found) > 1:
        both = " ".join(found)
        return (
            f"{' and '.join(found)} are installed together and overwrite each other's files; "
            f"run `pip uninstall -y {both} && pip install {name}` (or install the -gpu one instead)"
        )
    try:
        importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:
        again = f"pip install --force-reinstall {next(iter(found))}"
        return f"{name} is installed and does not load ({reason(error)}); run `{again}`"
    return None


def choose(engine: str, built: Collection[str]) -> Choice:
    """The backend to run on, logged once at INFO on the logger "smooth_rt".

    Args:
        engine: "auto" or a backend. "auto" takes the first of openvino, onnxruntime, eager that is built and can run.
        built: the backends there are graphs for. Eager needs none.

    Raises:
        EngineError: a named engine is unknown, cannot run here or was not built; the message says how to mend it.
    """
    if engine == "auto":
        choice = _first_that_runs(built)
    else:
        fault = availability(engine)
        if fault is not None:
            raise EngineError(f"engine {engine!r}: {fault}")
        if engine != "eager" and engine not in built:
            raise EngineError(
                f"engine {engine!r}: not in the bundle, which holds {', '.join(built) or 'none'}; "
                f"run `smooth-rt build-engine --backend {engine}`"
            )
        choice = Choice(engine, "asked for")
    LOG.info("engine: %s (%s)", choice.backend, choice.reason)
    return choice


def _first_that_runs(built: Collection[str]) -> Choice:
    passed_over: list[str] = []
    for name in AUTO_ORDER:
        fault = "not built" if name != "eager" and name not in built else availability(name)
        if fault is None:
            because = "the first choice on a CPU"
            if passed_over:
                because += "; passed over: " + ", ".join(passed_over)
            return Choice(name, because)
        passed_over.append(f"{name} ({fault})")
    raise EngineError(f"engine 'auto': nothing can run: {', '.join(passed_over)}")


def open_engine(backend: str, network: Network, path: Path, hint: str | None = None) -> Engine:
    """Open the graph at `path` (.onnx for onnxruntime, .xml for openvino, .pt2 for inductor) on `backend`.

    A .pt2 holds native code: its digest must have been verified before.

    Args:
        hint: OpenVINO's precision hint; None stands for "f32".

    Raises:
        EngineError: the backend is unknown, cannot run here or cannot read the graph.
    """
    fault = availability(backend)
    if fault is not None:
        raise EngineError(f"engine {backend!r}: {fault}")
    if backend == "onnxruntime":
        from engines.ort import OrtEngine

        return OrtEngine(network, path)
    if backend == "openvino":
        from engines.ov import OvEngine

        return OvEngine(network, path, hint or "f32")
    if backend == "inductor":
        from engines.inductor import InductorEngine

        return InductorEngine(network, path)
    raise EngineError(f"engine {backend!r}: runs torch modules, not graphs; open the model instead of a bundle")
