"""Time: the timesteps and noise levels of a sampler, and the DDIM step. Pure functions on tensors.

A latent at noise level `alpha` (alpha-bar, the cumulative product, 0..1) is

    x = sqrt(alpha) * x0 + sqrt(1 - alpha) * eps

and DDIM (Song et al. 2021, arXiv 2010.02502) moves it from one level to another along the predicted x0 and eps. The
same formula removes noise (alpha grows) and adds it back (alpha falls: DDIM inversion).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from smooth_rt.errors import InputError, ModelError
from smooth_rt.ranges import as_whole, shown
from smooth_rt.scheduler_config import PredictionType, read_scheduler

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

__all__ = ["PredictionType", "Schedule", "Step", "add_noise", "ddim_coefficients", "ddim_step", "noise_of"]


class Step(NamedTuple):
    """One step: the timestep given to the UNet, and alpha-bar before and after the step (0..1)."""

    timestep: int
    alpha_from: float
    alpha_to: float


@dataclass(frozen=True)
class Schedule:
    """The steps of one sampling run, from noise to image.

    Args:
        steps: in the order of sampling: timesteps fall, alpha-bar grows.
        prediction_type: what the UNet predicts: "epsilon", "v_prediction" or "sample".
    """

    steps: tuple[Step, ...]
    prediction_type: PredictionType

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_inference_steps: int) -> Schedule:
        """Return the schedule that diffusers' StableDiffusionPipeline samples along with DDIM.

        Args:
            config: of any diffusers scheduler, as in scheduler_config.json; see `read_scheduler`.
            num_inference_steps: see `from_scheduler`.

        Raises:
            InputError: as `from_scheduler`.
            ModelError: as `read_scheduler` and `from_scheduler`.
        """
        return cls.from_scheduler(read_scheduler(config), num_inference_steps)

    @classmethod
    def from_scheduler(cls, scheduler: DDIMScheduler, num_inference_steps: int) -> Schedule:
        """Return the steps of diffusers' DDIMScheduler; betas and timesteps are all computed by diffusers itself.

        Args:
            scheduler: as `read_scheduler` returns it; it is left as it is.
            num_inference_steps: number of steps, in 1..num_train_timesteps, or one less where timestep_spacing is
                "leading".

        Raises:
            InputError: `num_inference_steps` is out of range, or diffusers rounds its timesteps to one below 0.
            ModelError: the model predicts noise, and the first step starts at zero SNR.
        """
        read = scheduler.config
        train = int(read["num_train_timesteps"])
        count = as_whole(num_inference_steps)
        # "leading" spacing moves every timestep up by one: with a step for each, the first would be beyond the last.
        most = train - 1 if read["timestep_spacing"] == "leading" else train
        if count is None or not 1 <= count <= most:
            raise InputError(
                f"num_inference_steps={shown(num_inference_steps)}: give a whole number from 1 to {most}, "
                "as the model allows"
            )
        timesteps = _timesteps(scheduler, count)
        if timesteps[-1] < 0:
            # With "trailing" spacing, float rounding adds a step at timestep -1 to some counts (61, 103 of 1000).
            fewer = next(fewer for fewer in range(count - 1, 0, -1) if _timesteps(scheduler, fewer)[-1] >= 0)
            raise InputError(
                f"num_inference_steps={count}: diffusers' trailing timesteps end at {timesteps[-1]}, which no model is "
                f"trained for; give another number, such as {fewer}"
            )
        # As in DDIMScheduler.step: the level below is one stride down, or the final one.
        stride = train // count
        alphas = scheduler.alphas_cumprod
        final = float(scheduler.final_alpha_cumprod)
        steps = tuple(Step(t, float(alphas[t]), float(alphas[t - stride]) if t >= stride else final) for t in timesteps)
        kind = cast(PredictionType, read["prediction_type"])
        if kind == "epsilon" and any(step.alpha_from == 0 for step in steps):
            raise ModelError(
                f"scheduler_config: sampling starts at timestep {steps[0].timestep}, which has zero SNR, and noise "
                "prediction says nothing there; set prediction_type to v_prediction, or rescale_betas_zero_snr to false"
            )
        return cls(steps, kind)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The UNet's timesteps, falling."""
        return tuple(step.timestep for step in self.steps)

    @property
    def inverse_steps(self) -> tuple[Step, ...]:
        """The same steps walked from image to noise: each keeps its timestep and swaps its levels.

        The noise on the way from level i - 1 to level i is thus predicted at (x_{i-1}, t_i), as in the `ddim_loop` of
        null-text inversion (arXiv 2211.09794).
        """
        return tuple(Step(s.timestep, s.alpha_to, s.alpha_from) for s in reversed(self.steps))


