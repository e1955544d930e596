"""A bar on stderr for work that takes long. It is for people: it does not appear in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["BAR_WIDTH", "SAY_EVERY", "bar", "cut"]

SAY_EVERY = 30.0  # seconds from line to line where there is no terminal
BAR_WIDTH = 12


def bar(*columns: str, console: Console, transient: bool = True, quiet: bool = False) -> Progress:
    """A description, the bar and `columns`; each stays whole.

    Args:
        columns: "count" (done of all), "elapsed", "remaining", or a text as rich takes it: "{task.fields[left]}".
        console: that it is shown on, if that is a terminal.
        transient: it goes when it is done.
        quiet: nothing is shown.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    whole = Column(no_wrap=True)
    known = {"count": MofNCompleteColumn, "elapsed": TimeElapsedColumn, "remaining": TimeRemainingColumn}
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=whole),
        BarColumn(BAR_WIDTH),
        *(
            known[name](table_column=whole) if name in known else TextColumn(name, markup=False, table_column=whole)
            for name in columns
        ),
        console=console,
        transient=transient,
        disable=quiet or not console.is_terminal,
    )


def cut(text: str, room: int) -> str:
    """`text` in at most `room` characters."""
    return text if len(text) <= room else f"{text[: room - 1]}…" if room > 0 else ""
