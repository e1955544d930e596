"""`python -m bench gradients`: the UNet's gradients on engines beside eager autograd, in one run.

Of each gradient network: its outputs' errors to autograd at timesteps all over 0..999, every batch size and two sizes;
the time of a call, in turns with eager's; and the peak memory of either, in a process of its own. `--task null-text`
inverts one image by null-text inversion on an engine's gradients and on eager's, every round of it, and compares what
comes back.

`--model sd15` is Stable Diffusion 1.5's UNet at full size with random weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.apart import apart
from bench.engines import unet, work_folder
from bench.environment import busy, environment, warn
from bench.null_text import EAGER, IMAGE, PROMPT, Inverted, check_null_text, null_text, table_of
from bench.options import A_MODEL, Parser, batch_sizes, folder, json_file, names
from bench.results import write
from bench.timing import interleave, summarise
from engines.base import Engine
from engines.contract import DERIVED, FEATURES, GRADIENTS, WRT, Dims, Network, NetworkName, contract, gradients_named
from engines.eager import EagerEngine, gradient_networks
from engines.recipes import RECIPES
from engines.select import check_runs, open_engine, target
from engines.variant import Variant, every_size
from export.graphs import Case, random_inputs
from export.stages import Stages
from export.verify import TOLERANCES
from export.versions import peak_memory
from smooth_rt.tasks.checks import image_side

__all__ = ["Row", "main", "measure"]

TASKS = ("vjp", "null-text")
# The backends that are built with gradients.
ABLE = tuple(name for name, built in RECIPES.items() if name != "eager" and set(DERIVED) <= set(built.get("fp32", {})))
TIMESTEPS = (0, 250, 500, 750, 999)
EXACT_BELOW = 2**28  # parameters; of a larger model a copy in float64 would not fit beside the rest


@dataclass(frozen=True)
class Row:
    """One gradient network on one engine: of each output the median and the worst relative L2 error of an item, the
    share of items within the tolerance of fp32 and the largest difference; seconds of a call by batch size, how many
    times as fast as eager that is, and the peak of memory."""

    network: str
    engine: str
    median_errors: dict[str, float]
    errors: dict[str, float]
    within: dict[str, float]
    largest: dict[str, float]
    seconds: dict[int, float]
    speedup: dict[int, float]
    peak_memory_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Raises:
        SmoothRTError: an option is wrong or an engine does not work.
    """
    options = _parse(list(sys.argv[1:] if argv is None else argv))
    if options is None:
        return
    if options.job is not None:
        print(json.dumps(_job(options)))
        return
    for backend in options.engine:
        check_runs(backend)
    if "null-text" in options.task:
        check_null_text(options)
    here = environment()
    console = Console(stderr=True)
    warn(console, busy(here))
    rows: list[Row] = []
    inverted: list[Inverted] = []
    with console.status("starting") as status:
        if "vjp" in options.task:
            with work_folder(options.work) as work:
                rows = measure(options, work, lambda words: status.update(words))
        if "null-text" in options.task:
            inverted = null_text(options, lambda words: status.update(words))
    _print(rows, inverted, options)
    found = {"rows": [asdict(row) for row in rows], "null_text": [asdict(one) for one in inverted]}
    write({"model": options.model, **found, "environment": here.model_dump(mode="json")}, options.output)


