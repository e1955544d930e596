"""The inversion method that a command names: what it takes, and what can be inverted with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smooth_rt.commands.pictures import check_readable

__all__ = ["check_inverted", "gradients_of", "walks_of"]


def walks_of(method: str) -> int:
    """How often a method goes through all steps, there and back."""
    from smooth_rt.ranges import choice
    from smooth_rt.tasks.inversion import METHODS

    return METHODS[choice("method", method, tuple(METHODS))].walks


def gradients_of(method: str, guidance_scale: float | None) -> tuple[str, ...]:
    """The gradients that a method takes, as `open_pipeline` takes them."""
    from smooth_rt.ranges import choice
    from smooth_rt.tasks.inversion import METHODS

    return METHODS[choice("method", method, tuple(METHODS))].gradients(guidance_scale)


def check_inverted(images: Sequence[Path], method: str, prompts: Sequence[str] | None) -> None:
    """Refuse what cannot be inverted before an engine is built or opened."""
    from smooth_rt.tasks.inversion import source_texts

    source_texts(method, prompts, len(images), "--prompt")
    check_readable(images)
