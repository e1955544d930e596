"""`python -m bench engines`: the UNet on every engine of this machine, in the precisions for it, beside diffusers.

`--model sd15` is Stable Diffusion 1.5's UNet at full size with random weights, which need no download. What
images suffer by a precision, random weights do not say: `smooth-rt engines verify --images` does, on a real model.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.candidates import CANDIDATES, Candidate, asked, graphs
from bench.environment import busy, environment, warn
from bench.floor import count_flop, matrix_rates
from bench.results import write
from bench.subject import sd15
from engines.base import Engine
from engines.contract import Dims, contract
from engines.eager import EagerEngine, Unet
from engines.recipes import RECIPES
from engines.select import gpu, open_engine
from engines.variant import Bounds
from export.graphs import Case, random_inputs
from export.to_int8 import LADDER
from smooth_rt.errors import InputError, SmoothRTError
from smooth_rt.tasks.checks import image_side

__all__ = ["CANDIDATES", "Row", "main", "measure", "unet", "work_folder"]

PEER = "diffusers, eager fp32"


@dataclass(frozen=True)
class Row:
    """One candidate: seconds of a call (the fastest and the middle one), relative error to torch in fp32."""

    name: str
    seconds: float
    fastest: float
    speedup: float
    error: float
    first_result_in: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Raises:
        SmoothRTError: an option is wrong or an engine does not work.
    """
    options = _parse(list(sys.argv[1:] if argv is None else argv))
    if options is None:
        return
    here = environment()
    console = Console(stderr=True)
    warn(console, busy(here))
    with work_folder(options.work) as work, console.status("starting") as status:
        rows, facts = measure(options, work, lambda words: status.update(words))
    _print(rows, facts, options)
    content = {"rows": [asdict(row) for row in rows], **facts, "environment": here.model_dump(mode="json")}
    write(content, options.output)


