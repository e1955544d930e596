"""Fixed-point inversion: AIDI, Pan et al. 2023, arXiv 2309.04907, section 3.

Sampling goes from x_i to x_{i-1} with the noise predicted at x_i. The x_i that it leads to x_{i-1} from solves

    x_i = f(x_i) = A * x_{i-1} + B * eps(x_i, t_i)

DDIM inversion takes one step of the iteration x <- f(x) from x_{i-1}. Here it is iterated, sped up by Anderson's
method with a memory of one (the paper's AIDI_A with m = 1), whose weight is found for each image alone:

    x^{k+1} = f^k - g * (f^k - f^{k-1}),  g = <r^k, r^k - r^{k-1}> / |r^k - r^{k-1}|^2,  r^k = f^k - x^k

It is iterated at the guidance of the way back; where that is large, f is no contraction and the iteration need not
settle.

Evaluations in T steps: 5T there (ITERATIONS = 5), T back; both twice with guidance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smooth_rt.schedule import Step, ddim_coefficients
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

__all__ = ["ITERATIONS", "METHOD"]

ITERATIONS = 5


def _invert(job: Job) -> Noise:
    negative = job.empty()
    predict = guided(job.pipe, job.prompt_embeds, negative, job.guidance_scale)
    last = len(job.schedule.steps) - 1

    def move(lower: Tensor, i: int, inverse: Step) -> Tensor:
        step = job.schedule.steps[last - i]
        of_sample, of_output = ddim_coefficients(step.alpha_from, step.alpha_to, job.schedule.prediction_type)

        def upper(at: Tensor) -> Tensor:
            return (lower - of_output * predict(at, last - i, inverse.timestep)) / of_sample

        at, found = lower, upper(lower)
        earlier = found, found - at
        at = found
        for _ in range(ITERATIONS - 1):
            found = upper(at)
            rest = found - at
            change = (rest - earlier[1]).flatten(1)
            weight = (rest.flatten(1) * change).sum(1) / change.square().sum(1).clamp_min(1e-30)
            mixed = found - weight[:, None, None, None] * (found - earlier[0])
            earlier, at = (found, rest), mixed
        return at

    found: list[Tensor] = []
    final = job.pipe.walk(job.latents, job.schedule.inverse_steps, move, job.callback_on_step_end, found)
    return Noise(
        latents=final,
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=negative,
        trajectory=torch.stack(found),
    )


def _evaluations(steps: int, guided: bool) -> Evaluations:
    rows = 2 if guided else 1
    return Evaluations(ITERATIONS * rows * steps, rows * steps)


METHOD = Method(_invert, _evaluations)
