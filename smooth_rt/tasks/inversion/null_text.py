"""Null-text inversion: Mokady et al. 2023, arXiv 2211.09794, Algorithm 1, on the authors' schedule.

DDIM inversion at guidance 1 gives x*_0 ... x*_T. From x_T = x*_T, sampling with guidance w is made to follow it: at
each step the unconditional embedding e is fitted to

    | x*_{i-1} - DDIM(x_i, u(e) + w * (c - u(e))) |^2 / (C h w)

by Adam, at a learning rate of 0.01 * (1 - i / 100) in step i = 0, 1, ..., beginning from the last step's e, for at
most 10 rounds, until the loss is below 1e-5 + i * 2e-5. The schedule is that of 50 steps; of T steps, i stands for 50
i / T. Guidance 7.5. The step is linear in u, and c does not depend on e, so a round is one call of
`SmoothPipeline.vjp`.

Images are fitted together, each with an Adam of its own, and one that is done leaves the batch. Images that share one
list of embeddings (the paper's morph between two) are fitted by the sum of their losses. At guidance 1 nothing
depends on e and nothing is fitted.

Evaluations in T steps: T there, then 2T and at most 10T gradients; 2T back. Without guidance T there and T back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smooth_rt.schedule import Step, ddim_coefficients, ddim_step
from smooth_rt.tasks.inversion import ddim
from smooth_rt.tasks.inversion.adam import Adam
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise
from smooth_rt.tasks.inversion.kept import Fit, Kept, cohorts, not_finite, opened, walk_on

__all__ = ["METHOD", "ROUNDS"]

ROUNDS = 10
SCHEDULED = 50  # steps that the rates and thresholds are of
TEXT = ("encoder_hidden_states",)


def _invert(job: Job) -> Noise:
    if job.guidance_scale == 1:
        return ddim.METHOD.invert(job)
    count = len(job.latents)
    groups = [tuple(range(count))] if job.shared else [(i,) for i in range(count)]
    fits = opened(job, "null-text", groups)
    steps = len(job.schedule.steps)
    lacking = [fit for fit in fits if len(fit.kept.levels) <= steps]
    if lacking:
        every = job.only([i for fit in lacking for i in fit.images])
        path = torch.stack([every.latents, *ddim.levels(every)])
        for fit, levels in zip(lacking, torch.split(path, [len(fit.images) for fit in lacking], 1), strict=True):
            fit.kept = Kept(list(levels), levels[-1], [])
    for cohort in cohorts(fits, lambda kept: len(kept.embeds)):
        if len(cohort[0].kept.embeds) < steps:
            _fit(job, cohort)
    path = torch.cat([torch.stack(fit.kept.levels) for fit in fits], dim=1)
    embeds = torch.stack([torch.stack(fit.kept.embeds) for fit in fits], dim=1)
    return Noise(
        latents=path[-1],
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=embeds[:, [k for k, fit in enumerate(fits) for _ in fit.images]],
        trajectory=path[1:],
    )


def _fit(job: Job, fits: list[Fit]) -> None:
    """Fit the steps that are left to all of `fits`, which have come equally far."""
    pipe, schedule = job.pipe, job.schedule
    done = len(fits[0].kept.embeds)
    images = [i for fit in fits for i in fit.images]
    owner = torch.tensor([k for k, fit in enumerate(fits) for _ in fit.images])
    path = torch.cat([torch.stack(fit.kept.levels) for fit in fits], dim=1)
    cond_embeds = job.prompt_embeds[images]
    embeds = torch.stack([fit.kept.embeds[-1] for fit in fits]) if done else pipe.encode_prompt([""] * len(fits))
    scale = job.guidance_scale

    def move(latents: Tensor, k: int, step: Step) -> Tensor:
        nonlocal embeds
        index = done + k
        cond = pipe.predict(latents, step.timestep, cond_embeds)
        of_sample, of_output = ddim_coefficients(step.alpha_from, step.alpha_to, schedule.prediction_type)
        # The step less its target, in terms of the unconditional output: slope * u + rest.
        slope = of_output * (1 - scale)
        rest = of_sample * latents + of_output * scale * cond - path[len(schedule.steps) - index - 1]
        embeds = _rounds(job, latents, index, step.timestep, embeds, owner, slope, rest, images)
        uncond = pipe.predict(latents, step.timestep, embeds.index_select(0, owner))
        output = uncond + scale * (cond - uncond)
        return ddim_step(latents, output, step.alpha_from, step.alpha_to, schedule.prediction_type)

    def after(number: int, latents: Tensor) -> Kept:
        kept = fits[number].kept
        return Kept(kept.levels, latents, [*kept.embeds, embeds[number]])

    walk_on(job, fits, schedule.steps[done:], move, after)


def _rounds(
    job: Job,
    latents: Tensor,
    index: int,
    timestep: int,
    embeds: Tensor,
    owner: Tensor,
    slope: float,
    rest: Tensor,
    images: list[int],
) -> Tensor:
    """The embeddings [G, L, D] after the rounds of one step; those of a fit that is done are left alone."""
    at = index * SCHEDULED / len(job.schedule.steps)
    threshold = 1e-5 + at * 2e-5 if job.early_stop else 0.0
    adam = Adam(embeds, 1e-2 * (1 - at / 100))
    size = latents[0].numel()
    active = torch.ones(len(embeds), dtype=torch.bool)
    for _ in range(ROUNDS):
        # By index_select: indexing by a tensor wakes torch's threads for rows this few, which keep an engine's waiting.
        rows = active.index_select(0, owner).nonzero()[:, 0]
        owners = owner.index_select(0, rows)
        rests = rest.index_select(0, rows)
        uncond, grads = job.pipe.vjp(
            latents.index_select(0, rows),
            timestep,
            adam.values.index_select(0, owners),
            TEXT,
            2 * slope / size * rests,
            torch.full((len(rows),), 2 * slope**2 / size, dtype=torch.float32),
        )
        each = (slope * uncond + rests).square().flatten(1).mean(1)
        grad = grads["encoder_hidden_states"]
        if not bool(torch.isfinite(each).all() and torch.isfinite(grad).all()):
            wrong = next(k for k in range(len(rows)) if not (each[k].isfinite() and grad[k].isfinite().all()))
            mend = "lower guidance_scale, or check the model's weights"
            raise not_finite(job, "null-text", index, timestep, images[int(rows[wrong])], mend)
        loss = _summed(each, owners, len(embeds))
        adam.step(_summed(grad, owners, len(embeds)), active)
        active = active & (loss >= threshold)
        if not active.any():
            break
    return adam.values


def _summed(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """The sum of each owner's rows [R, ...], [count, ...]; by hand for the reason that `_rounds` gives."""
    sums = list(torch.zeros(count, *rows.shape[1:], dtype=rows.dtype))
    for row, owner in zip(rows, owners.tolist(), strict=True):
        sums[owner] = sums[owner] + row
    return torch.stack(sums)


def _evaluations(steps: int, guided: bool) -> Evaluations:
    return Evaluations(3 * steps, 2 * steps, ROUNDS * steps) if guided else Evaluations(steps, steps)


METHOD = Method(_invert, _evaluations, guidance_scale=7.5, walks=3, wrt=TEXT)
