"""Run a built network: named tensors in, named tensors out.

The names below load on first use, so that importing this package loads no torch and no backend.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engines.cache_dir import ensure_home, pin_cache_root
from engines.errors import SmoothRTError as _SmoothRTError

# ONNX Runtime reports sessions, the processor and the interpreter's path to its makers, and keeps a device's number and
# what it has not sent yet in the user's cache. It reads this as it is imported; whoever wants it sets 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

ensure_home()
with suppress(_SmoothRTError):  # raised where the cache is used
    pin_cache_root()

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.bundle import (
        Bundle,
        EngineRecord,
        FileRecord,
        LoraSource,
        Manifest,
        Parity,
        Source,
        VariantRecord,
        digest_file,
        digest_json,
        key_parts,
        staging,
    )
    from engines.contract import NETWORKS, Axis, Dims, Network, NetworkName, TensorSpec, contract
    from engines.eager import EagerEngine, torch_networks
    from engines.errors import BundleError, EngineError, InputError, ModelError, ParityError, SmoothRTError
    from engines.inductor import InductorEngine
    from engines.lora import LoraWeights
    from engines.ort import OrtEngine
    from engines.ov import OvEngine
    from engines.select import BACKENDS, Choice, availability, backend_version, buildable, choose, open_engine
    from engines.trt import TrtEngine
    from engines.variant import Order, Profile, Span, Variant, every_size

__all__ = [
    "BACKENDS",
    "NETWORKS",
    "Axis",
    "Bundle",
    "BundleError",
    "Choice",
    "Dims",
    "EagerEngine",
    "Engine",
    "EngineError",
    "EngineRecord",
    "FileRecord",
    "InductorEngine",
    "InputError",
    "LoraSource",
    "LoraWeights",
    "Manifest",
    "ModelError",
    "Network",
    "NetworkName",
    "Order",
    "OrtEngine",
    "OvEngine",
    "Parity",
    "ParityError",
    "Profile",
    "SmoothRTError",
    "Source",
    "Span",
    "TensorSpec",
    "TrtEngine",
    "Variant",
    "VariantRecord",
    "availability",
    "backend_version",
    "buildable",
    "choose",
    "contract",
    "digest_file",
    "digest_json",
    "every_size",
    "key_parts",
    "open_engine",
    "staging",
    "torch_networks",
]

_ROOMS = {
    "base": ("Engine",),
    "bundle": (
        "Bundle", "EngineRecord", "FileRecord", "LoraSource", "Manifest", "Parity", "Source", "VariantRecord",
        "digest_file", "digest_json", "key_parts", "staging",
    ),
    "contract": ("NETWORKS", "Axis", "Dims", "Network", "NetworkName", "TensorSpec", "contract"),
    "eager": ("EagerEngine", "torch_networks"),
    "errors": ("BundleError", "EngineError", "InputError", "ModelError", "ParityError", "SmoothRTError"),
    "inductor": ("InductorEngine",),
    "lora": ("LoraWeights",),
    "ort": ("OrtEngine",),
    "ov": ("OvEngine",),
    "select": ("BACKENDS", "Choice", "availability", "backend_version", "buildable", "choose", "open_engine"),
    "trt": ("TrtEngine",),
    "variant": ("Order", "Profile", "Span", "Variant", "every_size"),
}  # fmt: skip
_HOME = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engines' has no attribute {name!r}")
    value = getattr(import_module(f"engines.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
