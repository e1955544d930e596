"""Which backends there are, which can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
import logging
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engines.errors import EngineError, InputError, reason
from engines.recipes import RECIPES
from engines.variant import LORA_MODES, Bounds, LoraMode, Precision

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.contract import Network

__all__ = [
    "BACKENDS",
    "ON_GPU",
    "PORTABLE",
    "Choice",
    "architecture",
    "availability",
    "backend_version",
    "buildable",
    "check_backend",
    "check_lora_mode",
    "choose",
    "gpu",
    "open_engine",
    "runs_here",
    "target",
]

LOG = logging.getLogger("smooth_rt")


BACKENDS: tuple[str, ...] = ("eager", "onnxruntime", "openvino", "inductor", "tensorrt", "tensorrt-rtx")
# Those that run on a CUDA GPU alone, and are built for one or several architectures.
ON_GPU: tuple[str, ...] = ("tensorrt", "tensorrt-rtx")
PORTABLE = "rtx"  # the architecture of an engine for every GPU that TensorRT for RTX supports
# Fastest first on a CPU: measured, OpenVINO f32 is level with or ahead of ONNX Runtime, both well ahead of eager.
# On a CUDA GPU, TensorRT comes first: published at about twice ONNX Runtime's speed (docs/decisions).
AUTO_ORDER: tuple[str, ...] = ("openvino", "onnxruntime", "eager")

# By how the LoRA is held, where it is not fused: what a backend does for it, and in which precisions it can.
SETTABLE: dict[LoraMode, tuple[str, dict[str, tuple[Precision, ...]]]] = {
    # Quantised and packed weights are no longer what they were.
    "refit": (
        "replace weights",
        {
            "onnxruntime": ("fp32",),
            "openvino": ("fp32", "bf16"),
            "tensorrt": ("fp32", "fp16", "bf16"),
            "tensorrt-rtx": ("fp32", "fp16", "bf16"),
        },
    ),
    # int8 is calibrated on images of one strength.
    "runtime": (
        "take the strength as an input",
        {name: tuple(precision for precision in recipes if precision != "int8") for name, recipes in RECIPES.items()},
    ),
}
_MODULES = {
    "eager": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "inductor": "torch._inductor",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
_DISTRIBUTIONS = {
    "eager": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
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

    Raises:
        InputError: a backend that runs on the CPU is asked for a GPU's architecture, or one that must be built on its
            GPU for another.
    """
    at_hand = gpu() if backend in (*ON_GPU, "inductor") else None
    if gpu_arch is None:
        return at_hand or (PORTABLE if backend == "tensorrt-rtx" else architecture())
    if backend == "tensorrt-rtx":
        return ",".join(dict.fromkeys(part.strip().lower() for part in gpu_arch.split(",")))
    if gpu_arch.lower() != at_hand:
        where = f"the GPU at hand, {at_hand}" if at_hand else "the GPU at hand, and there is none"
        raise InputError(f"gpu_arch={gpu_arch}: {backend} is built for {where}; tensorrt-rtx builds ahead of time")
    return gpu_arch.lower()


def architecture() -> str:
    """What engines for this machine's processor run on, such as "cpu-x86_64"."""
    machine = platform.machine().lower()
    return "cpu-" + {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def check_lora_mode(backend: str, precision: str, lora_mode: str) -> None:
    """Raise InputError unless `backend` can hold a LoRA in that way, in that precision."""
    if lora_mode not in LORA_MODES:
        raise InputError(f"lora_mode={lora_mode}: unknown; choose from {', '.join(LORA_MODES)}")
    if lora_mode == "fused":
        return
    what, backends = SETTABLE[cast("LoraMode", lora_mode)]
    able = backends.get(backend, ())
    if precision not in able:
        does = f"can {what} in {', '.join(able)}, not in {precision}" if able else f"cannot {what}"
        raise InputError(f"lora_mode={lora_mode}: {backend} {does}; choose fused, or another backend")


def runs_here(built_for: str) -> str | None:
    """None if an engine of that architecture runs on this machine, else what this machine is."""
    if built_for.startswith("cpu-"):
        here = architecture()
        return None if built_for == here else f"this is {here}"
    at_hand = gpu()
    if at_hand is None:
        return "a GPU, and torch finds none here"
    # Which GPUs take a portable engine, TensorRT for RTX knows: it refuses the others when it opens one.
    return None if built_for == PORTABLE or at_hand in built_for.split(",") else f"this is {at_hand}"


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
        EngineError: the backend is unknown.
    """
    fault = buildable(name)
    if fault is None and name in ON_GPU and gpu() is None:
        return f"{name} runs on a CUDA GPU and torch finds none here; choose openvino or onnxruntime"
    return fault


def buildable(name: str) -> str | None:
    """None if engines of the backend can be built here, as far as its library goes; else as `availability`.

    Raises:
        EngineError: the backend is unknown.
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
        engine: "auto" or a backend. "auto" takes the first of openvino, onnxruntime, eager that is built and can run;
            on a CUDA GPU TensorRT before them.
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
    on_gpu = gpu() is not None
    for name in (*ON_GPU, *AUTO_ORDER) if on_gpu else AUTO_ORDER:
        fault = "not built" if name != "eager" and name not in built else availability(name)
        if fault is None:
            because = "the first choice on a " + ("GPU" if on_gpu else "CPU")
            if passed_over:
                because += "; passed over: " + ", ".join(passed_over)
            return Choice(name, because)
        passed_over.append(f"{name} ({fault})")
    raise EngineError(f"engine 'auto': nothing can run: {', '.join(passed_over)}")


def open_engine(
    backend: str, network: Network, path: Path, hint: str | None = None, bounds: Sequence[Bounds] = ()
) -> Engine:
    """Open the graph at `path` on `backend`. A .pt2 holds native code: its digest must have been verified before.

    Args:
        hint: OpenVINO's precision hint; None stands for "f32".
        bounds: the sizes that it was built for, as in `Engine`.

    Raises:
        EngineError: the backend is unknown, cannot run here or cannot read the graph.
    """
    fault = availability(backend)
    if fault is not None:
        raise EngineError(f"engine {backend!r}: {fault}")
    if backend == "onnxruntime":
        from engines.ort import OrtEngine

        return OrtEngine(network, path, bounds)
    if backend == "openvino":
        from engines.ov import OvEngine

        return OvEngine(network, path, bounds, hint or "f32")
    if backend == "inductor":
        from engines.inductor import InductorEngine

        return InductorEngine(network, path, bounds)
    if backend in ON_GPU:
        from engines.trt import TrtEngine

        return TrtEngine(network, path, bounds, backend)
    raise EngineError(f"engine {backend!r}: runs torch modules, not graphs; open the model instead of a bundle")
