"""The reader of a scheduler's configuration: the DDIMScheduler that diffusers' own pipeline would sample with.

Every part of the project that needs timesteps, noise levels or the prediction type takes them from `read_scheduler`, so
that the pipeline, builds, training and benchmarks agree with each other and with diffusers' StableDiffusionPipeline.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from smooth_rt.errors import ModelError, reason
from smooth_rt.ranges import as_whole, shown

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

__all__ = ["PredictionType", "corrected_config", "finite_config", "read_scheduler", "stated_values"]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
# diffusers lists here the keys whose values are a class's defaults; `from_config` of another class ignores those.
USED_DEFAULTS = "_use_default_values"
# Keys that DDIM ignores, with the values that leave the noise process as DDIM assumes it.
SAME_PROCESS: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
    "snr_shift_scale": (None, 1),
}
ROUNDING = 1e-6
MOST_TIMESTEPS = 100_000  # a table of each step is made
ADVICE = "use the scheduler configuration of a Stable Diffusion 1.x or 2.x"


def corrected_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Correct a scheduler's configuration as diffusers' StableDiffusionPipeline does.

    Configurations of early Stable Diffusion checkpoints leave out `clip_sample` and `steps_offset`, and diffusers'
    defaults for both are those of models of pixels. Its pipeline therefore sets `clip_sample` to False where it is True
    or left out, and `steps_offset` to 1. The class is kept, and so are keys that DDIM does not know.
    """
    stated = stated_values(config)
    # The pipeline compares with `is True`: it leaves any other value as it is.
    clip_sample = stated.get("clip_sample", True)
    return {**stated, "clip_sample": False if clip_sample is True else clip_sample, "steps_offset": 1}


def stated_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a configuration states, without the defaults of its class that diffusers filled in.

    Raises:
        ModelError: the names of the defaults are no list.
    """
    defaults = config.get(USED_DEFAULTS) or ()
    if not isinstance(defaults, list | tuple):
        raise ModelError(f"scheduler_config: {USED_DEFAULTS} is {shown(defaults)}; give a list, or leave it out")
    return {key: value for key, value in config.items() if key not in defaults and key != USED_DEFAULTS}


def finite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the entries with values that JSON has no form for, such as the `lambda_min_clipped` of -Infinity that
    diffusers writes for DPM-Solver; DDIM reads none of them."""
    return {key: value for key, value in config.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def read_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """Return diffusers' DDIMScheduler of a configuration, corrected as in its StableDiffusionPipeline.

    Args:
        config: of any diffusers scheduler, as in scheduler_config.json. Keys that are unknown are ignored.

    Returns:
        A new scheduler. Its `config.prediction_type` is a `PredictionType`, and `alphas_cumprod` holds the noise level
        of each training timestep, float32 [num_train_timesteps] or longer, in 0..1.

    Raises:
        ModelError: DDIM cannot sample as the configuration asks: it is of another process than discrete diffusion (flow
            matching, EDM), clips or thresholds x0, or holds a value that diffusers does not accept.
    """
    corrected = corrected_config(config)
    _check_process(corrected)
    _check_values(corrected)
    scheduler = _ddim(corrected)
    _check_betas(scheduler)
    return scheduler


def _check_process(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of a process that DDIM cannot follow, though diffusers would read it."""
    from diffusers import SchedulerMixin, schedulers
    from diffusers.utils import DummyObject

    name = config.get("_class_name")
    known: Any = getattr(schedulers, name, None) if isinstance(name, str) else None
    # A class whose dependencies are not installed is a dummy without a signature.
    readable = isinstance(known, type) and issubclass(known, SchedulerMixin) and not isinstance(known, DummyObject)
    if readable and "beta_schedule" not in inspect.signature(known).parameters:
        raise ModelError(f"scheduler_config: _class_name is {name}, which is not of discrete diffusion; {ADVICE}")
    for key, values in SAME_PROCESS.items():
        if config.get(key) not in values:
            raise ModelError(
                f"scheduler_config: {key} is {shown(config[key])}, which is not of discrete diffusion; {ADVICE}"
            )


def _check_values(config: Mapping[str, Any]) -> None:
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise ModelError(
                f"scheduler_config: {key} is {shown(config[key])}, which is for models of pixels; set it to false"
            )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        raise ModelError(
            f"scheduler_config: unknown prediction_type {shown(prediction_type)}; "
            f"it is one of {', '.join(get_args(PredictionType))}"
        )
    count = config.get("num_train_timesteps", 1000)
    if as_whole(count) is None or not 2 <= count <= MOST_TIMESTEPS:
        raise ModelError(
            f"scheduler_config: num_train_timesteps is {shown(count)}; give the number of training steps, from 2 to "
            f"{MOST_TIMESTEPS}"
        )


def _ddim(config: Mapping[str, Any]) -> DDIMScheduler:
    from diffusers import DDIMScheduler

    taken = ("_class_name", *inspect.signature(DDIMScheduler).parameters)
    try:
        # diffusers logs a warning for keys that it does not know; they are left out here.
        scheduler: DDIMScheduler = DDIMScheduler.from_config({key: config[key] for key in taken if key in config})
    except NotImplementedError as error:
        raise ModelError(
            f"scheduler_config: beta_schedule is {shown(config.get('beta_schedule'))}, which diffusers' DDIMScheduler "
            "does not have; give the betas as trained_betas"
        ) from error
    except Exception as error:  # whatever torch makes of a wrong value
        raise ModelError(
            f"scheduler_config: {reason(error)}; give values that diffusers' DDIMScheduler accepts"
        ) from error
    try:
        scheduler.set_timesteps(1)
    except Exception as error:
        raise ModelError(
            f"scheduler_config: timestep_spacing is {shown(config.get('timestep_spacing'))}; give leading, trailing or "
            "linspace"
        ) from error
    return scheduler


def _check_betas(scheduler: DDIMScheduler) -> None:
    count, betas, levels = scheduler.config.num_train_timesteps, scheduler.betas, scheduler.alphas_cumprod
    if betas.ndim != 1 or len(betas) < count:
        raise ModelError(
            f"scheduler_config: trained_betas has shape {list(betas.shape)}; give one number for each of the {count} "
            "training timesteps"
        )
    # Rescaling to zero SNR rounds betas of 0 to a little below.
    within = (levels >= 0) & (levels <= 1) & (betas >= -ROUNDING) & (betas <= 1)
    if not bool(within.all()):  # which NaN is not either
        first = int((~within).nonzero()[0])
        raise ModelError(
            f"scheduler_config: beta is {betas[first].item():g} and alpha-bar {levels[first].item():g} at timestep "
            f"{first}; give beta_start, beta_end or trained_betas that keep both within 0..1"
        )
