"""`python -m bench gpu`: whole guided samplings on a CUDA GPU, beside eager PyTorch and the GPU's floor.

Stable Diffusion 1.5's shape, 512 pixels, 50 guided steps, batches of 1, 4 and 16. The weights are random, which needs
no download; `--model` takes real ones. Each engine is built for these sizes, opened, warmed up, timed through the
pipeline that users call, compared with eager fp32 on the same noise, and closed. One that this machine cannot build or
run has its reason in its row.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.environment import environment
from bench.floor import count_flop
from bench.gpu_candidates import CANDIDATES, NETWORKS, PEERS, Eager, Subject, built, opened, runnable
from bench.results import write
from bench.subject import sd15
from engines.base import Engine
from engines.contract import NetworkName, contract
from engines.eager import torch_networks
from engines.select import gpu
from engines.variant import Precision
from export.graphs import Case, random_inputs
from smooth_rt.errors import EngineError, SmoothRTError
from smooth_rt.model import PipelineConfig, load_model
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.checks import image_side

__all__ = ["Row", "main", "measure"]

# Dense fp16 rates with fp32 accumulation that the maker publishes, in TFLOP/s, by a part of the GPU's name.
PUBLISHED = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "L4": 121.0, "4090": 165.2, "A10G": 70.0}
GUIDANCE = 7.5


@dataclass(frozen=True)
class Row:
    """One engine at one batch: seconds of a batch (the middle and the fastest), the latents' relative error to eager
    fp32; or why there are none."""

    name: str
    batch: int
    seconds: float | None = None
    fastest: float | None = None
    error: float | None = None
    built_in: float | None = None
    opened_in: float | None = None
    fault: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Raises:
        SmoothRTError: there is no GPU, an option is wrong, or the model cannot be read.
    """
    options = _parse(list(sys.argv[1:] if argv is None else argv))
    if options is None:
        return
    if gpu() is None:
        raise EngineError("bench gpu: torch finds no CUDA GPU here; run it where there is one, or `bench engines` here")
    # Between fp32 and fp32 there must be no TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    from bench.engines import work_folder

    console = Console(stderr=True)
    with work_folder(options.work) as work, console.status("starting") as status:
        subject = _subject(options.model)
        rows, facts = measure(subject, CANDIDATES, options, work, "cuda", lambda words: status.update(words))
    _print(rows, facts, options)
    content = {"rows": [asdict(row) for row in rows], **facts, "environment": environment().model_dump(mode="json")}
    write(content, options.output)


