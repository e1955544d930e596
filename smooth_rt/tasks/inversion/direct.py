"""Direct inversion (PnP inversion): Ju et al. 2024, arXiv 2310.01506, Algorithm 1.

The latents of DDIM inversion are stored. On the way back, each step's distance o_i from what sampling makes of them
to the stored ones is added again, so the source is rebuilt exactly, whatever the guidance: its reconstruction is
stored, not sampled, and says nothing of the noise. Under another prompt (after the switch of an edit) nothing is
added, as the paper found best. Between two images the distances are mixed linearly.

Evaluations in T steps: T there and T for the distances, 2T with guidance; T back, 2T with guidance.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smooth_rt.schedule import Schedule, Step, ddim_step
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion import ddim
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

if TYPE_CHECKING:
    from smooth_rt.loop import Predict, StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["METHOD"]


def _invert(job: Job) -> Noise:
    found = ddim.levels(job)
    stored = [job.latents, *found][::-1]  # as sampling meets them
    negative = job.empty()
    predict = guided(job.pipe, job.prompt_embeds, negative, job.guidance_scale)
    corrections = []

    def move(latents: Tensor, i: int, step: Step) -> Tensor:
        corrections.append(stored[i + 1] - _stepped(latents, i, step, job.schedule, predict))
        return stored[i + 1]

    job.pipe.walk(stored[0], job.schedule.steps, move, job.callback_on_step_end)
    return Noise(
        latents=stored[0],
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=negative,
        corrections=torch.stack(corrections),
        trajectory=torch.stack(found),
    )


def _sample(
    pipe: SmoothPipeline,
    noise: Noise,
    schedule: Schedule,
    predict: Predict,
    callback_on_step_end: StepCallback | None = None,
    until: float = math.inf,
) -> Tensor:
    corrections = noise.corrections
    assert corrections is not None

    def move(latents: Tensor, i: int, step: Step) -> Tensor:
        made = _stepped(latents, i, step, schedule, predict)
        return made + corrections[i] if i < until else made

    return pipe.walk(noise.latents, schedule.steps, move, callback_on_step_end)


def _stepped(latents: Tensor, i: int, step: Step, schedule: Schedule, predict: Predict) -> Tensor:
    """What sampling makes of the latents."""
    output = predict(latents, i, step.timestep)
    return ddim_step(latents, output, step.alpha_from, step.alpha_to, schedule.prediction_type)


def _evaluations(steps: int, guided: bool) -> Evaluations:
    rows = 2 if guided else 1
    return Evaluations(steps + rows * steps, rows * steps)


METHOD = Method(_invert, _evaluations, _sample, guidance_scale=7.5, walks=3)
