"""Diffusion models with a smooth latent space, run fast: interpolation, inversion and editing on real engines.

Importing this package loads no torch, no diffusers and no engine library; a name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import engines as _engines  # noqa: F401 (a relative SMOOTH_RT_CACHE is resolved as it is imported)

if TYPE_CHECKING:
    from engines.variant import Profile, Span
    from smooth_rt.build import build_engines
    from smooth_rt.errors import BundleError, EngineError, InputError, ModelError, ParityError, SmoothRTError
    from smooth_rt.lora.fuse import fuse
    from smooth_rt.lora.read import read_lora
    from smooth_rt.model import load_model
    from smooth_rt.pipeline import SmoothPipeline
    from smooth_rt.schedule import Schedule

    __version__: str

__all__ = [
    "BundleError",
    "EngineError",
    "InputError",
    "ModelError",
    "ParityError",
    "Profile",
    "Schedule",
    "SmoothPipeline",
    "SmoothRTError",
    "Span",
    "__version__",
    "build_engines",
    "fuse",
    "load_model",
    "read_lora",
]

_HOMES = {
    "SmoothPipeline": "smooth_rt.pipeline",
    "Schedule": "smooth_rt.schedule",
    "Profile": "engines.variant",
    "Span": "engines.variant",
    "build_engines": "smooth_rt.build",
    "load_model": "smooth_rt.model",
    "fuse": "smooth_rt.lora.fuse",
    "read_lora": "smooth_rt.lora.read",
    "BundleError": "smooth_rt.errors",
    "EngineError": "smooth_rt.errors",
    "InputError": "smooth_rt.errors",
    "ModelError": "smooth_rt.errors",
    "ParityError": "smooth_rt.errors",
    "SmoothRTError": "smooth_rt.errors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("smooth-rt")
        except PackageNotFoundError:  # run from a checkout that was never installed
            return "0+uninstalled"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