def measure(options: argparse.Namespace, work: Path, say: Callable[[str], None]) -> tuple[list[Row], dict[str, Any]]:
    """Each candidate opened, warmed up, timed and closed in turn; the peer first and last, so that drift shows.

    Raises:
        SmoothRTError: an option is wrong or an engine does not work.
    """
    asked(options.only)
    if not 0 <= options.rung < len(LADDER):
        raise InputError(f"--rung={options.rung}: give a whole number from 0 to {len(LADDER) - 1}")
    module, dims = unet(options.model)
    network = contract("unet", dims)
    options.side = image_side("side", options.side, dims)
    side = options.side // dims.vae_factor
    rows = 2 * options.batch_size
    sizes = {"batch": rows, "height": side, "width": side}
    one_size: list[Bounds] = [{symbol: (size, size, size) for symbol, size in sizes.items()}]
    inputs = random_inputs(network, dims, Case(sizes, 1.0, guided=not options.apart), torch.Generator().manual_seed(0))
    say("matrix rate and FLOPs")
    rate = max(matrix_rates(2048, 3), key=lambda one: one.gflop_per_s)
    flop = count_flop(module, list(inputs.values()))
    peer = EagerEngine(network, module)
    wanted = peer.infer(**inputs)["noise_pred"]
    seconds = {PEER: _timed(peer, inputs, options.repeats)}
    made, faults = graphs(module, network, dims, work, options, one_size, say)
    candidates = {name: one for name, one in asked(options.only).items() if one.made_of not in faults}
    left_out = [f"{'-'.join(graph)} is left out: {fault}" for graph, fault in faults.items()]
    if gpu() is not None:
        on_gpu, unable = _on_gpu(module, dims, work, options, say)
        left_out += unable
        made |= {candidate.made_of: path for candidate, path in on_gpu.values()}
        candidates |= {name: candidate for name, (candidate, _) in on_gpu.items()}
    found: list[Row] = []
    for name, one in candidates.items():
        say(f"times of {name}")
        recipe = RECIPES[one.backend][one.precision]["unet"]
        bounds = one_size if one.fixed else []
        started = time.perf_counter()
        try:
            with open_engine(one.backend, network, made[one.made_of], recipe.hint, bounds) as engine:
                got = engine.infer(**inputs)["noise_pred"]
                opened = time.perf_counter() - started
                times = _timed(engine, inputs, options.repeats)
        except SmoothRTError as fault:
            if name in CANDIDATES:
                raise
            left_out.append(f"{name} is left out: {fault}")  # such as TensorRT for RTX on a GPU that it does not know
            continue
        error = float((got - wanted).norm() / wanted.norm())
        found.append(Row(name, sorted(times)[len(times) // 2], min(times), 0.0, error, opened))
        gc.collect()
    say(f"times of {PEER}, once more")
    seconds[f"{PEER}, again"] = _timed(peer, inputs, options.repeats)
    base = sorted(t for times in seconds.values() for t in times)
    middle = base[len(base) // 2]
    peers = [
        Row(n, sorted(t)[len(t) // 2], min(t), middle / sorted(t)[len(t) // 2], 0.0, 0.0) for n, t in seconds.items()
    ]
    scored = [Row(r.name, r.seconds, r.fastest, middle / r.seconds, r.error, r.first_result_in) for r in found]
    facts = {
        "gflop": flop / 1e9,
        "matrix_rate_gflop_per_s": rate.gflop_per_s,
        "matrix_rate_library": rate.library,
        "floor_s": flop / rate.gflop_per_s / 1e9,
        "rows_a_call": rows,
        "side": options.side,
        "model": options.model,
        "int8_rung": options.rung,
        "left_out": left_out,
    }
    return [*peers, *scored], facts


def _on_gpu(
    module: nn.Module, dims: Dims, work: Path, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, tuple[Candidate, Path]], list[str]]:
    """By name, what runs on the GPU and its graph; a line for what does not."""
    from bench import gpu_candidates

    able, left_out = gpu_candidates.runnable(gpu_candidates.CANDIDATES)
    sizes = argparse.Namespace(batch_sizes=(options.batch_size,), side=options.side)
    subject = gpu_candidates.Subject({"unet": module}, dims, None)
    found: dict[str, tuple[Candidate, Path]] = {}
    for name, (backend, precision) in able.items():
        say(f"build of {name}")
        try:
            path = gpu_candidates.built(backend, precision, subject, "unet", sizes, work / name.replace(" ", "-"))
            found[f"{name}, one size"] = (Candidate(backend, precision, fixed=True), path)
        except SmoothRTError as error:
            left_out.append(f"{name} is left out: {error}")
    return found, left_out


def unet(model: str) -> tuple[nn.Module, Dims]:
    """The UNet of a model and its sizes; of sd15, at full size with random weights."""
    from smooth_rt.model import load_model

    if model != "sd15":
        loaded = load_model(model)
        return Unet(loaded.unet).eval(), loaded.dims
    modules, dims = sd15()
    return modules["unet"], dims


def _timed(engine: Engine, inputs: dict[str, Tensor], repeats: int) -> list[float]:
    engine.infer(**inputs)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        engine.infer(**inputs)
        seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """A folder for graphs: the one that is named, which stays, or one for the time being."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="smooth-rt-bench-") as folder:
        yield Path(folder)


def _parse(arguments: list[str]) -> argparse.Namespace | None:
    from bench.options import A_MODEL, Parser, folder, json_file

    parser = Parser(prog="smooth-rt bench engines", description=__doc__)
    parser.add_argument("--model", default="default", help=f"{A_MODEL}, or sd15: full size, random weights")
    parser.add_argument("--side", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=1, help="images; two rows each")
    parser.add_argument("--apart", action="store_true", help="rows of unlike latents, not guidance's two halves")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rung", type=int, default=2, help="of int8: the kinds of layers left in floating point; 0: none"
    )
    parser.add_argument("--samples", type=int, default=4, help="rows that int8 takes its scales from")
    parser.add_argument("--only", default="", help="comma-separated parts of the names of what is timed; default: all")
    parser.add_argument("--work", type=folder, help="a folder that keeps the graphs for another run")
    parser.add_argument("--output", type=json_file, help="a JSON file of the figures")
    return parser.asked(arguments, ("batch_size", "repeats", "samples"), ("model",))


def _print(rows: Sequence[Row], facts: dict[str, Any], options: argparse.Namespace) -> None:
    call = f"{facts['rows_a_call']} rows, {facts['gflop'] / 1000:.3f} TFLOP a call"
    rows_are = "unlike latents" if options.apart else "both halves of guidance"
    what = f"UNet of {options.model}, {options.side} px, {call}, {rows_are}"
    table = Table(
        "engine", "s", "fastest s", "x diffusers", "x fp32 floor", "relative error", "first result in s", title=what
    )
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seconds:.4g}",
            f"{row.fastest:.4g}",
            f"{row.speedup:.2f}",
            f"{row.seconds / facts['floor_s']:.2f}",
            f"{row.error:.1e}",
            f"{row.first_result_in:.1f}",
        )
    Console(width=120).print(table)
    rate, library = facts["matrix_rate_gflop_per_s"], facts["matrix_rate_library"]
    for line in facts["left_out"]:
        print(line)
    print(f"fp32 floor {facts['floor_s']:.4g} s: counted FLOPs over {rate:.0f} GFLOP/s ({library})")


if __name__ == "__main__":
    main()
