"""Which backends there are, which can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
import logging
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import EngineError, InputError, reason
from engines.paths import absolute
from engines.providers import BY_BACKEND, PROVIDERS, lacking
from engines.rtx import architectures, leaves_out
from engines.variant import Bounds

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.contract import Network

__all__ = [
    "ANY_GPU",
    "BACKENDS",
    "BOUNDED",
    "ONNX",
    "ON_GPU",
    "PORTABLE",
    "TENSORRT",
    "Choice",
    "architecture",
    "availability",
    "backend_version",
    "buildable",
    "check_backend",
    "check_runs",
    "choose",
    "gpu",
    "open_engine",
    "runs_here",
    "target",
    "targets",
]

LOG = logging.getLogger("smooth_rt")


TENSORRT: tuple[str, ...] = ("tensorrt", "tensorrt-rtx")
ONNX: tuple[str, ...] = tuple(BY_BACKEND)  # those that run the exported graph as it is
# Those that run on a CUDA GPU alone, and are built for one or several architectures.
ON_GPU: tuple[str, ...] = (*TENSORRT, *(name for name in ONNX if name != "onnxruntime"))
BACKENDS: tuple[str, ...] = ("eager", "onnxruntime", "openvino", "inductor", *ON_GPU)
# Those that compile for a range of sizes, which must have an end.
BOUNDED: tuple[str, ...] = (*TENSORRT, "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
PORTABLE = "rtx"  # the architecture of an engine for every GPU that TensorRT for RTX supports
ANY_GPU = "cuda"  # of a graph that was not compared with torch on any GPU yet
# Fastest first on a CPU: measured, OpenVINO f32 is level with or ahead of ONNX Runtime, both well ahead of eager.
# On a CUDA GPU, TensorRT comes first: published at about twice ONNX Runtime's speed (docs/decisions).
AUTO_ORDER: tuple[str, ...] = ("openvino", "onnxruntime", "eager")
# ONNX Runtime's own TensorRT compiles as it opens, for minutes: who wants that names it.
AUTO_ON_GPU: tuple[str, ...] = (*TENSORRT, "onnxruntime-cuda", *AUTO_ORDER)

_ARCHITECTURES = re.compile(r" *sm[0-9]{2,3}( *, *sm[0-9]{2,3})* *")
_MODULES = {
    "eager": "torch",
    **dict.fromkeys(ONNX, "onnxruntime"),
    "openvino": "openvino",
    "inductor": "torch._inductor",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
_DISTRIBUTIONS = {
    "eager": ("torch",),
    # The first is what the mend names. A plugin's provider goes with the plain package.
    **{
        name: ("onnxruntime-gpu", "onnxruntime")
        if PROVIDERS[provider].package == "onnxruntime-gpu"
        else ("onnxruntime", "onnxruntime-gpu")
        for name, provider in BY_BACKEND.items()
    },
    "openvino": ("openvino",),
    "inductor": ("torch",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}


@dataclass(frozen=True)
class Choice:
    """The backend that will run, and why it was taken."""

    backend: str
    reason: str


def check_backend(name: str) -> None:
    """Raise EngineError if `name` is not a backend that this version can build or run."""
    if name not in BACKENDS:
        raise EngineError(f"engine {name!r}: unknown; choose from auto, {', '.join(BACKENDS)}")


def gpu() -> str | None:
    """The architecture of the CUDA GPU that torch takes by default, such as "sm89"; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def target(backend: str, gpu_arch: str | None = None) -> str:
    """The architecture that `backend` is built for: `gpu_arch` as named, else the GPU at hand, else what runs anywhere.

    Of a GPU that TensorRT for RTX does not name, that is its portable engine: whether that runs there, it says itself.

    Raises:
        InputError: a backend that runs on the CPU is asked for a GPU's architecture, or one that must be built on its
            GPU for another.
    """
    at_hand = gpu() if backend in (*ON_GPU, "inductor") else None
    every = PORTABLE if backend == "tensorrt-rtx" else ANY_GPU if backend in ONNX and backend in ON_GPU else None
    if gpu_arch is None:
        if every == PORTABLE:
            return at_hand if at_hand is not None and at_hand in architectures() else PORTABLE
        return at_hand or every or architecture()
    if every is not None:
        said = gpu_arch.lower()
        if said.strip() != every and not _ARCHITECTURES.fullmatch(said):
            raise InputError(
                f"gpu_arch={gpu_arch}: no architecture; give for example sm89, sm80,sm89, or {every} alone"
            )
        return ",".join(dict.fromkeys(part.strip() for part in said.split(",")))
    if gpu_arch.lower() != at_hand:
        where = f"the GPU at hand, {at_hand}" if at_hand else "the GPU at hand, and there is none"
        raise InputError(f"gpu_arch={gpu_arch}: {backend} is built for {where}; tensorrt-rtx builds ahead of time")
    return gpu_arch.lower()


