"""`python -m bench starts`: the time to a first image, built and from a bundle that is there, and to another strength.

A strength is switched by a rebuild, by replaced weights (refit) or as an input (runtime); the last makes each call of
the UNet longer, and by how much is measured on one guided image, in turns with a UNet whose LoRA is fused.

Each figure comes from a process of its own that starts from nothing, imports included, with a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from bench.apart import apart
from bench.options import A_MODEL, Parser, json_file, names
from bench.results import write
from engines.recipes import SETTABLE
from engines.select import check_runs

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["JOBS", "main", "measured"]

JOBS = ("first", "second", "rebuild", "refit", "runtime")
STRENGTHS = (0.6, 1.0, 0.6)
CALLS = 30  # timed calls of each UNet


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises:
        SmoothRTError: an option is wrong or an engine does not work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="smooth-rt bench starts", description=__doc__)
    parser.add_argument("--model", default="default", help=f"{A_MODEL}; default: the shipped one")
    parser.add_argument("--lora", default="default", help="a hub id, a folder or a file; default: the shipped one")
    able = [name for name, precisions in SETTABLE["refit"][1].items() if "fp32" in precisions]
    parser.add_argument(
        "--engine",
        type=names(*able),
        default=("onnxruntime", "openvino"),
        help=f"of {', '.join(able)}; default: onnxruntime,openvino",
    )
    parser.add_argument("--num-inference-steps", dest="steps", type=int, default=10, help="default: 10")
    parser.add_argument("--output", type=json_file, help="a JSON file of the figures")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # one of them, in this process
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.asked(arguments, ("num_inference_steps",), ("model", "lora"))
    if options is None:
        return
    if options.job:
        print(json.dumps(_job(options)))
        return
    for backend in options.engine:
        check_runs(backend)
    # Not above: a job's imports are its own, and measured.
    from bench.subject import check_steps

    check_steps(options.model, options.steps)
    rows = [measured(options, backend) for backend in options.engine]
    _print(rows, options)
    write(rows, options.output)


def measured(options: argparse.Namespace, backend: str) -> dict[str, Any]:
    """All figures of one backend, in seconds.

    Raises:
        EngineError: a process failed; its last line is passed on.
    """
    row: dict[str, Any] = {"engine": backend}
    with tempfile.TemporaryDirectory(prefix="smooth-rt-bench-") as cache:
        for job in JOBS:
            print(f"measuring {job} of {backend}", file=sys.stderr, flush=True)
            arguments = ["--job", job, "--cache", cache, "--engine", backend, "--model", options.model]
            arguments += ["--lora", options.lora, "--num-inference-steps", str(options.steps)]
            row |= apart("bench.starts", arguments, f"{job} of {backend}: failed ({{}})".format)
    row["second_start"] = row["first_s"] / row["second_s"]
    row["refit"] = row["rebuild_s"] / row["refit_s"]
    row["runtime_call"] = row["runtime_call_s"] / row["fused_call_s"]
    return row


def _job(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the start of this process's work; the interpreter's own start is left out of all of them alike."""
    import os

    os.environ["SMOOTH_RT_CACHE"] = str(options.cache)
    started = time.perf_counter()
    from smooth_rt.pipeline import SmoothPipeline

    def image(pipe: SmoothPipeline) -> None:
        import torch

        pipe(
            "red apple on blue background",
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(0),
        )

    job, (backend,) = options.job, options.engine
    strength = 0.5 if job == "rebuild" else 1.0
    lora_mode = job if job in ("refit", "runtime") else "fused"
    pipe = SmoothPipeline.from_pretrained(options.model, options.lora, strength, backend, lora_mode=lora_mode)
    if lora_mode != "fused":
        image(pipe)
        seconds = []
        for value in STRENGTHS:
            begun = time.perf_counter()
            pipe.set_lora_strength(value)
            seconds.append(time.perf_counter() - begun)
        calls: dict[str, float] = {}
        if job == "runtime":
            fused = SmoothPipeline.from_pretrained(options.model, options.lora, strength, backend)
            calls = _calls({"fused": fused, "runtime": pipe})
        return {f"{job}_s": sorted(seconds)[len(seconds) // 2], **calls}
    if job == "rebuild":
        return {"rebuild_s": time.perf_counter() - started}
    image(pipe)
    return {f"{job}_s": time.perf_counter() - started}


def _calls(pipes: Mapping[str, SmoothPipeline]) -> dict[str, float]:
    """The median seconds of a UNet's call for one guided image, by pipe."""
    from bench.timing import interleave, summarise

    def call(pipe: SmoothPipeline) -> Callable[[], object]:
        noise, texts = pipe.draw_noise(1, None, None, None), pipe.encode_prompt(["red apple on blue background", ""])
        return lambda: pipe.predict(noise, 500, texts[:1], texts[1:], 7.5)

    found = interleave({name: call(pipe) for name, pipe in pipes.items()}, CALLS, 2)
    return {f"{name}_call_s": summarise(seconds).median_s for name, seconds in found.items()}


# What is told of each engine: the figure, its unit and the seconds' factor, the ratio to a figure above, and its kind.
_FIGURES = (
    ("first image, engines built", "first_s", "s", 1.0, None),
    ("first image, from the bundle", "second_s", "s", 1.0, ("second_start", "faster")),
    ("another strength, rebuilt", "rebuild_s", "s", 1.0, None),
    ("another strength, refit", "refit_s", "s", 1.0, ("refit", "faster")),
    ("another strength, runtime", "runtime_s", "us", 1e6, None),
    ("a call of the UNet, fused", "fused_call_s", "ms", 1e3, None),
    ("a call of the UNet, runtime", "runtime_call_s", "ms", 1e3, ("runtime_call", "as long")),
)


def _print(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    title = f"{options.model}, {options.steps} steps to the first image"
    table = Table("", *(row["engine"] for row in rows), title=title)
    for what, name, unit, factor, ratio in _FIGURES:
        told = (f"{row[name] * factor:.3g} {unit}" for row in rows)
        beside = (f" ({row[ratio[0]]:.3g} times {ratio[1]})" if ratio else "" for row in rows)
        table.add_row(what, *map("".join, zip(told, beside, strict=True)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
