"""O-BELM: Wang et al. 2024, arXiv 2410.07273, Eq. 18: a two-step sampler that is undone exactly.

In X = x / sqrt(alpha) and s = sqrt((1 - alpha) / alpha) the path of DDIM is dX = eps ds. From levels i + 1 and i,
with h_i = s_i - s_{i-1}:

    X_{i-1} = q^2 * X_{i+1} + (1 - q^2) * X_i - h_i (1 + q) * eps(x_i, t_i),   q = h_i / h_{i+1}

which has the smallest local error of such formulas (O(h^3)). It can be solved for X_{i+1}, so inversion takes the
same formula and the same predictions the other way: the image comes back up to rounding at any guidance, for guidance
is the same both ways. The first step of inversion, which has one level alone, is DDIM's; sampling begins with the
last two levels. A change made on the way there grows by (h_T / h_1)^2, so the pair is computed in float64 and handed
to the UNet in float32.

Evaluations in T steps: T there, T - 1 back; both twice with guidance.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smooth_rt.errors import InputError
from smooth_rt.schedule import Schedule, Step, ddim_step, noise_of
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

if TYPE_CHECKING:
    from smooth_rt.loop import Predict, StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["METHOD"]


def _invert(job: Job) -> Noise:
    negative = job.empty()
    schedule, kind = job.schedule, job.schedule.prediction_type
    predict = guided(job.pipe, job.prompt_embeds, negative, job.guidance_scale)
    last = len(schedule.steps) - 1
    _check(schedule)

    def move(pair: Tensor, i: int, step: Step) -> Tensor:
        lower, at = pair.chunk(2)
        if i == 0:
            output = predict(at.float(), last, step.timestep)
            return torch.cat([at, ddim_step(at, output.double(), step.alpha_from, step.alpha_to, kind)])
        index = last - i + 1  # of the step of sampling that leaves from `at`
        of_upper, of_at, of_noise = _weights(schedule, index)
        noise = _noise(at, index, schedule, predict)
        return torch.cat([at, (lower - of_at * at - of_noise * noise) / of_upper])

    found: list[Tensor] = []
    pair = torch.cat([job.latents, job.latents]).double()
    pair = job.pipe.walk(pair, schedule.inverse_steps, move, job.callback_on_step_end, found).float()
    companion, latents = pair.chunk(2)
    return Noise(
        latents=latents,
        companion=companion,
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=negative,
        trajectory=torch.stack([level[len(job.latents) :].float() for level in found]),
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
    _check(schedule)

    def move(pair: Tensor, i: int, _: Step) -> Tensor:
        upper, at = pair.chunk(2)
        of_upper, of_at, of_noise = _weights(schedule, i + 1)
        return torch.cat([at, of_upper * upper + of_at * at + of_noise * _noise(at, i + 1, schedule, predict)])

    pair = torch.cat([noise.latents, noise.companion]).double()
    return pipe.walk(pair, schedule.steps[1:], move, callback_on_step_end)[len(noise.latents) :].float()


def _noise(at: Tensor, index: int, schedule: Schedule, predict: Predict) -> Tensor:
    """eps of the latents at the level that step `index` of sampling leaves from."""
    step = schedule.steps[index]
    output = predict(at.float(), index, step.timestep).double()
    return noise_of(at, output, step.alpha_from, schedule.prediction_type)


def _weights(schedule: Schedule, index: int) -> tuple[float, float, float]:
    """What x_{i+1}, x_i and eps(x_i) weigh in x_{i-1}, where step `index` of sampling goes from i to i - 1."""
    before, step = schedule.steps[index - 1], schedule.steps[index]
    upper, at, lower = before.alpha_from, step.alpha_from, step.alpha_to
    above, below = _spread(upper) - _spread(at), _spread(at) - _spread(lower)
    ratio = (below / above) ** 2
    return (
        ratio * math.sqrt(lower / upper),
        (1 - ratio) * math.sqrt(lower / at),
        -below * (below + above) / above * math.sqrt(lower),
    )


def _spread(alpha: float) -> float:
    return math.sqrt((1 - alpha) / alpha)


def _check(schedule: Schedule) -> None:
    if schedule.steps[0].alpha_from == 0:
        raise InputError("belm: this model's schedule starts at zero SNR, where the formula has no value; use edict")
    if len(schedule.steps) < 2:
        raise InputError("num_inference_steps=1: belm takes two levels at once; give at least 2")


def _evaluations(steps: int, guided: bool) -> Evaluations:
    rows = 2 if guided else 1
    return Evaluations(rows * steps, rows * (steps - 1))


METHOD = Method(_invert, _evaluations, _sample)