def targets(backends: Sequence[str], gpu_arch: str | None = None) -> dict[str, str]:
    """The architecture of each of several backends; `gpu_arch` is for those of them that run on a GPU.

    Raises:
        InputError: none of them does, or as `target` raises it.
    """
    takers = {name for name in backends if name in ON_GPU or (name == "inductor" and gpu() is not None)}
    if gpu_arch is not None and not takers:
        raise InputError(
            f"gpu_arch={gpu_arch}: {', '.join(backends)} is built for the CPU here; leave it out, or name a backend "
            "that runs on a GPU, such as tensorrt-rtx"
        )
    return {name: target(name, gpu_arch if name in takers else None) for name in backends}


def architecture() -> str:
    """What engines for this machine's processor run on, such as "cpu-x86_64"."""
    machine = platform.machine().lower()
    return "cpu-" + {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def runs_here(built_for: str) -> str | None:
    """None if an engine of that architecture runs on this machine, else what this machine is."""
    if built_for.startswith("cpu-"):
        here = architecture()
        return None if built_for == here else f"this is {here}"
    at_hand = gpu()
    if at_hand is None:
        return "a GPU, and torch finds none here"
    # Which GPUs take a portable engine, TensorRT for RTX knows: it refuses the others when it opens one.
    return None if built_for in (PORTABLE, ANY_GPU) or at_hand in built_for.split(",") else f"this is {at_hand}"


def _installed(name: str) -> dict[str, str]:
    """Version by distribution, for those of the backend's distributions that are installed."""
    found = {}
    for distribution in _DISTRIBUTIONS[name]:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def _wanted(name: str) -> str:
    """What pip is told to install for a backend: TensorRT's need more than their own package to be built."""
    return f"'smooth-rt[{name}]'" if name in TENSORRT else _DISTRIBUTIONS[name][0]


def backend_version(name: str) -> str:
    """The installed version of a backend's library.

    Raises:
        EngineError: the backend is unknown or not installed.
    """
    check_backend(name)
    found = _installed(name)
    if not found:
        raise EngineError(f"engine {name!r}: not installed; run `pip install {_wanted(name)}`")
    return next(iter(found.values()))


def availability(name: str) -> str | None:
    """None if the backend can run here, else one line: why it cannot, and the command that mends it.

    Raises:
        EngineError: the backend is unknown.
    """
    fault = buildable(name)
    if fault is None and name in ON_GPU and gpu() is None:
        return f"{name} runs on a CUDA GPU and torch finds none here; choose openvino or onnxruntime"
    if fault is None and name in BY_BACKEND:
        return lacking(BY_BACKEND[name])
    return fault


def check_runs(name: str) -> None:
    """Raise EngineError unless there is a backend of that name and it can run here."""
    fault = availability(name)
    if fault is not None:
        raise EngineError(f"engine {name!r}: {fault}")


def buildable(name: str) -> str | None:
    """None if engines of the backend can be built here, as far as its library goes; else as `availability`.

    Raises:
        EngineError: the backend is unknown.
    """
    check_backend(name)
    found = _installed(name)
    if not found:
        return f"{name} is not installed; run `pip install {_wanted(name)}`"
    if len(found) > 1:
        own, other = _DISTRIBUTIONS[name]
        both = sorted(found)
        return (
            f"{' and '.join(both)} are installed together and overwrite each other's files; "
            f"run `pip uninstall -y {' '.join(both)} && pip install {own}` (or install {other} instead)"
        )
    try:
        importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:
        again = f"pip install --force-reinstall {next(iter(found))}"
        return f"{name} is installed and does not load ({reason(error)}); run `{again}`"
    return None


def choose(
    engine: str,
    built: Collection[str],
    unfit: Mapping[str, str] | None = None,
    mend: Callable[[str], str] = "run `smooth-rt build-engine --backend {}`".format,
) -> Choice:
    """The backend to run on, logged once at INFO on the logger "smooth_rt".

    Args:
        engine: "auto" or a backend. "auto" takes the first of openvino, onnxruntime, eager that is built and can run;
            on a CUDA GPU TensorRT, then ONNX Runtime's CUDA provider, before them. TensorRT for RTX is passed over on
            a GPU that it does not name.
        built: the backends there are graphs for. Eager needs none.
        unfit: those of them whose graphs are of another machine, and what this one is: "auto" passes them over.
        mend: what to do about a backend that is not built, for the message.

    Raises:
        EngineError: a named engine is unknown, cannot run here or was not built; the message says how to mend it.
    """
    if engine == "auto":
        choice = _first_that_runs(built, unfit or {})
        LOG.info("engine: %s (%s)", choice.backend, choice.reason)
    else:
        check_runs(engine)
        if engine != "eager" and engine not in built:
            raise EngineError(
                f"engine {engine!r}: not in the bundle, which holds {', '.join(built) or 'none'}; {mend(engine)}"
            )
        choice = Choice(engine, "asked for")
        LOG.info("engine: %s", choice.backend)  # by the user, or by a command that compares several
    return choice


def _first_that_runs(built: Collection[str], unfit: Mapping[str, str]) -> Choice:
    passed_over: list[str] = []
    at_hand = gpu()
    on_gpu = at_hand is not None
    for name in AUTO_ON_GPU if on_gpu else AUTO_ORDER:
        fault = "not built" if name != "eager" and name not in built else availability(name) or unfit.get(name)
        if fault is None and name == "tensorrt-rtx" and at_hand is not None:
            fault = leaves_out(at_hand)
        if fault is None:
            because = "the first choice on a " + ("GPU" if on_gpu else "CPU")
            if passed_over:
                because += "; passed over: " + ", ".join(passed_over)
            return Choice(name, because)
        passed_over.append(f"{name} ({fault})")
    raise EngineError(f"engine 'auto': nothing can run: {', '.join(passed_over)}")


def open_engine(
    backend: str,
    network: Network,
    path: Path,
    hint: str | None = None,
    bounds: Sequence[Bounds] = (),
    cache: Path | None = None,
) -> Engine:
    """Open the graph at `path` on `backend`. A .pt2 holds native code: its digest must have been verified before.

    Args:
        hint: OpenVINO's precision hint; None stands for "f32".
        bounds: the sizes that it was built for, as in `Engine`.
        cache: for what TensorRT compiles, as in `OrtEngine` and `TrtEngine`.

    Raises:
        EngineError: the backend is unknown, cannot run here or cannot read the graph.
    """
    check_runs(backend)
    path = absolute(path)  # an engine may read it again when a call needs it
    if backend in BY_BACKEND:
        from engines.ort import OrtEngine

        return OrtEngine(network, path, bounds, BY_BACKEND[backend], cache)
    if backend == "openvino":
        from engines.ov import OvEngine

        return OvEngine(network, path, bounds, hint or "f32")
    if backend == "inductor":
        from engines.inductor import InductorEngine

        return InductorEngine(network, path, bounds)
    if backend in TENSORRT:
        from engines.trt import TrtEngine

        return TrtEngine(network, path, bounds, backend, cache)
    raise EngineError(f"engine {backend!r}: runs torch modules, not graphs; open the model instead of a bundle")
