"""Which GPUs TensorRT for RTX is made for, as its own module says."""

from __future__ import annotations

import importlib
import re
from typing import Any

__all__ = ["architectures", "leaves_out"]

_ARCHITECTURE = re.compile(r"sm[0-9]{2,3}")


def architectures() -> dict[str, Any]:
    """By name, such as "sm89", what it can build for ahead of time, and its own word for that; none where it does not
    load."""
    try:
        members = importlib.import_module("tensorrt_rtx").ComputeCapability.__members__
    except (ImportError, OSError):
        return {}
    return {name.lower(): value for name, value in members.items() if _ARCHITECTURE.fullmatch(name.lower())}


def leaves_out(at_hand: str) -> str | None:
    """None if it may run on a GPU of that architecture, else one line.

    It runs on those that it builds for and, with the portable engine, on newer ones. One that lies between them, such
    as Hopper, stands in none of its lists.
    """
    known = architectures()
    if not known or at_hand in known or _number(at_hand) > max(map(_number, known)):
        return None
    return f"TensorRT for RTX is made for {', '.join(known)} and newer, and this is {at_hand}"


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm"))
