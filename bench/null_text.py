"""Null-text inversion of one image on an engine's gradients beside eager's, all rounds of every step: a task of
`python -m bench gradients`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from bench.subject import check_steps
from bench.timing import interleave, summarise
from smooth_rt.build import build_engines
from smooth_rt.commands.pictures import check_readable
from smooth_rt.errors import InputError
from smooth_rt.images import read
from smooth_rt.metrics import psnr
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import check_text

__all__ = ["EAGER", "IMAGE", "PROMPT", "Inverted", "check_null_text", "null_text", "table_of"]

EAGER = "eager"
IMAGE = resources.files("smooth_rt") / "assets" / "examples" / "red-heart.png"
PROMPT = "red heart"


@dataclass(frozen=True)
class Inverted:
    """Null-text inversions on one engine: the median of their seconds, the mean of those within the UNet's gradients,
    rows of gradients in one of them, and what comes back."""

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


def check_null_text(options: Namespace) -> None:
    """What of the options does not fit, before an engine is built.

    Raises:
        InputError: the model is sd15, whose random weights invert nothing, or has fewer steps; or there is no image.
        ModelError: the model cannot be read.
    """
    if options.model == "sd15":
        raise InputError("--task=null-text: sd15 has random weights, which invert nothing; name a model")
    check_text("--prompt", options.prompt)
    check_readable([Path(options.image)])
    check_steps(options.model, options.steps)


def null_text(options: Namespace, say: Callable[[str], None]) -> list[Inverted]:
    """One image inverted on eager and on every engine, all rounds of every step; the engines take turns."""
    lora = "default" if options.model == "default" else None
    bundle = build_engines(options.model, lora, 1.0, options.engine, gradients=["text"])
    with ExitStack() as stack:
        names = (EAGER, *options.engine)
        pipes = {of: stack.enter_context(_Timed.from_engines(bundle, engine=of)) for of in names}
        pixels = read([options.image], *pipes[EAGER].image_size(None, None))
        back: dict[str, Tensor] = {}

        def invert(of: str, steps: int) -> None:
            say(f"null-text inversion on {of}")
            asked: dict[str, Any] = {"method": "null-text", "num_inference_steps": steps, "keep": False}
            images = pipes[of].invert(pixels, options.prompt, early_stop=False, output_type="pt", **asked).images
            assert isinstance(images, Tensor)
            back[of] = images[0]

        for of, pipe in pipes.items():
            invert(of, 1)  # opens the engine of the gradients
            pipe.within = 0.0
        before = {of: pipe.evaluations["gradient"] for of, pipe in pipes.items()}
        runs = {of: partial(invert, of, options.steps) for of in pipes}
        seconds = interleave(runs, options.inversions, 0)
        return [
            Inverted(
                of,
                summarise(seconds[of]).median_s,
                pipe.within / options.inversions,
                (pipe.evaluations["gradient"] - before[of]) // options.inversions,
                psnr(pixels[0], back[of]),
            )
            for of, pipe in pipes.items()
        ]


def table_of(inverted: Sequence[Inverted]) -> Table:
    """The first of them is what the others are compared with."""
    table = Table("engine", "s", "x eager", "s in gradients", "rows", "PSNR dB", title="Null-text inversion")
    for one in inverted:
        ratio = inverted[0].seconds / one.seconds
        figures = f"{one.seconds:.2f}", f"{ratio:.2f}", f"{one.in_gradients:.2f}", str(one.gradients)
        table.add_row(one.engine, *figures, f"{one.psnr_db:.2f}")
    return table
