"""What can be said of an option before a model is read: one table, asked by the commands and by Python's entry points.

What depends on the model (multiples of the VAE's factor, the number of timesteps) is in `smooth_rt.tasks.checks` and
`smooth_rt.schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from engines.select import check_backend
from smooth_rt.errors import InputError

__all__ = ["EDIT_METHODS", "INVERSION_METHODS", "MAX_SIDE", "MOST_IMAGES", "OUTPUT_TYPES", "RANGES", "check", "choice"]

MAX_SIDE = 10_000  # pixels
MOST_IMAGES = 10_000  # more in one call is a slip of the keyboard: the noise alone would fill the memory
LARGEST_STRENGTH = 100.0  # beyond it nothing of the model is left
INVERSION_METHODS = ("ddim", "ddim-without-text", "negative-prompt")
EDIT_METHODS = ("eq15", "sdedit")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check(**options: Any) -> None:
    """Check options by their names, which are those of RANGES.

    Raises:
        InputError: a value is out of its range; the line names the option. EngineError: there is no such engine.
    """
    for name, value in options.items():
        RANGES[name](name, value)


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """One of `known`; underscores may stand for dashes."""
    found = value.replace("_", "-") if isinstance(value, str) else value
    if found not in known:
        raise InputError(f"{name}={value!r} is unknown; it is one of {', '.join(known)}")
    return str(found)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _steps(name: str, value: Any) -> None:
    if not _is_whole(value) or value < 1:
        raise InputError(f"{name}={value!r}: give a whole number of at least 1")


def _count(name: str, value: Any, least: int) -> None:
    if not _is_whole(value) or not least <= value <= MOST_IMAGES:
        raise InputError(f"{name}={value!r}: give a whole number from {least} to {MOST_IMAGES}")


def _batch_size(name: str, value: Any) -> None:
    if value != "auto" and (not _is_whole(value) or value < 1):
        raise InputError(f"{name}={value!r}: give a whole number of at least 1, or 'auto'")


def _side(name: str, value: Any) -> None:
    if value is None:  # the model's own
        return
    if not _is_whole(value) or value < 1:
        raise InputError(f"{name}={value!r}: give a whole number of pixels, at least 1")
    if value > MAX_SIDE:
        raise InputError(f"{name}={value!r}: give at most {MAX_SIDE} pixels a side")


def _guidance(name: str, value: Any) -> None:
    # A whole number may be too large for any float.
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)) or abs(value) > 1e300:
        raise InputError(f"{name}={value!r}: give a finite number, such as 7.5 (1 is no guidance)")


def _fraction(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise InputError(f"{name}={value!r}: give a number from 0 to 1")


def _lora_strength(name: str, value: Any) -> None:
    if not _is_number(value) or not abs(value) <= LARGEST_STRENGTH:  # so written that NaN is refused too
        raise InputError(f"{name}={value!r}: give a number from -100 to 100; 1.0 is the LoRA as trained")


def _seed(name: str, value: Any) -> None:
    if not _is_whole(value) or not -(2**63) <= value < 2**64:
        raise InputError(f"{name}={value!r}: does not fit into 64 bits; give a whole number that does")


def _seeds(name: str, value: Any) -> None:
    for one in value:
        _seed(name, one)


def _engine(_: str, value: Any) -> None:
    """A backend or "auto"; or several with commas between, where a command takes several."""
    for one in str(value).split(","):
        if one.strip() not in ("", "auto"):
            check_backend(one.strip())


def _output(_: str, value: Any) -> None:
    from smooth_rt.writers import check_output

    check_output(value)


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    choice(name, value, known)


RANGES: dict[str, Callable[[str, Any], None]] = {
    "batch": partial(_count, least=1),
    "batch_size": _batch_size,
    "edit_method": partial(_one_of, known=EDIT_METHODS),
    "edit_strength": _fraction,
    "engine": _engine,
    "frames": partial(_count, least=2),
    "guidance_scale": _guidance,
    "height": _side,
    "lora_strength": _lora_strength,
    "method": partial(_one_of, known=INVERSION_METHODS),
    "num_images_per_prompt": partial(_count, least=1),
    "num_inference_steps": _steps,
    "output": _output,
    "output_type": partial(_one_of, known=OUTPUT_TYPES),
    "seed": _seed,
    "seeds": _seeds,
    "width": _side,
}
