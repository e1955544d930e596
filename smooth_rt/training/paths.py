r"""The unevenness of whole paths: what ISTD measures, as a loss. Of this project, not of the paper.

SVR (`svr`, Eq. 9) looks at one timestep, without guidance; ISTD sees what all guided steps together make of a walk
between two noises. Here that walk itself is sampled: without gradients up to some step, and on through a window of a
few more, once with the LoRA, differentiably, and once without. With :math:`d_k` the distance between the latents of
neighbouring points after the window, :math:`e` that of the two ends, and a bar for the model without its LoRA from the
same latents, a path's penalty is

.. math::
    \frac1K \sum_k \log^2 \frac{d_k}{s\,\frac1K\sum_j \bar d_j} + w \log^2 \frac{e}{\bar e}

The first term asks all steps of the path to be of one length, `share` s of what they were on average; the second keeps
the images of far noises as different as they were, without which all would draw together. Logarithms weigh a step that
stalls as one that jumps, and bound what a single jump can do to the gradient. First-order gradients suffice.

The window is for the gradient's sake: through all steps under guidance it is chaotic, and training gets worse with it.
As all before the window is sampled with the LoRA as it stands, each window mends what the earlier ones have left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from smooth_rt.schedule import PredictionType, Schedule, Step, ddim_step
from smooth_rt.tasks.mixing import slerp

__all__ = ["Guided", "Lengths", "draw_path", "draw_schedule", "guided", "measure", "sample", "unevenness", "window"]

APART = 0.1  # of the way between two independent noises, as neighbours are in ISTD
# Timesteps lie closer where there is more noise, since objects and places are decided there. On the default model the
# latents of ten steps spaced so end 0.19 from those of fifty even ones, relative to their norm; of ten even ones, 0.25.
DENSER = 1.3
FIRST = 0.96  # of the training timesteps: samplers begin between there and pure noise


class Guided(NamedTuple):
    """What the network predicts under guidance, and with the text alone; [B, C, H, W] each."""

    output: Tensor
    conditional: Tensor


class Lengths(NamedTuple):
    """Distances on paths: between neighbours [paths, points - 1], and between the ends [paths]."""

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


def sample(predict: Predict, latents: Tensor, schedule: Schedule) -> Tensor:
    """The latents [B, C, H, W] that DDIM reaches from others; differentiable."""
    for step in schedule.steps:
        output = predict(latents, torch.full((len(latents),), step.timestep, device=latents.device)).output
        latents = ddim_step(latents, output, step.alpha_from, step.alpha_to, schedule.prediction_type)
    return latents


def draw_schedule(
    alphas_cumprod: Tensor, steps: int, prediction_type: PredictionType, generator: Generator
) -> Schedule:
    """So many steps from about pure noise, at timesteps that differ from draw to draw: a sampler of other timesteps
    sees little of what a LoRA has learned at a few."""
    last = len(alphas_cumprod) - 1
    moved = torch.rand(steps, generator=generator, dtype=torch.float32)
    place = (torch.arange(steps) + (moved - 0.5) / 2) / steps
    place[0] = 0
    start = last * (1 - (1 - FIRST) * moved[0])
    timesteps = (start * (1 - place**DENSER)).round().int().tolist()
    levels = [*(float(alphas_cumprod[t]) for t in timesteps), 1.0]
    walk = tuple(Step(t, *pair) for t, pair in zip(timesteps, itertools.pairwise(levels), strict=True))
    return Schedule(walk, prediction_type)


def draw_path(points: int, shape: Sequence[int], generator: Generator) -> Tensor:
    """Noises [points, *shape]: a walk from one towards an independent one, APART a step, all the way where there are
    11 points."""
    start, end = torch.randn((2, *shape), generator=generator, dtype=torch.float32)
    return torch.stack([slerp(start, end, k * APART) for k in range(points)])


def window(schedule: Schedule, length: int, generator: Generator) -> tuple[Schedule, Schedule]:
    """So many neighbouring steps of a schedule, drawn at random, and before them those that lead there."""
    first = int(torch.randint(len(schedule.steps) - length + 1, (), generator=generator))
    parts = schedule.steps[:first], schedule.steps[first : first + length]
    before, within = (Schedule(steps, schedule.prediction_type) for steps in parts)
    return before, within


def measure(latents: Tensor, points: int) -> Lengths:
    """The distances of latents [paths * points, C, H, W] that the noises of paths led to."""
    paths = latents.reshape(-1, points, latents[0].numel())
    return Lengths(
        torch.linalg.vector_norm(paths[:, 1:] - paths[:, :-1], dim=2),
        torch.linalg.vector_norm(paths[:, 0] - paths[:, -1], dim=1),
    )


def unevenness(found: Lengths, without_lora: Lengths, share: float, end_weight: float) -> Tensor:
    """The mean penalty of paths, beside the same paths on the model without its LoRA."""
    wanted = share * without_lora.steps.mean(dim=1, keepdim=True)
    uneven = (found.steps / wanted).log().square().mean()
    return uneven + end_weight * (found.ends / without_lora.ends).log().square().mean()