def measure(
    subject: Subject,
    candidates: Mapping[str, tuple[str, Precision]],
    options: argparse.Namespace,
    work: Path,
    device: str,
    say: Callable[[str], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Eager in both precisions, then each candidate; all of them at every batch."""
    options.side = image_side("side", options.side, subject.dims)
    flop, rate = _flop(subject, options), _rate(device)
    able, missing = runnable(candidates)
    rows: list[Row] = []
    wanted: dict[int, Tensor] = {}
    for name, precision in PEERS.items():
        say(f"times of {name}")
        peers = {of: Eager(contract(of, subject.dims), subject.modules[of], precision, device) for of in NETWORKS}
        rows += _timed(name, peers, subject, options, wanted, (0.0, 0.0))
    for name, (backend, precision) in able.items():
        say(f"build of {name}")
        try:
            began = time.perf_counter()
            graphs = {
                of: built(backend, precision, subject, of, options, work / name.replace(" ", "-")) for of in NETWORKS
            }
            made = time.perf_counter()
            say(f"times of {name}")
            engines = {of: opened(backend, precision, subject, of, graphs[of], options) for of in NETWORKS}
            took = made - began, time.perf_counter() - made
            rows += _timed(name, engines, subject, options, wanted, took)
        except SmoothRTError as error:  # such as TensorRT for RTX on a GPU that it does not know
            rows += [Row(name, batch, fault=str(error)) for batch in options.batch_sizes]
        gc.collect()
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "model": options.model,
        "side": options.side,
        "steps": options.steps,
        "tflop_an_image": flop / 1e12,
        **{f"floor_s_{source}": flop / value for source, value in rate.items()},
        "left_out": missing,
    }
    return rows, facts


def _timed(
    name: str,
    engines: Mapping[NetworkName, Engine],
    subject: Subject,
    options: argparse.Namespace,
    wanted: dict[int, Tensor],
    took: tuple[float, float],
) -> list[Row]:
    """A row a batch; the first engine's latents are what the others' are compared with. The engines are closed."""
    size = (options.side, options.side)
    rows = []
    assert subject.config is not None
    with SmoothPipeline(engines, subject.config, subject.dims, source=options.model, size=size) as pipe:
        for batch in options.batch_sizes:
            pipe.batch_size = batch
            shape = (batch, subject.dims.tokens, subject.dims.text_width)
            embeds = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

            def sample(pipe: SmoothPipeline = pipe, batch: int = batch, embeds: list[Tensor] = embeds) -> Tensor:
                return pipe(
                    prompt_embeds=embeds[0],
                    negative_prompt_embeds=embeds[1],
                    num_inference_steps=options.steps,
                    guidance_scale=GUIDANCE,
                    generator=[torch.Generator().manual_seed(index) for index in range(batch)],
                    output_type="np",
                ).latents

            found = sample()  # which also captures, tunes and allocates
            reference = wanted.setdefault(batch, found)
            seconds = []
            for _ in range(options.repeats):
                began = time.perf_counter()
                sample()  # its images are on the CPU, so nothing is under way any more
                seconds.append(time.perf_counter() - began)
            error = float((found - reference).norm() / reference.norm())
            rows.append(Row(name, batch, statistics.median(seconds), min(seconds), error, *took))
    return rows


def _flop(subject: Subject, options: argparse.Namespace) -> int:
    """Of one image: two rows of the UNet a step, and the decoder once."""
    side = options.side // subject.dims.vae_factor
    case = Case({"batch": 1, "height": side, "width": side}, 1.0)

    def of(name: NetworkName) -> int:
        inputs = random_inputs(contract(name, subject.dims), subject.dims, case, torch.Generator().manual_seed(0))
        return count_flop(subject.modules[name], list(inputs.values()))

    return 2 * int(options.steps) * of("unet") + of("vae_decoder")


def _rate(device: str) -> dict[str, float]:
    """FLOP/s in fp16 as published for the GPU, if it is in the table, and as torch reaches on a large product."""
    if device != "cuda":
        return {}
    name = torch.cuda.get_device_name()
    published = next((rate for part, rate in PUBLISHED.items() if part in name), None)
    side = 8192
    a = torch.randn(side, side, device=device, dtype=torch.float16)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    rates = {"measured": 2 * side**3 / min(seconds)}
    return rates if published is None else {"published": published * 1e12, **rates}


def _subject(model: str) -> Subject:
    if model == "sd15":
        modules, dims = sd15()
        scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        config = PipelineConfig(cast("Any", None), {**scheduler, "num_train_timesteps": 1000}, 0.18215)
        return Subject(modules, dims, config)
    loaded = load_model(model)
    networks = torch_networks(loaded.text_encoder, loaded.unet, loaded.vae)
    return Subject({name: networks[name] for name in NETWORKS}, loaded.dims, loaded.config())


def _parse(arguments: list[str]) -> argparse.Namespace | None:
    from bench.options import A_MODEL, Parser, batch_sizes, folder, json_file

    parser = Parser(prog="smooth-rt bench gpu", description=__doc__)
    parser.add_argument("--model", default="sd15", help=f"{A_MODEL}; default: SD1.5's shape with random weights")
    parser.add_argument("--side", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-sizes", type=batch_sizes, default=(1, 4, 16), metavar="N[,N…]", help="default: 1,4,16")
    parser.add_argument("--num-inference-steps", dest="steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=folder, help="a folder that keeps the graphs for another run")
    parser.add_argument("--output", type=json_file, help="a JSON file of the figures")
    return parser.asked(arguments, ("num_inference_steps", "repeats"), ("model",))


def _print(rows: Sequence[Row], facts: dict[str, Any], options: argparse.Namespace) -> None:
    what = f"{options.model} on {facts['device']}: {options.side} px, {options.steps} guided steps and the decoder"
    table = Table(
        "engine", "batch", "s", "s an image", "x eager fp16", "x floor", "relative error", "opened, s", title=what
    )
    eager = {row.batch: row.seconds for row in rows if row.name == "eager fp16"}
    floor = facts.get("floor_s_published", facts.get("floor_s_measured"))
    for row in rows:
        if row.seconds is None:
            table.add_row(row.name, str(row.batch), "-", "-", "-", "-", "-", "-")
            continue
        base = eager[row.batch] or 0.0
        table.add_row(
            row.name,
            str(row.batch),
            f"{row.seconds:.4g}",
            f"{row.seconds / row.batch:.4g}",
            f"{base / row.seconds:.2f}",
            f"{row.seconds / row.batch / floor:.2f}" if floor else "-",
            f"{row.error:.1e}",
            f"{row.opened_in:.1f}",
        )
    Console(width=120).print(table)
    for source in ("published", "measured"):
        if f"floor_s_{source}" in facts:
            print(f"floor of an image at the {source} fp16 rate: {1000 * facts[f'floor_s_{source}']:.0f} ms")
    for line in dict.fromkeys(f"{row.name}: {row.fault}" for row in rows if row.fault):
        print(line)
    for line in facts["left_out"]:
        print(line)


if __name__ == "__main__":
    main()
