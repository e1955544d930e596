"""The whole benchmark in order: parity, networks, morph, peers; from options to a report."""

from __future__ import annotations

import time

from bench.cases import PEER, Say, flop_per_row, measure_networks, measure_pipelines
from bench.environment import busy, uneven
from bench.floor import matrix_rates
from bench.options import Options
from bench.results import Environment, GenerateResult, Report, Settings
from bench.subject import open_subject, resolve_engines
from smooth_rt.model import Model, load_model
from smooth_rt.schedule import Schedule
from smooth_rt.tasks import checks

__all__ = ["measure"]

# What the images of an fp32 engine must reach beside diffusers' own to count as the same images.
SAME_IMAGE_DB = 40.0


def measure(options: Options, here: Environment, started: str, start: float, say: Say) -> Report:
    """Run everything that `options` ask for.

    Args:
        here: the machine, as it was before the work began.
        started: the date and time to write down.
        start: `time.perf_counter()` at the start.
        say: told what is being done.

    Raises:
        SmoothRTError: the model, the LoRA or an engine does not work; nothing is measured then.
    """
    asked, warnings = resolve_engines(options.engines)
    say("loading the model")
    model = load_model(options.model, config=options.config)
    # What does not fit the model is said before anything is built.
    settings = _settings(options, model, tuple(asked))
    subject = open_subject(
        model, options.lora, options.lora_strength, list(asked.values()),
        lambda stage, done, total: say(f"building engines: {stage} ({done} of {total})"),
    )  # fmt: skip
    say("measuring the matrix rate")
    rates = matrix_rates(options.matrix_side, max(5, settings.repeats))
    ceiling = max(rates, key=lambda rate: rate.gflop_per_s)
    say("counting FLOPs")
    flop = flop_per_row(subject, settings)
    networks = measure_networks(subject, settings, flop, ceiling, say)
    morphs, generated = measure_pipelines(subject, settings, flop, ceiling, say)
    return Report(
        started=started,
        seconds=time.perf_counter() - start,
        environment=here,
        settings=settings,
        choices={name: f"{choice.backend}: {choice.reason}" for name, choice in asked.items()},
        warnings=(*filter(None, [busy(here), uneven(here)]), *warnings, *_unlike(generated)),
        matrix_rates=rates,
        networks=tuple(networks),
        morph=tuple(morphs),
        generate=tuple(generated),
    )


def _settings(options: Options, model: Model, engines: tuple[str, ...]) -> Settings:
    height, width = checks.image_size(options.height, options.width, model.dims)
    Schedule.from_scheduler(model.config().scheduler(), options.steps)
    return Settings(
        model=options.model,
        revision=model.revision,
        config=options.config,
        lora=options.lora,
        lora_strength=options.lora_strength,
        engines=engines,
        batch_sizes=options.batch_sizes,
        image_height=height,
        image_width=width,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        frames=options.frames,
        repeats=options.repeats,
        warmup=options.warmup,
        seed=options.seed,
        prompt=options.prompt,
    )


def _unlike(generated: list[GenerateResult]) -> list[str]:
    """A warning for every engine whose images are not diffusers' own: its speed counts for nothing."""
    return [
        f"{result.engine} at {result.images}: {result.psnr_db:.1f} dB to diffusers' images, below "
        f"{SAME_IMAGE_DB:g} dB; its speed-up is that of another result"
        for result in generated
        if result.engine != PEER and result.psnr_db is not None and result.psnr_db < SAME_IMAGE_DB
    ]
