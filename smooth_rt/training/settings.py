"""A run's settings: what may be given, in one line where it may not, and what says that a checkpoint is this run's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from smooth_rt.errors import InputError

__all__ = [
    "MOST_STEPS",
    "Precision",
    "check_count",
    "check_number",
    "check_rate",
    "check_seed",
    "check_steps",
    "differences",
]

Precision = Literal["no", "bf16", "fp16"]

MOST_STEPS = 99_999_999  # checkpoints are sorted by name, which has room for eight digits
MOST_IN_A_BATCH = 10_000  # more is a slip of the keyboard, which would fill the memory


def check_count(name: str, value: int, most: int = MOST_IN_A_BATCH) -> None:
    """Raises InputError unless `value` is a whole number from 1 to `most`."""
    _check(name, value, 1 <= value <= most, f"a whole number from 1 to {most}")


def check_steps(name: str, value: int) -> None:
    """Raises InputError unless a run can have so many steps."""
    check_count(name, value, MOST_STEPS)


def check_seed(value: int) -> None:
    """Raises InputError unless the seed can key random numbers: it fits into 64 bits and is not negative."""
    _check("seed", value, 0 <= value < 2**64, f"a whole number from 0 to {2**64 - 1}")


def check_rate(name: str, value: float) -> None:
    """Raises InputError unless `value` is a learning rate: AdamW moves each weight by about so much a step."""
    _check(name, value, 0 < value <= 1, "a number above 0 and at most 1")


def check_number(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises InputError unless `value` is a finite number from `least` to `most`."""
    bounds = [f"at least {least:g}"] * math.isfinite(least) + [f"at most {most:g}"] * math.isfinite(most)
    wanted = " of ".join(["a finite number", *[" and ".join(bounds)] * bool(bounds)])
    _check(name, value, math.isfinite(value) and least <= value <= most, wanted)


def _check(name: str, value: object, holds: bool, wanted: str) -> None:
    # A name at the start of a message, with "=" after it, is shown as the option it came from.
    if not holds:
        raise InputError(f"{name}={value!r}: give {wanted}")


def differences(settings: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The names in `settings` that `found`, of a checkpoint, lacks or holds another value for; what else it holds is
    no matter."""
    missing = object()
    return sorted(name for name, value in settings.items() if found.get(name, missing) != value)
