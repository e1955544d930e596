r"""The unevenness of whole paths: what ISTD measures, as a loss. Of this project, not of the paper.

SVR (`svr`, Eq. 9) looks at one timestep, without guidance; ISTD sees what all guided steps together make of a walk
between two noises. Here that walk itself is sampled, in a few steps that training can differentiate, once with the LoRA
and once, on the same noises, without. With :math:`d_k` the distance between the latents of neighbouring points,
:math:`e` that of the two ends, and a bar for the model without its LoRA, a path's penalty is

.. math::
    \frac1K \sum_k \Bigl(\frac{d_k}{s\,\frac1K\sum_j \bar d_j} - 1\Bigr)^2 + w \Bigl(\frac{e}{\bar e} - 1\Bigr)^2

The first term asks all steps of the path to be of one length, `share` s of what they were on average; the second keeps
the images of independent noises as different as they were, without which all would draw together. First-order gradients
suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smooth_rt.schedule import Schedule, ddim_step
from smooth_rt.tasks.interpolate import slerp

__all__ = ["POINTS", "Guided", "Lengths", "draw_paths", "guided", "measure", "sample", "unevenness"]

POINTS = 11  # of a path, as in ISTD


class Guided(NamedTuple):
    """What the network predicts under guidance, and with the text alone; [B, C, H, W] each."""

    output: Tensor
    conditional: Tensor


class Lengths(NamedTuple):
    """Distances on paths: between neighbours [paths, POINTS - 1], and between the ends [paths]."""

    steps: Tensor
    ends: Tensor


Predict = Callable[[Tensor, Tensor], Guided]


def guided(unet: Callable[..., Tensor], with_text: Tensor, without: Tensor, guidance_scale: float) -> Predict:
    """Classifier-free guidance, diffusers' scale, over embeddings [B, L, D] with and without text; the prediction takes
    noisy latents [B, C, H, W] and timesteps [B]."""

    def predict(latents: Tensor, timesteps: Tensor) -> Guided:
        if guidance_scale == 1:
            output = unet(latents, timesteps, with_text)
            return Guided(output, output)
        both = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([without, with_text]))
        base, conditional = both.chunk(2)
        return Guided(base + guidance_scale * (conditional - base), conditional)

    return predict


def sample(predict: Predict, noise: Tensor, schedule: Schedule) -> Tensor:
    """The latents [B, C, H, W] that DDIM reaches from `noise`; differentiable."""
    latents = noise
    for step in schedule.steps:
        output = predict(latents, torch.full((len(latents),), step.timestep)).output
        latents = ddim_step(latents, output, step.alpha_from, step.alpha_to, schedule.prediction_type)
    return latents


def draw_paths(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noises [count * POINTS, *shape], path by path, each evenly spread between two independent ones."""
    ends = torch.randn((count, 2, *shape), generator=generator)
    return torch.stack([slerp(start, end, k / (POINTS - 1)) for start, end in ends for k in range(POINTS)])


def measure(latents: Tensor) -> Lengths:
    """The distances of latents [paths * POINTS, C, H, W] that `draw_paths` led to."""
    paths = latents.reshape(-1, POINTS, latents[0].numel())
    return Lengths(
        torch.linalg.vector_norm(paths[:, 1:] - paths[:, :-1], dim=2),
        torch.linalg.vector_norm(paths[:, 0] - paths[:, -1], dim=1),
    )


def unevenness(found: Lengths, without_lora: Lengths, share: float, end_weight: float) -> Tensor:
    """The mean penalty of paths, beside the same paths on the model without its LoRA."""
    wanted = share * without_lora.steps.mean(dim=1, keepdim=True)
    uneven = (found.steps / wanted - 1).square().mean()
    return uneven + end_weight * (found.ends / without_lora.ends - 1).square().mean()
