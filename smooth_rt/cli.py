"""`smooth-rt`: parses, calls, prints; no logic of its own.

Exit codes: 0 done; 1 a fault of the program; 2 something that the user can act on, in one line; 130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands import demo, evaluate, models, tasks, train
from smooth_rt.commands.checked import CheckedCommand
from smooth_rt.commands.options import flattened
from smooth_rt.commands.show import show
from smooth_rt.errors import SmoothRTError

__all__ = ["app", "main"]

# typer has carried click itself and a copy of it; in both, its usage errors are reached through this public subclass.
UsageError: Any = typer.BadParameter.__base__
INTERRUPTED = 130

app = typer.Typer(
    name="smooth-rt",
    help="Interpolation, inversion and editing in a smooth latent space, on real engines.",
    add_completion=False,
)


def _group(name: str, text: str, commands: Sequence[tuple[str, Callable[..., Any]]]) -> None:
    group = typer.Typer(help=text)
    for command, function in commands:
        group.command(command, cls=CheckedCommand)(flattened(function))
    app.add_typer(group, name=name)


app.command("demo", cls=CheckedCommand)(flattened(demo.demo))
app.command("generate", cls=CheckedCommand)(flattened(tasks.generate))
app.command("interpolate", cls=CheckedCommand)(flattened(tasks.interpolate))
app.command("invert", cls=CheckedCommand)(flattened(tasks.invert))
app.command("edit", cls=CheckedCommand)(flattened(tasks.edit))
app.command("fuse", cls=CheckedCommand)(flattened(models.fuse))
app.command("build-engine", cls=CheckedCommand)(flattened(models.build_engine))
_group(
    "engines",
    "Bundles of built engines: list, inspect, verify, prune.",
    [
        ("list", models.list_engines),
        ("inspect", models.inspect_engines),
        ("verify", models.verify_engines),
        ("prune", models.prune_engines),
    ],
)
_group(
    "train", "Train the default model, or a Smooth-LoRA.", [("tiny", train.tiny), ("smooth-lora", train.smooth_lora)]
)
_group(
    "evaluate",
    "Measure smoothness and inversion, with and without the LoRA.",
    [("istd", evaluate.istd), ("inversion", evaluate.inversion)],
)


@app.command(
    "bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(context: typer.Context) -> Any:
    """The same as `python -m bench`: takes its options, for which see `smooth-rt bench --help`."""
    for package in ("bench", "export"):
        _check_ours(package)
    from bench.__main__ import main as run_bench

    return run_bench(list(context.args))


def _check_ours(package: str) -> None:
    """Another distribution may own a top-level package of this name, and overwrite or hide ours."""
    from importlib.util import find_spec

    here = Path(__file__).resolve().parent.parent
    spec = find_spec(package)
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    if found != here / package:
        what = f"is {found}, another project's" if found else "is missing"
        raise SmoothRTError(f"{package}: {what}; install smooth-rt again, in an environment of its own")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> Any:
    if version:
        from smooth_rt import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see the module's docstring). `argv` leaves out the program."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # The benchmark prints its own JSON.
    as_json = "--json" in arguments and arguments[0] != "bench"
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("smooth_rt").setLevel(logging.INFO)
    try:
        # Libraries print what they like; with --json stdout holds the result alone.
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            result = app(args=arguments, prog_name="smooth-rt", standalone_mode=False)
    except KeyboardInterrupt:
        result = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        # The program's own file names are short: such a path was typed.
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            error = SmoothRTError(f"{str(error.filename)[:60]}...: {error.strerror}; give a shorter path")
        print(_line(error, arguments), file=sys.stderr)
        return 2 if isinstance(error, (SmoothRTError, UsageError)) else 1
    # typer turns an interrupt, too, into the exit code that it returns here.
    if result == INTERRUPTED:
        print("interrupted; nothing half-written is left; run the same command again", file=sys.stderr)
    if isinstance(result, int):
        return result
    if result is not None:
        show(result, as_json)
    return 0


def _line(error: Exception, arguments: Sequence[str]) -> str:
    """One line for any error, whatever its message holds. A parameter at its start is named as the option typed."""
    if isinstance(error, UsageError):
        where = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        return f"error: {' '.join(error.format_message().split()).rstrip('.')}{where}"
    said = " ".join(str(error).split())
    if isinstance(error, SmoothRTError):
        parameter = re.match(r"([a-z]+(?:_[a-z]+)*)=", said)
        option = f"--{parameter[1].replace('_', '-')}" if parameter else ""
        if parameter and any(argument.split("=")[0] == option for argument in arguments):
            said = option + said[len(parameter[1]) :]
        return f"error: {said}"
    return f"error: {type(error).__name__}: {said}; a fault of the program: rerun with --debug and report it"


if __name__ == "__main__":
    sys.exit(main())
