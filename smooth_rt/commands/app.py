"""The command line as one tree: every command, in the order of the help page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands import bundles, demo, edit, evaluate, generate, interpolate, invert, models, paths, train
from smooth_rt.commands.checked import CheckedCommand
from smooth_rt.commands.options import flattened
from smooth_rt.errors import SmoothRTError

__all__ = ["UsageError", "call"]

# typer has carried click itself and a copy of it; in both, its usage errors are reached through this public subclass.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="smooth-rt",
    help="Interpolation, inversion and editing in a smooth latent space, on real engines.",
    epilog="Exit codes: 0 done; 2 what you can mend, told in one line; 1 a fault of the program; 130, 143, 129 after "
    "Ctrl-C, SIGTERM, SIGHUP, with nothing half-written left; 141 the reader of the output has gone.",
    add_completion=False,
)


def call(arguments: Sequence[str]) -> Any:
    """Run one command: what it returns, or the exit code of one that has printed its answer itself (--help).

    typer's own `main` would catch an interruption and lose what it says.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("smooth-rt", list(arguments)) as context:
            return command.invoke(context)
    except typer.Exit as done:
        return done.exit_code


def _group(name: str, text: str, commands: Sequence[tuple[str, Callable[..., Any]]]) -> None:
    group = typer.Typer(help=text)
    for command, function in commands:
        group.command(command, cls=CheckedCommand)(flattened(function))
    app.add_typer(group, name=name)


app.command("demo", cls=CheckedCommand)(flattened(demo.demo))
app.command("generate", cls=CheckedCommand)(flattened(generate.generate))
app.command("interpolate", cls=CheckedCommand)(flattened(interpolate.interpolate))
app.command("invert", cls=CheckedCommand)(flattened(invert.invert))
app.command("edit", cls=CheckedCommand)(flattened(edit.edit))
app.command("fuse", cls=CheckedCommand)(flattened(models.fuse))
app.command("build-engine", cls=CheckedCommand)(flattened(models.build_engine))
_group(
    "engines",
    "Bundles of built engines: list, inspect, verify, prune, export-key.",
    [
        ("list", bundles.list_engines),
        ("inspect", bundles.inspect_engines),
        ("verify", bundles.verify_engines),
        ("prune", bundles.prune_engines),
        ("export-key", bundles.export_key),
    ],
)
_group(
    "train", "Train the default model, or a Smooth-LoRA.", [("tiny", train.tiny), ("smooth-lora", train.smooth_lora)]
)
_group(
    "evaluate",
    "Measure smoothness, paths, inversion, editing and the images' quality, with and without the LoRA.",
    [
        ("istd", evaluate.istd),
        ("interpolation", paths.interpolation),
        ("inversion", evaluate.inversion),
        ("editing", evaluate.editing),
        ("quality", evaluate.quality),
    ],
)


@app.command(
    "bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(context: typer.Context) -> None:
    """The same as `python -m bench`: takes its options, for which see `smooth-rt bench --help`."""
    for package in ("bench", "export"):
        _check_ours(package)
    from bench.run import run

    run(list(context.args))


def _check_ours(package: str) -> None:
    """Another distribution may own a top-level package of this name, and overwrite or hide ours."""
    from importlib.util import find_spec

    here = Path(__file__).resolve().parents[2]
    spec = find_spec(package)
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    if found != here / package:
        what = f"is {found}, another project's" if found else "is missing"
        raise SmoothRTError(f"{package}: {what}; install smooth-rt again, in an environment of its own")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from smooth_rt import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
