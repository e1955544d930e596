"""SPDInv, source prompt disentangled inversion: Li et al. 2024, arXiv 2403.11105, with the authors' settings.

Each step of inversion looks for the fixed point x_i = f(x_i) = A * x_{i-1} + B * eps(x_i, t_i) that sampling would
meet (`fixed_point` iterates it), by the gradient of

    | f(x_i) - x_i |^2 / (C h w)

with respect to the latent, by Adam at a rate of 0.001, from DDIM inversion's step on, for at most 25 rounds or until
the loss is below 5e-6. The gradient is 2 (B J^T r - r) / (C h w) with r = f(x_i) - x_i, and r is linear in eps: a
round is one call of `SmoothPipeline.vjp`. The authors' optimiser also shrinks the latent a little (weight decay),
which Adam here does not, and takes one more step after the last look at the loss. As in their code the source prompt
takes the empty one's place when sampling, so every guidance rebuilds the image.

Images are fitted together, and one that is done leaves the batch. What was found so far is kept (`kept`), each image's
latents in a file of their own.

Evaluations in T steps: T there and at most 25T gradients; T back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smooth_rt.schedule import Step, ddim_coefficients
from smooth_rt.tasks.inversion.adam import Adam
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise
from smooth_rt.tasks.inversion.kept import Fit, Kept, cohorts, not_finite, opened, walk_on

__all__ = ["METHOD", "ROUNDS"]

ROUNDS = 25
RATE = 1e-3
THRESHOLD = 5e-6


def _invert(job: Job) -> Noise:
    steps = len(job.schedule.steps)
    fits = opened(job, "spdinv", [(i,) for i in range(len(job.latents))])
    for cohort in cohorts(fits, lambda kept: len(kept.levels)):
        if len(cohort[0].kept.levels) <= steps:
            _solve(job, cohort)
    path = torch.cat([torch.stack(fit.kept.levels) for fit in fits], dim=1)
    return Noise(
        latents=path[-1],
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=job.prompt_embeds,
        trajectory=path[1:],
    )


def _solve(job: Job, fits: list[Fit]) -> None:
    """Take the steps that are left to all of `fits`, which have come equally far."""
    schedule = job.schedule
    done = len(fits[0].kept.levels) - 1
    images = [i for fit in fits for i in fit.images]
    text = job.prompt_embeds[images]

    def move(lower: Tensor, k: int, inverse: Step) -> Tensor:
        step = schedule.steps[len(schedule.steps) - 1 - done - k]
        forwards = ddim_coefficients(step.alpha_from, step.alpha_to, schedule.prediction_type)
        keep, slope = 1 / forwards[0], -forwards[1] / forwards[0]  # A and B
        begins = keep * lower + slope * job.pipe.predict(lower, inverse.timestep, text)
        return _rounds(job, begins, done + k, inverse.timestep, text, slope, keep * lower, images)

    def after(number: int, latents: Tensor) -> Kept:
        return Kept([*fits[number].kept.levels, latents], latents, [])

    walk_on(job, fits, schedule.inverse_steps[done:], move, after)


def _rounds(
    job: Job,
    begins: Tensor,
    index: int,
    timestep: int,
    text: Tensor,
    slope: float,
    kept: Tensor,
    images: list[int],
) -> Tensor:
    """The latents x [N, C, h, w] after the rounds of one step, where f(x) = kept + slope * eps(x)."""
    threshold = THRESHOLD if job.early_stop else 0.0
    size = begins[0].numel()
    adam = Adam(begins, RATE)
    active = torch.ones(len(begins), dtype=torch.bool)
    for _ in range(ROUNDS):
        # By index_select, as in `null_text`.
        rows = active.nonzero()[:, 0]
        values = adam.values.index_select(0, rows)
        rest = kept.index_select(0, rows) - values
        output, grads = job.pipe.vjp(
            values,
            timestep,
            text.index_select(0, rows),
            ("sample",),
            2 * slope / size * rest,
            torch.full((len(rows),), 2 * slope**2 / size, dtype=torch.float32),
        )
        residual = slope * output + rest
        loss = residual.square().flatten(1).mean(1)
        grad = grads["sample"] - 2 / size * residual
        finite = loss.isfinite() & grad.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            wrong = images[int(rows[int((~finite).nonzero()[0])])]
            raise not_finite(job, "spdinv", index, timestep, wrong, "check the model's weights")
        active = active.index_copy(0, rows, loss >= threshold)
        if not active.any():
            break
        adam.step(torch.zeros_like(begins).index_copy(0, rows, grad), active)
    return adam.values


METHOD = Method(
    _invert, lambda steps, _: Evaluations(steps, steps, ROUNDS * steps), guidance_scale=7.5, wrt=("sample",)
)
