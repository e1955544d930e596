"""DDIM inversion: Song et al. 2021, arXiv 2010.02502: the sampler is the Euler integration of an ODE (Eq. 14, section
4.3), whose reverse encodes an image (section 5.4).

The sampler's steps are walked backwards at guidance 1. The noise on the way from level i - 1 to level i is predicted
at (x_{i-1}, t_i), as in the `ddim_loop` of null-text inversion (Mokady et al. 2023, arXiv 2211.09794). Sampling meets
(x_i, t_i) instead; that difference is the error of the method, and it shrinks with the number of steps.

Evaluations in T steps: T there; T back, 2T with guidance. Under the empty prompt guidance is away from itself: T
back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

__all__ = ["METHOD", "WITHOUT_TEXT", "levels"]


def levels(job: Job) -> list[Tensor]:
    """The latents [N, C, h, w] of every level from x_1 to x_T, at guidance 1."""

    def predict(latents: Tensor, _: int, timestep: int) -> Tensor:
        return job.pipe.predict(latents, timestep, job.prompt_embeds)

    found: list[Tensor] = []
    job.pipe.denoise(job.latents, job.schedule.inverse_steps, predict, job.callback_on_step_end, found)
    return found


def _invert(job: Job) -> Noise:
    found = levels(job)
    return Noise(
        latents=found[-1],
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=job.empty(),
        trajectory=torch.stack(found),
    )


METHOD = Method(_invert, lambda steps, guided: Evaluations(steps, 2 * steps if guided else steps))
WITHOUT_TEXT = Method(_invert, lambda steps, _: Evaluations(steps, steps), with_text=False)
