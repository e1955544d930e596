"""`python -m bench.training`: what a training step costs, by the kind of its regularisation, beside a plain LoRA step.

Each variant trains the same LoRA on the same latents in a process of its own, so that peaks of memory are apart; all in
one run. `--model sd15` is Stable Diffusion 1.5's UNet at full size with random weights, which need no download.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.apart import apart
from bench.options import json_file
from bench.results import write
from smooth_rt.errors import InputError, SmoothRTError
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig

__all__ = ["VARIANTS", "main", "measured"]

PLAIN = SmoothLoraConfig(reg_weight=0.0, svr_target="per-timestep")
VARIANTS = {
    "plain LoRA": PLAIN,
    "SVR, exact": replace(PLAIN, reg_weight=1.0),
    "SVR, exact, checkpointed": replace(PLAIN, reg_weight=1.0, gradient_checkpointing=True),
    "SVR, difference": replace(PLAIN, reg_weight=1.0, reg_gradient="difference"),
    "SVR, difference, checkpointed": replace(
        PLAIN, reg_weight=1.0, reg_gradient="difference", gradient_checkpointing=True
    ),
    "SVR, exact, every 4th step": replace(PLAIN, reg_weight=1.0, reg_every=4),
}
# The public configuration of stable-diffusion-v1-5's UNet, as far as it is not diffusers' own default.
SD15: dict[str, Any] = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--model", choices=("default", "sd15"), default="default")
    parser.add_argument("--size", type=int, help="side of the images in pixels; default: 64, of sd15 256")
    parser.add_argument("--batch-size", type=int, default=0, help="default: 16, of sd15 1")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a variant; default: 20, of sd15 4")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=json_file, help="a JSON file of the figures")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # one of them, in this process
    options = parser.parse_args(argv)
    small = options.model == "default"
    options.size = options.size or (64 if small else 256)
    options.batch_size = options.batch_size or (16 if small else 1)
    options.steps = options.steps or (20 if small else 4)
    try:
        if options.variant:
            print(json.dumps(_measure(options.variant, options)))
            return 0
        rows = measured(sys.argv[1:] if argv is None else argv)
    except SmoothRTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(rows, options)
    write(rows, options.output)
    return 0


def measured(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Each variant's figures, from a process of its own.

    Raises:
        EngineError: a process failed; its last line is passed on.
    """
    rows = []
    for name in VARIANTS:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        message = f"{name}: failed ({{}}); try a smaller --size"
        rows.append(apart("bench.training", [*argv, "--variant", name], message.format))
    for row in rows:
        row["over_plain"] = row["seconds_per_step"] / rows[0]["seconds_per_step"]
    return rows


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from export.versions import peak_memory
    from smooth_rt.training.adapter import add_adapter, checkpoint_activations
    from smooth_rt.training.batches import Rows
    from smooth_rt.training.objective import Objective
    from smooth_rt.training.world import World, training_device

    world = World(training_device(options.device), options.mixed_precision)
    config = replace(VARIANTS[name], batch_size=options.batch_size)
    model, factor = _model(options.model)
    model.unet.requires_grad_(False)
    add_adapter(model.unet, config)
    model.unet.to(world.device)
    if config.gradient_checkpointing:
        checkpoint_activations(model.unet)
    held = _peak(world)
    objective = Objective(model, config, world)
    parameters = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    if options.size % factor:
        raise InputError(f"size={options.size}: give a multiple of {factor}")
    shape = (config.batch_size, model.unet.config.in_channels, options.size // factor, options.size // factor)
    text = (config.batch_size, 77, model.unet.config.cross_attention_dim)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    # The first steps allocate and choose kernels. A lazy variant is timed over whole periods.
    warmup = 1 if options.steps <= 4 else 4
    for step in range(warmup + options.steps + -options.steps % config.reg_every):
        latents, noise, direction = (torch.randn(shape, generator=generator).to(world.device) for _ in range(3))
        context, empty = (torch.randn(text, generator=generator).to(world.device) for _ in range(2))
        timesteps = torch.randint(0, 1000, (config.batch_size,), generator=generator).to(world.device)
        rows = Rows(
            range(config.batch_size), latents, context, empty, timesteps, noise,
            direction / latents[0].numel() ** 0.5, [],
        )  # fmt: skip
        start = time.perf_counter()
        loss, _ = objective(step, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if step >= warmup:
            seconds.append(time.perf_counter() - start)
    # The middle of single steps, but the mean of lazy ones, which differ by design.
    each = statistics.mean(seconds) if config.reg_every > 1 else statistics.median(seconds)
    peak = _peak(world) if world.device.type == "cuda" else peak_memory()
    return {
        "variant": name,
        "seconds_per_step": each,
        "steps_per_second": 1 / each,
        "peak_bytes": peak,
        "above_the_model_bytes": peak - held,
    }


def _peak(world: Any) -> int:
    import torch

    from export.versions import peak_memory

    return torch.cuda.max_memory_allocated() if world.device.type == "cuda" else peak_memory()


def _model(name: str) -> tuple[Any, int]:
    """A model whose UNet alone is needed, and its pixels a latent cell."""
    from types import SimpleNamespace

    import torch
    from diffusers import UNet2DConditionModel

    from smooth_rt.model import load_model

    loaded = load_model("default")
    if name == "default":
        return loaded, loaded.dims.vae_factor
    torch.manual_seed(0)
    return SimpleNamespace(unet=UNet2DConditionModel(**SD15), scheduler_config=loaded.scheduler_config), 8


def _print(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    what = f"{options.model}, {options.size} px, batch {options.batch_size}, precision {options.mixed_precision}"
    table = Table("variant", "s/step", "steps/s", "x plain", "peak", "above the model", title=what)
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['seconds_per_step']:.3f}",
            f"{row['steps_per_second']:.2f}",
            f"{row['over_plain']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['above_the_model_bytes'] / 2**30:.2f} GiB",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