def measure(options: argparse.Namespace, work: Path, say: Callable[[str], None]) -> list[Row]:
    """Errors, times and memory of every network that is asked for, on every engine.

    Raises:
        SmoothRTError: an option is wrong or an engine does not work.
    """
    module, dims = unet(options.model)
    options.side = image_side("side", options.side, dims)
    rows = []
    for name in gradients_named(options.gradients, dims.up_blocks):
        if name not in WRT:
            continue
        network = contract(name, dims)
        own = gradient_networks(module, [name])[name]
        graphs = {backend: _graph(backend, network, own, dims, work, say) for backend in options.engine}
        with ExitStack() as stack:
            engines: dict[str, Engine] = {EAGER: EagerEngine(network, own)}
            for backend, path in graphs.items():
                say(f"open {name} on {backend}")
                hint = RECIPES[backend]["fp32"][name].hint
                engines[backend] = stack.enter_context(open_engine(backend, network, path, hint))
            say(f"errors of {name}")
            errors = _errors(engines, network, own, dims, options)
            say(f"times of {name}")
            seconds: dict[int, dict[str, float]] = {}
            for size in options.batch_sizes:
                inputs = _inputs(network, dims, size, _sides(dims, options)[0], 500)
                calls = {of: _call(engine, inputs) for of, engine in engines.items()}
                timed = interleave(calls, options.repeats, 1)
                seconds[size] = {of: summarise(times).median_s for of, times in timed.items()}
        gc.collect()
        for of in engines:
            say(f"memory of {name} on {of}")
            peak = _peak(of, name, dims, graphs.get(of), options)
            rows.append(
                Row(
                    network=name,
                    engine=of,
                    median_errors={output: median(each) for output, (each, _) in errors[of].items()},
                    errors={output: max(each) for output, (each, _) in errors[of].items()},
                    within={output: _within(each) for output, (each, _) in errors[of].items()},
                    largest={output: max(most) for output, (_, most) in errors[of].items()},
                    seconds={size: times[of] for size, times in seconds.items()},
                    speedup={size: times[EAGER] / times[of] for size, times in seconds.items()},
                    peak_memory_bytes=peak,
                )
            )
    return rows


def _graph(
    backend: str, network: Network, module: nn.Module, dims: Dims, work: Path, say: Callable[[str], None]
) -> Path:
    """Made in `work` unless it is there from a run before."""
    folder = work / backend / network.name
    made = sorted(folder.glob("*.onnx")) + sorted(folder.glob("*.xml"))
    if made:
        return made[0]
    folder.mkdir(parents=True)
    variant = Variant(backend=backend, precision="fp32", lora_mode="fused", architecture=target(backend))
    stages = Stages(work / "exported", dims, None, lambda what, _, __: say(what))
    bounds = every_size(dims).bounds(network, dims)
    return stages.build(network, module, variant, "fp32", bounds, folder).path


