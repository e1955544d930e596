"""Progress on stderr: a bar for people, and now and then a line where stderr is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smooth_rt.bar import BAR_WIDTH, SAY_EVERY, bar, cut

if TYPE_CHECKING:
    from smooth_rt.loop import StepCallback

__all__ = ["TimeLeft", "build_progress", "item_progress", "step_progress"]

SAY_ANOTHER = 5.0  # seconds before another stage is told of, which may be a long one
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
    from rich.console import Console

    with bar("count", "elapsed", console=Console(stderr=True)) as progress:
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
    from rich.console import Console

    left = TimeLeft()
    with bar("elapsed", "{task.fields[left]}", console=Console(stderr=True)) as progress:
        task = progress.add_task("checking engines", total=None, left=left)
        said, told = time.monotonic(), ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal said, told
            left.update(done, total)
            # Of a narrow terminal the text gives way, and never the times.
            room = max(0, progress.console.width - BAR_WIDTH - TIMES_WIDTH)
            progress.update(task, description=cut(f"{prefix}{stage}", room), completed=done, total=total)
            pause = SAY_EVERY if stage == told else SAY_ANOTHER
            if not progress.console.is_terminal and time.monotonic() - said >= pause:
                said, told = time.monotonic(), stage
                print(f"{prefix}{stage}; {100 * done // max(total, 1)} % done, {left}", file=sys.stderr, flush=True)

        yield show
