"""ONNX Runtime's execution providers: what each is called and needs, and a session on it or a refusal, never another.

Each provider is a backend of its own, since an engine that was compared with torch on one is not proved on another:
"onnxruntime" is the CPU's, "onnxruntime-cuda" and so on are the GPU's. The graphs are the same.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engines.contract import Network
from engines.errors import EngineError, InputError, reason
from engines.variant import Bounds

__all__ = ["BY_BACKEND", "PROVIDERS", "Provider", "joined", "lacking", "open_session", "settings"]

_QUIET, _USUAL = 4, 2  # severities of ONNX Runtime's default logger: fatal faults alone, and what it starts with


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Args:
        name: ONNX Runtime's.
        package: the distribution that brings it.
        device: torch's name of where it computes.
        plugin: the module of a package that brings the provider to an onnxruntime which lacks it.
        beside: the provider that takes the nodes which this one does not; the CPU's takes the rest.
        graphs: the option that captures CUDA graphs.
    """

    name: str
    package: str
    device: str = "cuda"
    plugin: str | None = None
    beside: str | None = None
    graphs: str | None = None


# By what the option --provider calls them.
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "onnxruntime", device="cpu"),
    "cuda": Provider("CUDAExecutionProvider", "onnxruntime-gpu", graphs="enable_cuda_graph"),
    "tensorrt": Provider(
        "TensorrtExecutionProvider", "onnxruntime-gpu", beside="CUDAExecutionProvider", graphs="trt_cuda_graph_enable"
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        graphs="enable_cuda_graph",
    ),
}
BY_BACKEND: dict[str, str] = {"onnxruntime" if name == "cpu" else f"onnxruntime-{name}": name for name in PROVIDERS}


def joined(backend: str, provider: str | None) -> str:
    """The backend that `backend` is on `provider`: "onnxruntime" (or "auto") and "cuda" is "onnxruntime-cuda".

    Raises:
        InputError: there is no such provider, or the backend has none.
    """
    if provider is None:
        return backend
    if not isinstance(provider, str) or provider not in PROVIDERS:
        raise InputError(f"provider={provider}: unknown; choose from {', '.join(PROVIDERS)}")
    found = next(name for name, own in BY_BACKEND.items() if own == provider)
    if backend not in ("auto", "onnxruntime", found):
        raise InputError(f"provider={provider}: is one of onnxruntime's, and the engine is {backend}; name one of them")
    return found


def lacking(provider: str) -> str | None:
    """None if this onnxruntime has the provider, else one line: what it has, and the command that mends it."""
    import onnxruntime

    own, there = PROVIDERS[provider], onnxruntime.get_available_providers()
    if own.name in there or (own.plugin is not None and find_spec(own.plugin) is not None):
        return None
    mend = f"pip install {own.package}"
    if own.plugin is None:  # the two packages hold the same files
        mend = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps {own.package}"
    return f"this onnxruntime has no {own.name} (it has {', '.join(there)}); run `{mend}`"


def settings(
    provider: str,
    network: Network,
    bounds: Sequence[Bounds],
    *,
    stream: int = 0,
    device: int = 0,
    fixed: bool = False,
    graph: bool = False,
    cache: Path | None = None,
) -> dict[str, str]:
    """The options of a provider for one session.

    Args:
        provider: of PROVIDERS.
        network: the contract, whose inputs TensorRT wants the sizes of.
        bounds: the sizes that the session serves; TensorRT builds for the hull of them.
        stream: the CUDA stream that it computes on, as an address; `device`: the GPU's number.
        fixed: whether the session has one size: then it is in the graph already.
        graph: whether a CUDA graph is captured.
        cache: a folder for what TensorRT compiles, of these weights alone: its own names do not tell weights apart.
    """
    if provider == "cpu":
        return {}
    found = {"device_id": str(device), "has_user_compute_stream": "1", "user_compute_stream": str(stream)}
    own = PROVIDERS[provider]
    if graph and own.graphs is not None:
        found[own.graphs] = "1"
    if provider == "cuda":
        # fp32 is fp32: TF32, the default, has ten bits of mantissa.
        found["use_tf32"] = "0"
        if not fixed:  # the default search tries every algorithm, at each new size again
            found["cudnn_conv_algo_search"] = "HEURISTIC"
        return found
    prefix = "trt" if provider == "tensorrt" else "nv"
    if not fixed and bounds:
        ends = _hull(bounds)
        for index, name in enumerate(("min", "opt", "max")):
            sizes = {symbol: span[index] for symbol, span in ends.items()}
            shapes = (f"{spec.name}:{'x'.join(map(str, spec.shape(sizes)))}" for spec in network.inputs)
            found[f"{prefix}_profile_{name}_shapes"] = ",".join(shapes)
    if provider == "tensorrt":
        found["trt_fp16_enable"] = "1"  # its graphs are in fp16
        if cache is not None:
            for what in ("engine", "timing"):
                found |= {f"trt_{what}_cache_enable": "1", f"trt_{what}_cache_path": str(cache)}
    elif cache is not None:
        found["nv_runtime_cache_path"] = str(cache)
    return found