def _errors(
    engines: dict[str, Engine], network: Network, module: nn.Module, dims: Dims, options: argparse.Namespace
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """By engine and output, the relative error of each item and the largest difference of each call, to autograd in
    float64 where a copy of the model fits, else in float32."""
    exact = sum(one.numel() for one in module.parameters()) < EXACT_BELOW
    reference = copy.deepcopy(module).double() if exact else module
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {of: {} for of in engines}
    for side in _sides(dims, options):
        for size in (1, max(options.batch_sizes)):
            for when in TIMESTEPS:
                inputs = _inputs(network, dims, size, side, when)
                given = (t.double() if exact and t.is_floating_point() else t for t in inputs.values())
                wanted = {spec.name: t for spec, t in zip(network.outputs, reference(*given), strict=True)}
                for of, engine in engines.items():
                    for output, got in engine.infer(**inputs).items():
                        off = (got.double() - wanted[output].double()).flatten(1)
                        each, largest = found[of].setdefault(output, ([], []))
                        each += (off.norm(dim=1) / wanted[output].double().flatten(1).norm(dim=1)).tolist()
                        largest.append(float(off.abs().max()))
    return found


def _sides(dims: Dims, options: argparse.Namespace) -> list[tuple[int, int]]:
    """The side that is asked for, in latent cells, and half of it by as much."""
    side = options.side // dims.vae_factor
    half = max(dims.latent_multiple, side // 2 // dims.latent_multiple * dims.latent_multiple)
    return [(side, side), (half, side)]


def _inputs(network: Network, dims: Dims, rows: int, side: tuple[int, int], when: int) -> dict[str, Tensor]:
    case = Case({"batch": rows, "height": side[0], "width": side[1]}, 1.0)
    inputs = random_inputs(network, dims, case, torch.Generator().manual_seed(when))
    return inputs | {"timestep": torch.full((rows,), when, dtype=torch.int64)}


def _within(errors: Sequence[float]) -> float:
    return sum(one <= TOLERANCES["fp32"] for one in errors) / len(errors)


def _call(engine: Engine, inputs: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: engine.infer(**inputs)


def _peak(of: str, name: NetworkName, dims: Dims, path: Path | None, options: argparse.Namespace) -> int:
    """The peak of memory of a process that opens the engine and calls it once with the largest batch."""
    arguments = ["--job", of, "--model", options.model, "--gradients", ",".join(options.gradients)]
    arguments += ["--side", str(options.side), "--batch-sizes", str(max(options.batch_sizes)), "--network", name]
    arguments += ["--dims", json.dumps(asdict(dims)), *([] if path is None else ["--graph", str(path)])]
    failed = f"{name} on {of}: the process that measures memory failed ({{}})"
    return int(apart("bench.gradients", arguments, failed.format))


def _job(options: argparse.Namespace) -> int:
    dims = TypeAdapter(Dims).validate_json(options.dims)
    network = contract(options.network, dims)
    if options.job == EAGER:
        module, _ = unet(options.model)
        engine: Engine = EagerEngine(network, gradient_networks(module, [options.network])[options.network])
    else:
        hint = RECIPES[options.job]["fp32"][options.network].hint
        engine = open_engine(options.job, network, options.graph, hint)
    with engine:
        engine.infer(**_inputs(network, dims, max(options.batch_sizes), _sides(dims, options)[0], 500))
    return peak_memory()


def _parse(arguments: list[str]) -> argparse.Namespace | None:
    parser = Parser(prog="smooth-rt bench gradients", description=__doc__)
    parser.add_argument("--model", default="default", help=f"{A_MODEL}, or sd15: full size, random weights")
    parser.add_argument("--engine", type=names(*ABLE), default=("onnxruntime",), help="default: onnxruntime")
    parser.add_argument(
        "--gradients",
        type=names(*GRADIENTS, FEATURES),
        default=("text", "sample", "both"),
        help="default: text,sample,both",
    )
    parser.add_argument("--task", type=names(*TASKS), default=("vjp",), help="vjp, null-text or both; default: vjp")
    parser.add_argument("--side", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-sizes", type=batch_sizes, default=(1, 4), metavar="N[,N…]", help="default: 1,4")
    parser.add_argument("--repeats", type=int, default=10, help="calls of each; default: 10")
    parser.add_argument("--num-inference-steps", dest="steps", type=int, default=50, help="of null-text; default: 50")
    parser.add_argument("--inversions", type=int, default=3, help="of null-text on each engine; default: 3")
    parser.add_argument("--image", default=str(IMAGE), help="of null-text; default: one that ships")
    parser.add_argument("--prompt", default=PROMPT, help="of null-text")
    parser.add_argument("--work", type=folder, help="a folder that keeps the graphs for another run")
    parser.add_argument("--output", type=json_file, help="a JSON file of the figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # the peak of memory of one engine, in this process
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--dims", help=argparse.SUPPRESS)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    return parser.asked(arguments, ("repeats", "num_inference_steps", "inversions"), ("model",))


def _print(rows: Sequence[Row], inverted: Sequence[Inverted], options: argparse.Namespace) -> None:
    console = Console(width=120)
    if rows:
        title = f"Gradients of {options.model}: errors of an item to autograd"
        within = f"within {TOLERANCES['fp32']:.0e}"
        table = Table("network", "engine", "output", "median", "worst", within, "largest difference", title=title)
        for row in rows:
            for output, error in row.errors.items():
                told = f"{row.median_errors[output]:.1e}", f"{error:.1e}", f"{row.within[output]:.0%}"
                table.add_row(row.network, row.engine, output, *told, f"{row.largest[output]:.1e}")
        console.print(table)
        heads = [f"{size} rows: ms (x eager)" for size in rows[0].seconds]
        table = Table("network", "engine", *heads, "peak memory MiB", title="A call: the output and its gradients")
        for row in rows:
            cells = [f"{1e3 * seconds:.1f} ({row.speedup[size]:.2f})" for size, seconds in row.seconds.items()]
            table.add_row(row.network, row.engine, *cells, f"{row.peak_memory_bytes / 2**20:.0f}")
        console.print(table)
    if inverted:
        console.print(table_of(inverted))


if __name__ == "__main__":
    main()
