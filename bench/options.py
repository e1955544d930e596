"""The command line of the benchmark. Its options bear the names of `smooth-rt`'s own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from engines.select import BACKENDS
from smooth_rt.errors import InputError
from smooth_rt.ranges import MOST_IMAGES, check, check_count, check_text, seeds_from

__all__ = ["A_MODEL", "Options", "Parser", "batch_sizes", "folder", "json_file", "names", "parse"]

REPORTS = ("bench.json", "bench.md")
PROMPT = "red apple on blue background"
A_MODEL = "a hub id, a diffusers folder or a .safetensors checkpoint"


@dataclass(frozen=True)
class Options:
    """What was asked for; None stands for what the model or the machine decides."""

    model: str
    config: str | None
    lora: str | None
    lora_strength: float
    engines: tuple[str, ...] | None
    batch_sizes: tuple[int, ...]
    height: int | None
    width: int | None
    steps: int
    guidance_scale: float
    frames: int
    repeats: int
    warmup: int
    seed: int
    prompt: str
    matrix_side: int
    output: Path
    json: bool


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, as everywhere."""

    def __init__(self, **named: Any) -> None:
        super().__init__(allow_abbrev=False, **named)
        # Read in `smooth_rt.cli.main`, which says errors.
        self.add_argument("--debug", action="store_true", help="show the whole traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"bench: {message}; see --help")

    def asked(
        self, arguments: Sequence[str], counts: Sequence[str] = (), sources: Sequence[str] = ()
    ) -> argparse.Namespace | None:
        """What was asked for; None where that was help, which has been printed.

        Args:
            counts: options, as `--num-inference-steps` is "num_inference_steps", whose values are counts.
            sources: those that `smooth_rt.ranges` knows by their names.

        Raises:
            InputError: an option is unknown, or its value is none or no count.
        """
        try:
            found = self.parse_args(list(arguments))
        except SystemExit:  # --help
            return None
        dests = {option.lstrip("-").replace("-", "_"): a.dest for a in self._actions for option in a.option_strings}
        for name in counts:
            check_count(name, getattr(found, dests[name]))
        check(**{name: getattr(found, dests[name]) for name in sources})
        return found


def parse(arguments: Sequence[str]) -> Options | None:
    """Read the command line; None where it asked for help, which has been printed.

    Raises:
        InputError: an option is unknown or its value out of range.
    """
    parser = _parser()
    parser.set_defaults(**(_QUICK if "--quick" in arguments else _FULL))
    asked = parser.asked(arguments)
    if asked is None:
        return None
    found = vars(asked)
    found["lora"] = _lora(found["model"], found["lora"])
    options = Options(**{field.name: found[field.name] for field in fields(Options)})
    _check(options)
    return options


# What --quick changes, and what stands without it.
_FULL = {"batch_sizes": (1, 4, 16), "steps": 50, "frames": 24, "repeats": 10, "warmup": 2, "matrix_side": 2048}
_QUICK = {"batch_sizes": (2,), "steps": 2, "frames": 3, "repeats": 3, "warmup": 1, "matrix_side": 1024}


def _parser() -> Parser:
    parser = Parser(
        prog="smooth-rt bench",
        description="Parity, times, memory and the distance to the floor of every engine, beside diffusers.",
    )
    parser.add_argument("--model", default="default", help=f"{A_MODEL}; default: the shipped one")
    parser.add_argument(
        "--model-config", dest="config", metavar="FOLDER_OR_HUB_ID", help="for a .safetensors checkpoint, as everywhere"
    )
    parser.add_argument("--lora", help="a Smooth-LoRA to fuse; none: none; default: the shipped one, of its model")
    parser.add_argument("--lora-strength", type=float, default=1.0, help="default: 1.0")
    parser.add_argument(
        "--engine", dest="engines", type=names("auto", *BACKENDS), metavar="E[,E…]",
        help="of auto, eager, onnxruntime, openvino (default: all that can run here)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-sizes", "--batch-size", type=batch_sizes, metavar="N[,N…]", help="images; default: 1,4,16"
    )
    parser.add_argument("--num-inference-steps", dest="steps", type=int, help="DDIM steps; default: 50")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--frames", type=int, help="of the morph; default: 24")
    parser.add_argument("--repeats", type=int, help="timed runs of each case; default: 10")
    parser.add_argument("--warmup", type=int, help="runs before them that are not timed; default: 2")
    parser.add_argument("--height", type=int, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, help="pixels; default: the model's")
    parser.add_argument("--prompt", default=PROMPT, help=f"default: {PROMPT!r}")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output", type=folder, default=Path("bench-results"),
        help="files of the same names are replaced; default: ./bench-results",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few steps and repeats: does it run, not how fast")
    parser.add_argument("--json", action="store_true", help="print the report as JSON in the place of tables")
    return parser


def names(*known: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names, each once, of `known`; argparse says what is wrong with them."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            said = f"{unknown[0]!r} is unknown" if unknown else "empty"
            raise argparse.ArgumentTypeError(f"{said}; name one or more of {', '.join(known)}")
        return found

    return read


def batch_sizes(text: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list, each once, rising; argparse says what is wrong with one."""
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError:
        sizes = [0]
    if not 1 <= sizes[0] <= sizes[-1] <= MOST_IMAGES:
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is not a list of whole numbers from 1 to {MOST_IMAGES}, such as 1,4,16"
        )
    return tuple(sizes)


def folder(text: str) -> Path:
    """A folder that a report can be written into; argparse says what is wrong with one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty; name a folder")
    from smooth_rt.writers import check_output

    try:
        return check_output(text, REPORTS)
    except InputError as error:
        # Which option it is, argparse says.
        raise argparse.ArgumentTypeError(str(error).removesuffix(" with --output")) from error


def json_file(text: str) -> Path:
    """A file that can be written, or replaced; argparse says what is wrong with it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty; name a file, such as figures.json")
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder; name a file, such as {path / 'figures.json'}")
    folder(str(path.parent))
    return path


def _lora(model: str, lora: str | None) -> str | None:
    """The rule of every command: left out, it is the shipped LoRA with the shipped model; "none" is none."""
    if lora is None:
        return "default" if model == "default" else None
    return None if lora.lower() == "none" else lora


def _check(options: Options) -> None:
    for name, text in (("model", options.model), ("lora", options.lora or ""), ("prompt", options.prompt)):
        check_text(f"--{name}", text)
    check(
        model=options.model,
        config=options.config,
        lora=options.lora,
        lora_strength=options.lora_strength,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        frames=options.frames,
        height=options.height,
        width=options.width,
    )
    # Each image of the largest batch has a seed, and a morph has two.
    seeds_from(options.seed, max(2, *options.batch_sizes))
    check_count("repeats", options.repeats)
    check_count("warmup", options.warmup, least=0)
    if options.seed < 0:
        raise InputError(f"seed={options.seed}: give a whole number of at least 0")
    # Below 1 diffusers leaves guidance out, and nothing would be left to compare.
    if options.guidance_scale < 1:
        raise InputError(f"guidance_scale={options.guidance_scale}: give a number of at least 1, such as 7.5")
    if not options.prompt.strip():
        raise InputError("--prompt: empty; give words, since guidance away from the empty prompt would do nothing")
