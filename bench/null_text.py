"""Null-text inversion of one image on an engine's gradients beside eager's, all rounds of every step: a task of
`python -m bench gradients`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from rich.table import Table
from torch import Tensor

from smooth_rt.build import build_engines
from smooth_rt.errors import InputError
from smooth_rt.images import read
from smooth_rt.metrics import psnr
from smooth_rt.pipeline import SmoothPipeline

__all__ = ["EAGER", "IMAGE", "PROMPT", "Inverted", "null_text", "table_of"]

EAGER = "eager"
IMAGE = resources.files("smooth_rt") / "assets" / "examples" / "red-heart.png"
PROMPT = "red heart"


@dataclass(frozen=True)
class Inverted:
    """A null-text inversion on one engine: seconds, those within the UNet's gradients, rows of them, and what comes
    back."""

    engine: str
    seconds: float
    in_gradients: float
    gradients: int
    psnr_db: float


class _Timed(SmoothPipeline):
    """Counts the seconds that the UNet's gradients take."""

    within = 0.0

    def vjp(self, *given: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        begun = time.perf_counter()
        found = super().vjp(*given, **named)
        self.within += time.perf_counter() - begun
        return found


def null_text(options: Namespace, say: Callable[[str], None]) -> list[Inverted]:
    """One image inverted on eager and on every engine, all rounds of every step.

    Raises:
        InputError: the model is sd15, whose random weights invert nothing.
    """
    if options.model == "sd15":
        raise InputError("--task=null-text: sd15 has random weights, which invert nothing; name a model")
    lora = "default" if options.model == "default" else None
    bundle = build_engines(options.model, lora, 1.0, options.engine, gradients=["text"])
    found = []
    for of in (EAGER, *options.engine):
        say(f"null-text inversion on {of}")
        with _Timed.from_engines(bundle, engine=of) as pipe:
            found.append(_inverted(pipe, of, options))
    return found


def _inverted(pipe: _Timed, of: str, options: Namespace) -> Inverted:
    pixels = read([options.image], *pipe.image_size(None, None))

    def invert(steps: int) -> Tensor:
        asked: dict[str, Any] = {"method": "null-text", "num_inference_steps": steps, "keep": False}
        back = pipe.invert(pixels, options.prompt, early_stop=False, output_type="pt", **asked).images
        assert isinstance(back, Tensor)
        return back

    invert(1)  # opens the engine of the gradients
    pipe.within, before = 0.0, pipe.evaluations["gradient"]
    begun = time.perf_counter()
    back = invert(options.steps)
    seconds = time.perf_counter() - begun
    gradients = pipe.evaluations["gradient"] - before
    return Inverted(of, seconds, pipe.within, gradients, psnr(pixels[0], back[0]))


def table_of(inverted: Sequence[Inverted]) -> Table:
    """The first of them is what the others are compared with."""
    table = Table("engine", "s", "x eager", "s in gradients", "rows", "PSNR dB", title="Null-text inversion")
    for one in inverted:
        ratio = inverted[0].seconds / one.seconds
        figures = f"{one.seconds:.2f}", f"{ratio:.2f}", f"{one.in_gradients:.2f}", str(one.gradients)
        table.add_row(one.engine, *figures, f"{one.psnr_db:.2f}")
    return table