def _hull(bounds: Sequence[Bounds]) -> dict[str, tuple[int, int, int]]:
    """From the least to the greatest size of all of them, fastest where the first is."""
    hull = {}
    for symbol, (_, best, _) in bounds[0].items():
        least = min(one[symbol][0] for one in bounds)
        most = [one[symbol][2] for one in bounds]
        known = [size for size in most if size is not None]
        if len(known) < len(most):
            raise EngineError(f"{symbol}: has no end, and TensorRT needs one for each size; build with --batch …")
        hull[symbol] = (least, best, max(known))
    return hull


def open_session(provider: str, path: Path, options: Any, chosen: Mapping[str, str]) -> Any:
    """A session that computes on `provider`. ONNX Runtime by itself would give one on the CPU where that fails.

    Args:
        provider: of PROVIDERS.
        path: the .onnx file.
        options: ONNX Runtime's SessionOptions.
        chosen: the provider's, see `settings`.

    Raises:
        EngineError: the provider does not start; the line says what it lacks.
        Exception: what ONNX Runtime raises where it cannot open the graph.
    """
    import onnxruntime

    own = PROVIDERS[provider]
    if provider == "cpu":
        return onnxruntime.InferenceSession(str(path), options, providers=[own.name])
    providers: list[Any] | None = [(own.name, dict(chosen))]
    if own.beside is not None:
        shared = {key: chosen[key] for key in ("device_id", "has_user_compute_stream", "user_compute_stream")}
        providers = [(own.name, dict(chosen)), (own.beside, {**shared, "use_tf32": "0"})]
    if provider == "tensorrt":
        with suppress(ImportError, OSError):
            importlib.import_module("tensorrt")  # loads the libraries that the provider needs, if they are of a package
    # What a provider says as it fails goes to stderr past the session's log; the error tells it in its line.
    onnxruntime.set_default_logger_severity(_QUIET)
    try:
        if own.plugin is not None and own.name not in onnxruntime.get_available_providers():
            # A plugin is told the GPU by the device, and knows no option for it.
            told = {key: value for key, value in chosen.items() if key != "device_id"}
            options.add_provider_for_devices(_plugged(own, chosen["device_id"]), told)
            providers = None
        # Without `enable_fallback=0` a provider that fails is replaced by the CPU's with a word on stdout.
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except RuntimeError as error:
        missing = _not_loading(provider)
        if missing is None:
            raise
        raise EngineError(f"{own.name}: does not start ({missing}); {_MENDS[provider]}") from error
    finally:
        onnxruntime.set_default_logger_severity(_USUAL)
    session.disable_fallback()
    if own.name not in session.get_providers():
        missing = _not_loading(provider) or "it did not say why"
        raise EngineError(
            f"{own.name}: does not start, and onnxruntime would run on the CPU instead ({missing}); {_MENDS[provider]}"
        )
    return session


_MENDS = {
    "cuda": "install a torch for the CUDA that onnxruntime-gpu was built with, whose libraries serve both",
    "tensorrt": "install the TensorRT it was built with (`pip install 'tensorrt<11'`), or choose the provider cuda",
    "tensorrt-rtx": "choose the provider cuda, or an engine for the CPU",
}


def _not_loading(provider: str) -> str | None:
    """The library that a provider lacks, as the system's loader says; None where it loads, or is none of a file."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        said = reason(error)
        return said if "cannot open shared object" in said and "libonnxruntime" not in said else None
    return None


def _plugged(own: Provider, number: str) -> list[Any]:
    """The GPU of that number, as a plugin's provider knows it.

    Raises:
        EngineError: the plugin does not load, or does not support that GPU.
    """
    import onnxruntime

    _register(own)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == own.name]
    found = [device for device in devices if device.ep_metadata.get("device_id", number) == number]
    if not found:
        raise EngineError(f"{own.name}: finds no GPU that it supports; {_MENDS['tensorrt-rtx']}")
    return found[:1]


@functools.cache
def _register(own: Provider) -> None:
    """Add a plugin's provider to onnxruntime, once a process."""
    import onnxruntime

    try:
        module = importlib.import_module(str(own.plugin))
        onnxruntime.register_execution_provider_library(own.name, module.get_library_path())
    except ImportError as error:
        raise EngineError(f"{own.name}: does not load ({reason(error)}); run `pip install {own.package}`") from error
    except Exception as error:
        said = RuntimeError(str(error).rpartition("with error: ")[2])  # after its library's path
        raise EngineError(f"{own.name}: does not load ({reason(said)}); {_MENDS['tensorrt-rtx']}") from error
