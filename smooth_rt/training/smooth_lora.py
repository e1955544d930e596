"""Train a Smooth-LoRA: pictures in steps (`batches`), their loss (`objective`), on LoRA weights alone (`adapter`), in
a run that stops and resumes (`run`), alone or on many devices (`world`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from engines.paths import absolute
from engines.torch_modes import default_modes
from smooth_rt.errors import InputError
from smooth_rt.lora import LoraFormat, write_lora
from smooth_rt.model import Model
from smooth_rt.training.adapter import add_adapter, checkpoint_activations, lora_of
from smooth_rt.training.batches import Batches
from smooth_rt.training.encoded import Encoder, cached
from smooth_rt.training.objective import Objective
from smooth_rt.training.pictures import Pictures
from smooth_rt.training.run import Calls, Part, Run
from smooth_rt.training.settings import check_steps
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.world import World

__all__ = ["train_smooth_lora"]


@default_modes()
@torch.enable_grad()
def train_smooth_lora(
    model: Model,
    pictures: Pictures,
    output: Path,
    steps: int = 30000,
    resume: bool = False,
    config: SmoothLoraConfig | None = None,
    every: Calls = (),
    format: LoraFormat = "diffusers",
    save_every: int = 200,
    keep: int = 2,
    world: World | None = None,
    cache: Path | None = None,
) -> Path:
    """Train on `pictures` and write `output/smooth_lora.safetensors` in `format` (see `write_lora`); returns its path.

    The model's networks move to the world's device, and its UNet receives a PEFT adapter named "smooth" and keeps it;
    its own weights do not change.

    A checkpoint is written every `save_every` steps, and the newest `keep` stay. It must agree with the settings but
    the rate, with the model's digests and with the pictures' identity.

    Args:
        every: periods in steps and calls, made with the averaged weights in the UNet, by the main process.
        output: a folder; relative paths stand for what they name now, whatever the current folder is later.
        cache: a folder that keeps latents and text embeddings (see `encoded.cached`).
        world: the processes that share the work; this one alone unless given.

    Raises:
        InputError: settings out of range, or a folder that holds a run already, of `resume`, another one.
        SmoothRTError, KeyboardInterrupt: the run ended early; see `Run.fit`.
    """
    config, world = config or SmoothLoraConfig(), world or World()
    output, cache = absolute(output), None if cache is None else absolute(cache)
    check_steps("steps", steps)
    if (config.batch_size // config.accumulate) % world.size:
        raise InputError(
            f"batch_size={config.batch_size}: {world.size} processes and {config.accumulate} parts do not divide it"
        )
    for network in (model.unet, model.vae, model.text_encoder):
        network.requires_grad_(False).to(world.device)
    add_adapter(model.unet, config)
    model.unet.to(world.device)
    if config.gradient_checkpointing:
        checkpoint_activations(model.unet)
    objective = Objective(model, config, world)
    encoder = Encoder(model)
    identity, encode = pictures.identity, lambda stream, index: encoder(pictures.draw(stream, index))
    if cache is not None:
        identity, encode = cached(cache, model, pictures, world)
    batches = Batches(
        encode,
        encoder.text(""),
        config,
        len(objective.alphas),
        next(model.unet.parameters()).dtype,
        model.vae.config.scaling_factor,
        world,
    )

    def step_fn(step: int) -> Iterator[Part]:
        for part in range(config.accumulate):
            yield objective(step, batches.part("smooth-lora", step, part))

    settings = {name: value for name, value in asdict(config).items() if name != "lr"}
    run = Run(
        output,
        {"unet": model.unet},
        steps,
        config.lr,
        {**settings, "model": model.digests, "data": identity},
        warmup=50,
        ema_decay=0.99,
        save_every=save_every,
        keep=keep,
        resume=resume,
        extra=objective.target.state,
        world=world,
        sources=lambda step: batches.names("smooth-lora", step),
    )
    if config.svr_target == "anchored" and config.reg_weight and run.step == 0:
        # PEFT starts a LoRA at exactly zero effect, so this measures the model without it.
        for step in range(config.calibration_steps):
            for part in range(config.accumulate):
                objective.calibrate(batches.part("calibration", step, part))
        objective.target.fill()

    path = output / "smooth_lora.safetensors"

    def write(_: int) -> None:
        with run.averaged():
            write_lora(lora_of(model.unet, config, str(path)), path, format)

    def averaged(call: Callable[[int], object]) -> Callable[[int], None]:
        def called(step: int) -> None:
            with run.averaged():
                call(step)

        return called

    calls = [(period, averaged(call)) for period, call in every]
    run.fit(step_fn, [(save_every, write), *calls])
    if world.main:
        write(run.step)
    return path
