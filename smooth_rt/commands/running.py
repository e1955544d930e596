"""What the commands that run a model have in common: opening it, seeds, progress on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smooth_rt.commands.options import ModelOptions, RunOptions
from smooth_rt.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Generator

    from smooth_rt.pipeline import SmoothPipeline, StepCallback

__all__ = ["Stopwatch", "build_progress", "described", "generators", "item_progress", "open_pipeline", "step_progress"]


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._began, 3)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # A bar is for people: it goes when it is done, and does not appear in a log.
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def step_progress(description: str, steps: int) -> Iterator[StepCallback]:
    """A progress bar on stderr for `steps` denoising steps in all, as a `callback_on_step_end`."""
    with _bar() as progress:
        task = progress.add_task(description, total=steps)

        def advance(*_: Any) -> None:
            progress.advance(task)

        yield advance


@contextmanager
def item_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for items done and in all."""
    with _bar() as progress:
        task = progress.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield show


@contextmanager
def build_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for the stages of a build: `progress(stage, done, total)`."""
    with _bar() as progress:
        task = progress.add_task("building engines", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"building engines: {stage}", completed=done, total=total)

        yield show


def open_pipeline(options: RunOptions) -> SmoothPipeline:
    """The pipeline that the options name: a bundle, or a model with its LoRA, on an engine.

    Raises:
        InputError: a bundle is named together with a model or a LoRA.
    """
    from smooth_rt.pipeline import SmoothPipeline

    if options.engines is not None:
        refuse_model(options)
        return SmoothPipeline.from_engines(options.engines, options.engine)
    with build_progress() as progress:
        return SmoothPipeline.from_pretrained(
            options.model, options.chosen_lora, options.lora_strength, options.engine, progress=progress
        )


def refuse_model(options: ModelOptions) -> None:
    """A bundle holds its model and its LoRA: refuse others beside it."""
    if options.model != "default" or options.lora is not None or options.lora_strength != 1.0:
        raise InputError("--engines: the bundle holds its model and LoRA; leave out --model and --lora")


def generators(seeds: range | tuple[int, ...]) -> list[Generator]:
    """A generator for each seed.

    Raises:
        InputError: a seed is not in -2**63..2**64 - 1, which torch takes.
    """
    import torch

    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise InputError(f"seed {seed}: does not fit into 64 bits; give a smaller one")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def described(pipe: SmoothPipeline, options: ModelOptions) -> dict[str, Any]:
    """What really ran, for a command's result."""
    lora = pipe.bundle.source.lora if pipe.bundle is not None else None
    named = lora.source if lora is not None else options.chosen_lora if pipe.bundle is None else None
    return {"model": pipe.source, "lora": named, "engine": pipe.engine, "reason": pipe.reason}
