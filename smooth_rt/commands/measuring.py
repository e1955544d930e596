"""What the commands of `evaluate` have in common: variants measured side by side, kept row by row; files written.

Rows lie under `--output`/rows, in a file named by all that decides them, so that a command that was stopped goes on and
another one begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smooth_rt.commands.options import RunOptions
from smooth_rt.commands.progress import item_progress
from smooth_rt.commands.running import Stopwatch, described, open_pipeline

if TYPE_CHECKING:
    from smooth_rt.evaluation.rows import Task

__all__ = ["Measured", "check_file", "finish", "measured"]


class Measured(NamedTuple):
    """A variant of the model, its rows, what of the run is told, and the task, with a folder if it keeps pictures."""

    variant: str
    rows: list[dict[str, Any]]
    told: dict[str, Any]
    task: Any


def measured(
    options: RunOptions, name: str, task: Task, processes: int, gradients: Sequence[str] = ()
) -> Iterator[Measured]:
    """Rows of the model without and with its LoRA, one after the other; of a bundle, of what it holds.

    Args:
        gradients: that the task takes, as in `open_pipeline`.
    """
    from engines.bundle import digest_json
    from smooth_rt.evaluation.rows import Rows, collect
    from smooth_rt.lora import read_lora

    plain = replace(options, lora="none")
    named = {"bundle": options} if options.engines is not None else {"base": plain}
    if options.engines is None and options.chosen_lora is not None:
        named["smooth"] = options
        read_lora(options.chosen_lora)  # an error of its file is said before hours of the base model
    held = fields(task)  # type: ignore[arg-type]
    asked = {f.name: getattr(task, f.name) for f in held if not f.metadata.get("aside")}
    keeps = any(f.name == "pictures" for f in held)
    for variant, chosen in named.items():
        with open_pipeline(chosen, gradients) as pipe, item_progress(f"{name}, {variant}") as progress:
            watch = Stopwatch()
            told = described(pipe, chosen)
            settings = {"measurement": name, "engine": pipe.engine, **pipe.digests, "of": digest_json(_plain(asked))}
            path = options.output / "rows" / f"{name}-{variant}-{digest_json(settings)[:12]}.jsonl"
            rows = Rows(path, settings)
            mine: Any = replace(task, pictures=path.with_suffix("")) if keeps else task  # type: ignore[type-var]
            # Another process cannot be handed a pipeline: it opens its own, from the engines that are built by now.
            again = partial(open_pipeline, chosen, gradients)
            opened: Callable[[], Any] = partial(nullcontext, pipe) if processes == 1 else again
            found = collect(mine, opened, rows, processes, progress)
            told["seconds"] = watch.seconds
        yield Measured(variant, found, told, mine)


def _plain(value: Any) -> Any:
    """`value` as JSON holds it; paths by name."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def check_file(options: RunOptions, name: str, inputs: Sequence[Path]) -> None:
    from smooth_rt.writers import check_output

    check_output(options.output, [f"{name}.json", f"{name}.md", f"{name}.svg"], [*inputs, *options.inputs])


def finish(
    options: RunOptions,
    name: str,
    setup: dict[str, Any],
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    notes: Sequence[str],
    files: dict[str, bytes] | None = None,
) -> dict[str, Any]:
    """Write the whole as JSON and as a table; of what is printed for people, leave out what fills a page."""
    from smooth_rt.commands.show import finite
    from smooth_rt.evaluation.tables import markdown
    from smooth_rt.writers import encode_json, write_files

    result = {**setup, "results": rows}
    table = markdown(setup["command"], columns, rows, notes).encode()
    written = write_files(
        options.output, {f"{name}.json": encode_json(finite(result)), f"{name}.md": table, **(files or {})}
    )
    if not options.json:
        long = ("per_prompt", "reason", "model", "lora", "pictures")
        result["results"] = [
            {key: value for key, value in row.items() if key not in long and not key.endswith("_95_percent")}
            for row in rows
        ]  # the notes and the table have the intervals
        result |= {"notes": list(notes)} if notes else {}
    return {**result, "file": str(written[0]), "files": [str(path) for path in written[1:]]}
