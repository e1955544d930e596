"""A measurement as a file of rows, one JSON line an item, that grows as it is measured: what is stopped goes on later.

Items are measured in batches that the task alone decides, so several processes, which take whole batches each, find
what one finds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from engines.paths import absolute
from smooth_rt.errors import EngineError, InputError, SmoothRTError, reason
from smooth_rt.pipeline import SmoothPipeline

__all__ = ["ASIDE", "Open", "Progress", "Rows", "Task", "collect", "in_batches"]

ASIDE = {"aside": True}  # metadata of a task's field that does not decide its rows

Row = dict[str, Any]
Progress = Callable[[int, int], None]
Open = Callable[[], AbstractContextManager[SmoothPipeline]]


class Task(Protocol):
    """What is measured of a pipeline, item by item; a dataclass that can be sent to another process."""

    def batches(self) -> list[list[int]]:
        """The numbers of the items, as they are measured together."""

    def measure(self, pipe: SmoothPipeline, items: Sequence[int]) -> list[Row]:
        """A row an item, of what JSON holds."""


def in_batches(count: int, size: int) -> list[list[int]]:
    """Items 0 to `count` - 1, so many at a time."""
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


class Rows:
    """The rows of one measurement in memory, and in `path` if given, whose first line says of what.

    Args:
        settings: all that decides the rows.

    Raises:
        InputError: the file holds rows of other settings, or none of this kind. A last line that was cut off is
            dropped.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self.path = path = None if path is None else absolute(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings or {}))
        self.found: dict[int, Row] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            whole = lines[:-1]  # each line ends; what follows the last end was cut off
            if not whole:  # not even the first: as if there were no file
                self._write("", "w")
                return
            first, *rest = (json.loads(line) for line in whole)
            held = first["settings"]
            rows = {int(row.pop("item")): row for row in rest}
            if len({frozenset(row) for row in rows.values()}) > 1:
                raise ValueError("rows of several kinds")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not rows of a measurement ({reason(error)}); name another --output") from error
        if held != self.settings:
            names = [name for name in {**held, **self.settings} if held.get(name) != self.settings.get(name)]
            raise InputError(
                f"{path}: rows of another {', '.join(names)}; remove it, or name another --output to keep them"
            )
        self.found = rows
        if lines[-1]:
            self._write("".join(f"{line}\n" for line in whole), "w")

    def add(self, items: Iterable[tuple[int, Row]]) -> None:
        """Keep rows, and write them.

        Raises:
            SmoothRTError: the file cannot be written.
        """
        new = dict(items)
        if self.path is not None:
            lines = [json.dumps({"item": item, **row}) for item, row in new.items()]
            if not self.path.exists() or not self.path.stat().st_size:
                lines.insert(0, json.dumps({"settings": self.settings}))
            self._write("".join(f"{line}\n" for line in lines), "a")
        self.found |= new

    def _write(self, text: str, mode: str) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise SmoothRTError(f"{self.path}: cannot be written ({reason(error)}); make room") from error

    def of(self, count: int) -> list[Row]:
        """The rows of items 0 to `count` - 1, in order."""
        return [self.found[item] for item in range(count)]


def collect(
    task: Task, open_pipeline: Open, rows: Rows, processes: int = 1, progress: Progress | None = None
) -> list[Row]:
    """Measure the items that `rows` lacks, and give the rows of all, in order.

    Args:
        open_pipeline: opens the pipeline; for several processes it must be something that can be sent to them.
        processes: each takes whole batches, and an equal part of the cores.
        progress: called with items done and in all.

    Raises:
        SmoothRTError: a batch failed, here or in a process; the rows of those before it are kept.
    """
    batches = task.batches()
    total = sum(map(len, batches))
    # A batch is measured whole or not at all, since its items are rounded together.
    left = [batch for batch in batches if not all(item in rows.found for item in batch)]
    tell = progress or (lambda *_: None)
    tell(total - sum(map(len, left)), total)
    try:
        with _measuring(task, open_pipeline, left, processes) as measured:
            for batch, found in measured:
                rows.add(zip(batch, found, strict=True))
                tell(len(rows.found), total)
    except KeyboardInterrupt as error:
        kept = f"{len(rows.found)} of {total} are kept; run it again to go on" if rows.path else "nothing is kept"
        raise KeyboardInterrupt(f"interrupted; {kept}") from error
    return rows.of(total)


@contextmanager
def _measuring(
    task: Task, open_pipeline: Open, batches: list[list[int]], processes: int
) -> Iterator[Iterator[tuple[list[int], list[Row]]]]:
    if not batches:
        yield iter(())
    elif processes == 1:
        with open_pipeline() as pipe:
            yield ((batch, task.measure(pipe, batch)) for batch in batches)
    else:
        # Spawned, since a forked process inherits locks of the engines' threads.
        context = multiprocessing.get_context("spawn")
        results: Any = context.Queue()
        threads = max(1, (os.cpu_count() or 1) // processes)
        shares = [batches[rank::processes] for rank in range(processes)]
        workers = [
            context.Process(target=_work, args=(task, open_pipeline, share, results, threads), daemon=True)
            for share in shares
            if share
        ]
        try:
            for worker in workers:
                worker.start()
            yield _results(results, workers, len(batches))
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()


def _results(results: Any, workers: list[Any], count: int) -> Iterator[tuple[list[int], list[Row]]]:
    for _ in range(count):
        while True:
            try:
                batch, found, failed = results.get(timeout=1)
                break
            except queue.Empty:
                dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
                if dead:
                    raise EngineError(
                        f"processes: one ended by itself (exit code {dead[0].exitcode}), for want of memory perhaps; "
                        "what was measured is kept: run it again with fewer --processes"
                    ) from None
        if failed:
            raise EngineError(f"{failed}; what was measured is kept: run it again to go on")
        yield batch, found


def _work(task: Task, open_pipeline: Open, batches: list[list[int]], results: Any, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        with open_pipeline() as pipe:
            for batch in batches:
                results.put((batch, task.measure(pipe, batch), ""))
    except KeyboardInterrupt:
        return  # the main process has had it too, and speaks
    except Exception as error:
        results.put(([], [], str(error) if isinstance(error, SmoothRTError) else reason(error)))