def _timesteps(scheduler: DDIMScheduler, count: int) -> list[int]:
    """The timesteps of so many steps, falling, without changing `scheduler`."""
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(count)
    return [int(timestep) for timestep in scheduler.timesteps]


def ddim_step(
    sample: Tensor, model_output: Tensor, alpha_from: float, alpha_to: float, prediction_type: PredictionType
) -> Tensor:
    """Move `sample` from noise level `alpha_from` to `alpha_to`: DDIM, Song et al. 2021, eq. 12 with eta = 0.

        x_to = sqrt(alpha_to) * x0 + sqrt(1 - alpha_to) * eps

    with x0 and eps read from the model's output m, where a = alpha_from and x = sample:

        epsilon:       eps = m,                             x0 = (x - sqrt(1 - a) * m) / sqrt(a)
        v_prediction:  eps = sqrt(a) * m + sqrt(1 - a) * x, x0 = sqrt(a) * x - sqrt(1 - a) * m
        sample:        eps = (x - sqrt(a) * m) / sqrt(1 - a), x0 = m

    One function for both directions: alpha_to > alpha_from removes noise, alpha_to < alpha_from adds it back.

    Args:
        sample: the latent x, any shape.
        model_output: m, of the same shape.
        alpha_from: alpha-bar of `sample`, 0..1.
        alpha_to: alpha-bar of the result, 0..1.
        prediction_type: what m is.

    Raises:
        InputError: the output does not determine x0 and eps: "epsilon" at alpha_from = 0 (pure noise), or "sample" at
            alpha_from = 1 (no noise).
    """
    signal, noise = math.sqrt(alpha_from), math.sqrt(1 - alpha_from)
    if prediction_type == "v_prediction":
        x0 = signal * sample - noise * model_output
        eps = signal * model_output + noise * sample
    elif prediction_type == "epsilon":
        if alpha_from == 0:
            raise InputError("scheduler_config: epsilon prediction cannot start at zero SNR; use v_prediction there")
        eps = model_output
        x0 = (sample - noise * eps) / signal
    else:
        if alpha_from == 1:
            raise InputError(
                "scheduler_config: sample prediction cannot be inverted from alpha-bar 1; set set_alpha_to_one to false"
            )
        x0 = model_output
        eps = (sample - signal * x0) / noise
    return math.sqrt(alpha_to) * x0 + math.sqrt(1 - alpha_to) * eps


def ddim_coefficients(alpha_from: float, alpha_to: float, prediction_type: PredictionType) -> tuple[float, float]:
    """The DDIM step as what it is, linear: A and B of `ddim_step(x, m, …) = A * x + B * m`.

    Known so, a step can be undone with the very output m that it was made with: `x = (x_to - B * m) / A`.

    Raises:
        InputError: as `ddim_step`.
    """
    unit = torch.ones((), dtype=torch.float64)
    of_sample = ddim_step(unit, 0 * unit, alpha_from, alpha_to, prediction_type)
    of_output = ddim_step(0 * unit, unit, alpha_from, alpha_to, prediction_type)
    return float(of_sample), float(of_output)


def noise_of(sample: Tensor, model_output: Tensor, alpha: float, prediction_type: PredictionType) -> Tensor:
    """eps of `sample` at level `alpha`, read from the model's output as in `ddim_step`.

    Raises:
        InputError: as `ddim_step`.
    """
    return ddim_step(sample, model_output, alpha, 0.0, prediction_type)


def add_noise(sample: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """`sqrt(alpha) * sample + sqrt(1 - alpha) * noise`: a clean latent brought to level `alpha` (DDPM, eq. 4).

    Args:
        sample: the clean latent x0, any shape.
        noise: N(0, I), of the same shape.
        alpha: alpha-bar of the result, 0..1.
    """
    return math.sqrt(alpha) * sample + math.sqrt(1 - alpha) * noise
