"""What the commands that run a model have in common: opening it, seeds, what is told of the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from smooth_rt.commands.options import ModelOptions, RunOptions
from smooth_rt.commands.progress import build_progress, step_progress
from smooth_rt.errors import EngineError, InputError, ParityError

if TYPE_CHECKING:
    from torch import Generator

    from engines.bundle import Bundle
    from engines.contract import Dims
    from engines.variant import Precision
    from smooth_rt.model import Model, PipelineConfig
    from smooth_rt.pipeline import SmoothPipeline

__all__ = [
    "Stopwatch",
    "described",
    "generators",
    "need_attention",
    "open_pipeline",
    "opened_model",
    "run",
]

LOG = logging.getLogger("smooth_rt")
Result = TypeVar("Result")


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._began, 3)


def run(
    options: RunOptions,
    command: str,
    steps: int,
    job: Callable[[SmoothPipeline, dict[str, Any]], Result],
    names: Sequence[str],
    inputs: Sequence[Path] = (),
    gradients: Sequence[str] = (),
) -> tuple[Result, dict[str, Any]]:
    """Do a job on the pipeline that the options name: what it gives, and what of the run its command tells.

    Args:
        steps: how many denoising steps the job takes in all, for the progress bar.
        job: called with the pipeline and the arguments that every task takes.
        names: the files that will be written.
        inputs: the files that the job reads beside the model.
        gradients: that the job takes, as in `open_pipeline`.

    Raises:
        InputError: one of the files would take an input's place; and whatever `open_pipeline` and the
            job raise.
    """
    from smooth_rt.writers import check_output

    check_output(options.output, names, [*inputs, *options.inputs])
    with open_pipeline(options, gradients) as pipe, step_progress(command, steps) as on_step:
        watch = Stopwatch()
        made = job(
            pipe,
            {
                "height": options.height,
                "width": options.width,
                "num_inference_steps": options.num_inference_steps,
                "callback_on_step_end": on_step,
            },
        )
        return made, {"command": command, **described(pipe, options), "seconds": watch.seconds}


def opened_model(options: ModelOptions) -> Model:
    """The model that the options name, without its LoRA."""
    from smooth_rt.model import load_model

    return load_model(options.model, config=options.model_config)


def open_pipeline(options: RunOptions, gradients: Sequence[str] = ()) -> SmoothPipeline:
    """The pipeline that the options name: a bundle, or a model with its LoRA, on an engine.

    Args:
        gradients: that it will be asked for, as in `SmoothPipeline.from_pretrained`: engines that are built here get
            them. Where they cannot be built, and in a bundle without them, they are left to eager autograd, aloud.

    Raises:
        InputError: a bundle is named together with a model or a LoRA, or an option does not fit the model. That is
            said before an engine is built or opened.
    """
    from smooth_rt.pipeline import SmoothPipeline

    if options.engines is not None:
        refuse_model(options)
        if options.model_config is not None and options.engine != "eager":
            raise InputError("--model-config: with --engines it is read for --engine eager alone; leave it out")
        from engines.bundle import Bundle
        from smooth_rt.cache import find
        from smooth_rt.model import read_config

        bundle = Bundle.open(find(options.engines))
        refuse_strength(options, bundle)
        # Engines have default sizes of their own, which the pipeline checks.
        own = (bundle.dims.image_multiple,) * 2
        _check_fit(options, read_config(bundle.config), bundle.dims, own)
        return SmoothPipeline.from_engines(
            bundle,
            options.engine,
            config=options.model_config,
            precision=options.precision,
            lora_strength=options.lora_strength,
            provider=options.provider,
            convolution=options.convolution,
            kernels=options.kernels,
        )
    if options.convolution is not None:
        raise InputError(
            f"--convolution={options.convolution}: chooses within a bundle; name it with --engines (and build it with "
            "`smooth-rt build-engine --convolution winograd`)"
        )
    model = opened_model(options)
    _check_fit(options, model.config(), model.dims, model.dims.image_size)
    gradients = _able(options, gradients)
    try:
        return _pretrained(options, model, gradients)
    except (EngineError, ParityError) as error:
        if not gradients:
            raise
        fault = error
    pipe = _pretrained(options, opened_model(options), ())  # the LoRA may be fused into the other by now
    LOG.warning("gradients: left to eager autograd, for they could not be built (%s)", fault)
    return pipe


def _able(options: RunOptions, gradients: Sequence[str]) -> Sequence[str]:
    """`gradients`, if an engine of the options has them in their precision; else none."""
    from engines.contract import gradients_named
    from engines.providers import joined
    from engines.recipes import RECIPES
    from engines.select import AUTO_ON_GPU

    engine, precision = joined(options.engine, options.provider), options.precision or "fp32"
    recipes = [RECIPES.get(name, {}) for name in (AUTO_ON_GPU if engine == "auto" else (engine,))]
    wanted = set(gradients_named(gradients))
    return gradients if any(wanted <= set(one.get(cast("Precision", precision), ())) for one in recipes) else ()


def _pretrained(options: RunOptions, model: Model, gradients: Sequence[str]) -> SmoothPipeline:
    from smooth_rt.pipeline import SmoothPipeline

    with build_progress() as progress:
        return SmoothPipeline.from_pretrained(
            model,
            options.chosen_lora,
            options.lora_strength,
            options.engine,
            precision=options.precision or "fp32",
            progress=progress,
            provider=options.provider,
            gradients=gradients,
            kernels=options.kernels or "backend",
        )


def _check_fit(options: RunOptions, config: PipelineConfig, dims: Dims, size: tuple[int, int]) -> None:
    """Check what the model's own sizes and timesteps decide; `size` is the default height and width in pixels."""
    from smooth_rt.schedule import Schedule
    from smooth_rt.tasks.checks import image_size

    image_size(options.height, options.width, dims, size)
    Schedule.from_scheduler(config.scheduler(), options.num_inference_steps)


def refuse_model(options: ModelOptions) -> None:
    """A bundle holds its model and its LoRA: refuse others beside it."""
    if options.model != "default" or options.lora is not None:
        raise InputError("--engines: the bundle holds its model and LoRA; leave out --model and --lora")


def refuse_strength(options: ModelOptions, bundle: Bundle) -> None:
    """A strength can be named for a bundle whose LoRA is set as it runs, and for no other."""
    from smooth_rt.opening import check_strength

    check_strength(bundle, options.lora_strength, "--lora-strength")


def need_attention(options: RunOptions, asked: str) -> None:
    """What looks into a network's attention runs on its torch modules alone: refuse it before an engine is built."""
    if options.engine != "eager":
        raise InputError(f"{asked}: built engines do not expose their attention; add --engine eager")


def generators(seeds: range | tuple[int, ...]) -> list[Generator]:
    """A generator for each seed."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def described(pipe: SmoothPipeline, options: ModelOptions) -> dict[str, Any]:
    """What really ran, for a command's result."""
    named = options.chosen_lora
    bundle = pipe.bundle
    if bundle is None and isinstance(options, RunOptions) and options.engines is not None:  # run on its torch weights
        from engines.bundle import Bundle
        from smooth_rt.cache import find

        bundle = Bundle.open(find(options.engines), verify=False)
    if bundle is not None:
        named = bundle.source.lora.source if bundle.source.lora is not None else None
    return {
        "model": pipe.source,
        "lora": named,
        "lora_strength": pipe.lora_strength,
        "engine": pipe.engine,
        "precision": pipe.precision,
        "reason": pipe.reason,
    }
