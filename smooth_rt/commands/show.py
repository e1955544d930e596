"""Print a command's result: for machines one JSON object, for people lines and tables."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["finite", "json_text", "show"]

LONGEST_WORD = 32


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print `result` on stdout. In JSON, a number that is not finite is null, as JSON has no word for it."""
    if as_json:
        print(json_text(result))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for name, value in result.items():
        if name == "command" or value is None:
            continue
        if value == []:
            console.print(f"{name}: none")
            continue
        said = _SAID.get(name, _text)
        rows = value if isinstance(value, list) else []
        if rows and all(isinstance(row, Mapping) for row in rows):
            _table(console, name, rows)
        elif len(rows) > 1 and isinstance(rows[0], str):  # paths: one a line
            console.print(f"{name}: {len(rows)}")
            for item in rows:
                console.print(f"  {_text(item)}")
        else:
            console.print(f"{name}: {said(value)}")


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON for stdout: with escapes where its encoding has no character for what is in it."""
    said = json.dumps(finite(value), ensure_ascii=False, indent=indent)
    try:
        said.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(finite(value), indent=indent)
    return said


def _table(console: Any, name: str, rows: list[Mapping[str, Any]]) -> None:
    """A table; on a terminal that is too narrow for it, a block of lines for each row."""
    from rich import box
    from rich.table import Table

    console.print(f"{name}:")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    taken = 0
    for column in rows[0]:
        cells = [_cell(row, column) for row in rows]
        numeric = all(re.fullmatch(r"-?[\d.]+(e[-+]\d+)?( \w+)?", cell) for cell in cells if cell)
        # Words stay whole where they can; a digest or a path may break.
        longest = min(LONGEST_WORD, max(len(word) for text in (column, *cells) for word in [*text.split(), ""]))
        justify: Any = "right" if numeric else "left"
        table.add_column(column, justify=justify, overflow="fold", min_width=longest)
        taken += longest + 1
    if console.is_terminal and taken > console.width:
        for row in rows:
            widest = max(map(len, row))
            for column in row:
                console.print(f"  {column:<{widest}}  {_cell(row, column)}")
            console.print()
        return
    for row in rows:
        table.add_row(*(_cell(row, column) for column in row))
    console.print(table)


def _cell(row: Mapping[str, Any], column: str) -> str:
    return _SAID.get(column, _text)(row[column])


def _bytes(value: int) -> str:
    from engines.staging import said_size

    return said_size(value)


def _seconds(value: Any) -> str:
    """Seconds, and from two minutes on minutes as well."""
    if not isinstance(value, (int, float)) or value < 120:
        return _text(value)
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{round(value)} ({hours} h {minutes} min)" if hours else f"{round(value)} ({minutes} min {seconds} s)"


# What has a unit, by the name that it has in every result.
_SAID: dict[str, Callable[[Any], str]] = {"bytes": _bytes, "seconds": _seconds}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        apart = "; " if any(isinstance(item, (Mapping, list, tuple)) for item in value.values()) else ", "
        return apart.join(f"{name} {_text(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join("-" if item is None else _text(item) for item in value)
    return str(value)


def finite(value: Any) -> Any:
    """`value` with None in the place of each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
