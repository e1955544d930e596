"""How far a training run is, on stderr: a bar for people, and now and then a line where stderr is no terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console

from smooth_rt.bar import BAR_WIDTH, SAY_EVERY, bar, cut

__all__ = ["run_progress"]

TIMES_WIDTH = 36  # of 12345/20000, of 12:34:56 and 1:23:45, and of the spaces between

log = logging.getLogger("smooth_rt")
Show = Callable[[int, Mapping[str, float], float], None]


@contextmanager
def run_progress(name: str, step: int, steps: int, quiet: bool = False) -> Iterator[Show]:
    """Gives a function that shows a run's step, its numbers, and its steps a second.

    Args:
        name: of the run.
        step: that it begins at.
        steps: in all.
        quiet: nothing is shown.
    """
    console, told = Console(stderr=True), time.monotonic()
    columns = ("count", "elapsed", "remaining", "{task.fields[said]}")
    with bar(*columns, console=console, transient=False, quiet=quiet) as progress:
        task = progress.add_task(name, total=steps, completed=step, said="")

        def show(step: int, numbers: Mapping[str, float], rate: float) -> None:
            nonlocal told
            said = " ".join([*(f"{key} {value:.4f}" for key, value in numbers.items()), f"{rate:.2f} steps/s"])
            # Of a narrow terminal the numbers give way, and never the steps and the times.
            room = max(0, console.width - len(name) - BAR_WIDTH - TIMES_WIDTH)
            progress.update(task, completed=step, said=cut(said, room))
            due = time.monotonic() - told >= SAY_EVERY or step == steps
            if due and not quiet and not console.is_terminal:
                told = time.monotonic()
                left = timedelta(seconds=round((steps - step) / rate)) if rate else "-"
                log.info("%s: step %d of %d, %s, %s left", name, step, steps, said, left)

        yield show
