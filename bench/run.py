"""A benchmark's run: parses, measures, prints, writes."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib import import_module

from rich.console import Console
from rich.markup import escape

from bench.options import Options, parse

__all__ = ["run"]

PIPE_WIDTH = 110


def run(arguments: list[str]) -> None:
    """Run one benchmark, print its report and write it.

    Raises:
        SmoothRTError: an option is wrong, or the model, the LoRA or an engine does not work.
    """
    if arguments[:1] in (["engines"], ["gpu"], ["gradients"], ["starts"], ["threads"]):
        import_module(f"bench.{arguments[0]}").main(arguments[1:])
        return
    options = parse(arguments)
    if options is not None:
        _run(options)


def _run(options: Options) -> None:
    # Imported here, so that --help and a bad option answer at once.
    from bench.environment import busy, environment, uneven, warn
    from bench.measure import measure
    from bench.report import print_report, write_report
    from smooth_rt.commands.show import json_text

    here = environment()
    console = Console(stderr=True)
    warn(console, busy(here), uneven(here))
    started, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    # Libraries print what they like; with --json stdout holds the report alone.
    with redirect_stdout(sys.stderr if options.json else sys.stdout), console.status("starting") as status:
        report = measure(options, here, started, start, lambda words: status.update(escape(words)))
    paths = write_report(report, options.output)
    if options.json:
        print(json_text(report.model_dump(mode="json"), indent=2))
        return
    # A pipe has no width of its own; rich would take 80 and fold the figures.
    print_report(report, Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH))
    for path in paths:
        print(f"wrote {path}")
