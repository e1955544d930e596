"""EDICT: Wallace, Gokul & Naik 2023, arXiv 2211.12446, section 4: two latents that step in turn, exactly undone.

With A and B of the DDIM step (x' = A * x + B * eps), one step of sampling is

    x' = A * x + B * eps(y)     y' = A * y + B * eps(x')     x <- p * x' + (1 - p) * y'     y <- p * y' + (1 - p) * x

where the last x is the new one; p = 0.93 keeps the two together. Every line can be solved for what it replaced, so
inversion is the same four lines from the end, and the image comes back up to rounding at any guidance, for guidance
is the same both ways. Which of the two goes first alternates, as in the authors' code.

Evaluations in T steps: 2T there, 2T back; both twice with guidance. They depend on one another, so they do not go
into one call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smooth_rt.errors import InputError
from smooth_rt.schedule import Schedule, Step, ddim_coefficients
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

if TYPE_CHECKING:
    from smooth_rt.loop import Predict, StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["METHOD", "MIX"]

MIX = 0.93  # p


def _invert(job: Job) -> Noise:
    negative = job.empty()
    predict = guided(job.pipe, job.prompt_embeds, negative, job.guidance_scale)
    last = len(job.schedule.steps) - 1

    def move(pair: Tensor, i: int, step: Step) -> Tensor:
        index = last - i
        sampled = job.schedule.steps[index]
        of_sample, of_output = _coefficients(job.schedule, sampled)
        first, second = _in_turn(pair, index)
        second = (second - (1 - MIX) * first) / MIX
        first = (first - (1 - MIX) * second) / MIX
        second = (second - of_output * predict(first, index, step.timestep)) / of_sample
        first = (first - of_output * predict(second, index, step.timestep)) / of_sample
        return torch.cat(_in_turn(torch.cat([first, second]), index))

    found: list[Tensor] = []
    pair = torch.cat([job.latents, job.latents])
    latents, companion = job.pipe.walk(pair, job.schedule.inverse_steps, move, job.callback_on_step_end, found).chunk(2)
    return Noise(
        latents=latents,
        companion=companion,
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=negative,
        trajectory=torch.stack([level[: len(job.latents)] for level in found]),
    )


def _sample(
    pipe: SmoothPipeline,
    noise: Noise,
    schedule: Schedule,
    predict: Predict,
    callback_on_step_end: StepCallback | None = None,
    until: float = math.inf,  # noqa: ARG001
) -> Tensor:
    assert noise.companion is not None

    def move(pair: Tensor, i: int, step: Step) -> Tensor:
        of_sample, of_output = _coefficients(schedule, step)
        first, second = _in_turn(pair, i)
        first = of_sample * first + of_output * predict(second, i, step.timestep)
        second = of_sample * second + of_output * predict(first, i, step.timestep)
        first = MIX * first + (1 - MIX) * second
        second = MIX * second + (1 - MIX) * first
        return torch.cat(_in_turn(torch.cat([first, second]), i))

    pair = torch.cat([noise.latents, noise.companion])
    return pipe.walk(pair, schedule.steps, move, callback_on_step_end)[: len(noise.latents)]


def _in_turn(pair: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The two latents, the one first that goes first in this step of sampling. It is its own inverse."""
    x, y = pair.chunk(2)
    return (y, x) if index % 2 else (x, y)


def _coefficients(schedule: Schedule, step: Step) -> tuple[float, float]:
    of_sample, of_output = ddim_coefficients(step.alpha_from, step.alpha_to, schedule.prediction_type)
    if of_sample == 0:
        raise InputError(
            "edict: this model's last step (sample prediction, to alpha-bar 1) forgets the latent, so nothing undoes "
            "it; use another method"
        )
    return of_sample, of_output


def _evaluations(steps: int, guided: bool) -> Evaluations:
    rows = 2 if guided else 1
    return Evaluations(2 * rows * steps, 2 * rows * steps)


METHOD = Method(_invert, _evaluations, _sample)
