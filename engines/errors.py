"""Every exception this project raises on purpose.

    SmoothRTError                 something went wrong that the user can act on; one line, exit code 2
    ├── InputError (ValueError)   an argument, an image, a prompt or a path is not usable
    ├── ModelError                a model folder or a LoRA cannot be read or does not fit
    ├── BundleError               a bundle is missing, damaged, stale or lacks what is asked for
    ├── EngineError               a backend is not installed, cannot run here, or failed while running
    └── ParityError               a built graph differs from the torch module by more than its tolerance

Each message is one line that names the input, says what is wrong and what to do about it.
"""

from __future__ import annotations

import re

__all__ = [
    "BundleError",
    "EngineError",
    "InputError",
    "ModelError",
    "ParityError",
    "SmoothRTError",
    "reason",
    "with_command",
]

LONGEST_SAID = 140  # characters of a library's message inside one of ours


class SmoothRTError(Exception):
    """The root: catch this to catch everything the project raises on purpose."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a name in a file may have several


class InputError(SmoothRTError, ValueError):
    """An argument, an image, a prompt or a path is not usable."""


class ModelError(SmoothRTError):
    """A model folder, a checkpoint or a LoRA cannot be read or does not fit."""


class BundleError(SmoothRTError):
    """A bundle is missing, damaged, stale or lacks what is asked for."""


class EngineError(SmoothRTError):
    """A backend is not installed, cannot run here, or failed while running."""


class ParityError(SmoothRTError):
    """A built graph differs from the torch module by more than its tolerance."""


def reason(error: BaseException, line: int = 0) -> str:
    """What the system or a library said, to stand inside a line of ours: its first line that says something, or line
    number `line`, or that one's first sentence, at most LONGEST_SAID; without the number and the path that an OSError
    shows; the exception's type where nothing was said."""
    said = error.strerror if isinstance(error, OSError) else None
    lines = [words for part in (said or str(error)).splitlines() if (words := " ".join(part.split()))]
    told = lines[line] if lines else type(error).__name__
    if len(told) > LONGEST_SAID:
        told = re.split(r"(?<=[.!?]) (?=[A-Z(])", told)[0]
    if len(told) > LONGEST_SAID:
        return f"{told[:LONGEST_SAID].rstrip()}..."
    return f"unknown or missing: {told}" if isinstance(error, KeyError) else told.rstrip(".: ")


def with_command(error: EngineError, command: str | None) -> str | None:
    """What an engine says that knows no bundle, ending in "; rebuild" or "; rebuild the bundle", with the command that
    does it; None of any other error, or without a command."""
    said = str(error).removesuffix(" the bundle")
    return None if command is None or not said.endswith("; rebuild") else f"{said} it with `{command}`"
