"""SPDInv, source prompt disentangled inversion: Li et al. 2024, arXiv 2403.11105, with the authors' settings.

Each step of inversion looks for the fixed point x_i = f(x_i) = A * x_{i-1} + B * eps(x_i, t_i) that sampling would
meet (`fixed_point` iterates it), by the gradient of

    | f(x_i) - x_i |^2 / (C h w)

with respect to the latent, by Adam at a rate of 0.001, from DDIM inversion's step on, for at most 25 rounds or until
the loss is below 5e-6. The gradient is 2 (B J^T r - r) / (C h w) with r = f(x_i) - x_i, and r is linear in eps: a
round is one call of `SmoothPipeline.vjp`. The authors' optimiser also shrinks the latent a little (weight decay),
which Adam here does not, and takes one more step after the last look at the loss. As in their code the source prompt
takes the empty one's place when sampling, so every guidance rebuilds the image.

Images are fitted together, and one that is done leaves the batch.

Evaluations in T steps: T there and at most 25T gradients; T back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smooth_rt.errors import EngineError
from smooth_rt.schedule import Step, ddim_coefficients
from smooth_rt.tasks.inversion.adam import Adam
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

__all__ = ["METHOD", "ROUNDS"]

ROUNDS = 25
RATE = 1e-3
THRESHOLD = 5e-6


def _invert(job: Job) -> Noise:
    steps = job.schedule.steps
    size = job.latents[0].numel()

    def move(lower: Tensor, i: int, inverse: Step) -> Tensor:
        step = steps[len(steps) - 1 - i]
        forwards = ddim_coefficients(step.alpha_from, step.alpha_to, job.schedule.prediction_type)
        keep, slope = 1 / forwards[0], -forwards[1] / forwards[0]  # A and B
        output = job.pipe.predict(lower, inverse.timestep, job.prompt_embeds)
        adam = Adam(keep * lower + slope * output, RATE)
        active = torch.ones(len(lower), dtype=torch.bool)
        for _ in range(ROUNDS):
            rows = active.nonzero()[:, 0]
            rest = keep * lower[rows] - adam.values[rows]
            output, grads = job.pipe.vjp(
                adam.values[rows],
                inverse.timestep,
                job.prompt_embeds[rows],
                ("sample",),
                2 * slope / size * rest,
                torch.full((len(rows),), 2 * slope**2 / size),
            )
            residual = slope * output + rest
            loss = residual.square().flatten(1).mean(1)
            if not bool(torch.isfinite(loss).all()):
                wrong = int(rows[int((~loss.isfinite()).nonzero()[0])]) + 1
                raise EngineError(
                    f"spdinv: step {i + 1} of {len(steps)} (timestep {inverse.timestep}): the loss of image {wrong} is "
                    f"not finite on {job.pipe.engine}; check the model's weights"
                )
            active = active.index_copy(0, rows, loss >= THRESHOLD)
            if not active.any():
                break
            adam.step(torch.zeros_like(lower).index_copy(0, rows, grads["sample"] - 2 / size * residual), active)
        return adam.values

    found: list[Tensor] = []
    final = job.pipe.walk(job.latents, job.schedule.inverse_steps, move, job.callback_on_step_end, found)
    return Noise(
        latents=final,
        prompt_embeds=job.prompt_embeds,
        negative_prompt_embeds=job.prompt_embeds,
        trajectory=torch.stack(found),
    )


METHOD = Method(
    _invert, lambda steps, _: Evaluations(steps, steps, ROUNDS * steps), guidance_scale=7.5, wrt=("sample",)
)
