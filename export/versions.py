"""What a build was made with, and what it took: for the manifest."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

__all__ = ["peak_memory", "versions"]

_DISTRIBUTIONS = (
    "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-rtx",
    "diffusers", "transformers",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The version of each library that may have taken part, of those that are installed."""
    found = {}
    for distribution in _DISTRIBUTIONS:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Bytes of the largest resident set that one process had so far: this one, or one that it started and has waited
    for, as AOTInductor compiles in.

    Linux keeps ru_maxrss across exec, so the child of a large process starts with its parent's size; VmHWM belongs to
    the new program alone and is read where it exists. Of this process's own children that size is at most its own.
    """
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    own, children = (
        resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                own = int(line.split()[1]) * 1024
    return max(own, children)
