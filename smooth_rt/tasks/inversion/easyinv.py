"""EasyInv: Zhang et al. 2024, arXiv 2408.05159: DDIM inversion that leans back on the latent before.

In some early steps the latent of DDIM inversion is blended with the one that it came from, x_i <- eta * x_i + (1 -
eta) * x_{i-1}, which keeps more of the image and less of the predictions' errors. Here eta = 0.5 in the steps 0.05 T
< i < 0.25 T, as the authors' code for SD1.4 has it. The blend leaves the noise level that the sampler expects: it
helps a model whose DDIM inversion goes astray, and costs accuracy where that is good already.

Evaluations in T steps: T there; T back, 2T with guidance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smooth_rt.schedule import Step, ddim_step
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

__all__ = ["ETA", "METHOD"]

ETA = 0.5
FIRST, LAST = 0.05, 0.25  # of the steps, exclusive


def _invert(job: Job) -> Noise:
    steps = job.schedule.inverse_steps

    def move(latents: Tensor, i: int, step: Step) -> Tensor:
        output = job.pipe.predict(latents, step.timestep, job.prompt_embeds)
        made = ddim_step(latents, output, step.alpha_from, step.alpha_to, job.schedule.prediction_type)
        return ETA * made + (1 - ETA) * latents if FIRST < i / len(steps) < LAST else made

    found: list[Tensor] = []
    final = job.pipe.walk(job.latents, steps, move, job.callback_on_step_end, found)
    return Noise(
        latents=final,
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=job.empty(),
        trajectory=torch.stack(found),
    )


METHOD = Method(_invert, lambda steps, guided: Evaluations(steps, 2 * steps if guided else steps))
