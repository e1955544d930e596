"""Progress on stderr: a bar for people, and now and then a line where stderr is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from smooth_rt.loop import StepCallback

__all__ = ["TimeLeft", "build_progress", "item_progress", "step_progress"]

SAY_EVERY = 30.0  # seconds
SAY_ANOTHER = 5.0  # seconds before another stage is told of, which may be a long one
BAR_WIDTH = 12
LEAST_DONE = 0.05  # of a job, before the time that is left is guessed from it
TIMES_WIDTH = 24  # of 0:12:34 and 1:23:45 left, with the spaces between


class TimeLeft:
    """Guesses the seconds that are left, from those that the part that is done has taken.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None
        self._done = self._total = 0
        self._guess: tuple[float, float] | None = None

    def update(self, done: int, total: int) -> None:
        """Note that `done` parts of `total` are done; of another total, all begins anew."""
        now = self._clock()
        if self._began is None or total != self._total or done < self._done:
            self._began, self._guess = (now, done), None
        since, first = self._began
        enough = done > first and done - first >= LEAST_DONE * (total - first)
        if enough and (done > self._done or self._guess is None):
            self._guess = (now, (now - since) / (done - first) * (total - done))
        self._done, self._total = done, total

    @property
    def seconds(self) -> float | None:
        """None where nothing is known: at the beginning, and of a step that takes longer than all that was left was
        to take. In between it falls with the clock, and the slower the longer a step lasts."""
        if self._guess is None:
            return None
        at, left = self._guess
        if left <= 0:
            return 0.0
        since = self._clock() - at
        return left * math.exp(-since / left) if since <= left else None

    def __str__(self) -> str:
        seconds = self.seconds
        if seconds is None:
            return "-:-- left"
        hours, minutes = divmod(int(seconds) // 60, 60)
        return (
            f"{hours}:{minutes:02}:{int(seconds) % 60:02} left" if hours else f"{minutes}:{int(seconds) % 60:02} left"
        )


def _bar(after: str | None = None) -> Progress:
    """A bar with what is done of how much and the time that it took; `after`, if given, in the place of the count."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    whole = Column(no_wrap=True)
    elapsed = TimeElapsedColumn(table_column=whole)
    count = MofNCompleteColumn(table_column=whole) if after is None else TextColumn(after, table_column=whole)
    console = Console(stderr=True)
    # A bar is for people: it goes when it is done, and does not appear in a log.
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=whole),
        BarColumn(BAR_WIDTH),
        *((count, elapsed) if after is None else (elapsed, count)),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def step_progress(description: str, steps: int) -> Iterator[StepCallback]:
    """A progress bar on stderr for `steps` denoising steps in all, as a `callback_on_step_end`.

    There is a line now and then where stderr is no terminal.
    """
    done = 0
    with item_progress(f"{description}, steps", steps) as show:

        def advance(*_: Any) -> None:
            nonlocal done
            done += 1
            show(done, max(done, steps))

        yield advance


@contextmanager
def item_progress(description: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for items done and in all; a line now and then where stderr is no terminal."""
    with _bar() as progress:
        task = progress.add_task(description, total=total)
        said = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal said
            progress.update(task, completed=done, total=total)
            if not progress.console.is_terminal and time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                print(f"{description}: {done} of {total}", file=sys.stderr, flush=True)

        yield show


@contextmanager
def build_progress(prefix: str = "building: ") -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for the stages of a build: `progress(stage, done, total)`, in parts of the whole time.

    It tells the time that is left, too. Where stderr is no terminal there is a line now and then.
    """
    left = TimeLeft()
    with _bar("{task.fields[left]}") as progress:
        task = progress.add_task("checking engines", total=None, left=left)
        said, told = time.monotonic(), ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal said, told
            left.update(done, total)
            # Of a narrow terminal the text gives way, and never the times.
            room = max(0, progress.console.width - BAR_WIDTH - TIMES_WIDTH)
            what = f"{prefix}{stage}"
            what = what if len(what) <= room else f"{what[: room - 1]}…"
            progress.update(task, description=what, completed=done, total=total)
            pause = SAY_EVERY if stage == told else SAY_ANOTHER
            if not progress.console.is_terminal and time.monotonic() - said >= pause:
                said, told = time.monotonic(), stage
                print(f"{prefix}{stage}; {100 * done // max(total, 1)} % done, {left}", file=sys.stderr, flush=True)

        yield show
