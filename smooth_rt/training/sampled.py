r"""The variation of a whole sampling: how far apart neighbouring noises end. Of this project, not of the paper.

SVR (`svr`, Eq. 9) looks at one timestep, without guidance; ISTD sees what all guided steps together make of a small
change of the noise. Here `n` is that very thing, over a short sampling that training can differentiate:

.. math::
    n = \lVert x_0(z_1) - x_0(z_2) \rVert_2, \qquad
    z_i = \mathrm{slerp}(\varepsilon_a, \varepsilon_b, \eta_i)

with :math:`x_0(z)` the latent that a few guided DDIM steps reach from z. Near pairs are `NEAR` apart on the path, as
the neighbours of ISTD are; far pairs are its two ends, independent noises. Each kind is compared with its own mean,
measured on the model without its LoRA and then kept: near pairs are asked for a `share` of it, far pairs for all of it.
So steps grow even and shorter while the images stay as different as they were. First-order gradients suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smooth_rt.schedule import Schedule, ddim_step

__all__ = ["FAR", "FAR_WEIGHT", "KINDS", "NEAR", "draw_pairs", "guided", "pair_distances", "sample", "slerp_each"]

NEAR = 0.1  # of the way between two noises, as in ISTD
FAR = 0.4  # share of far pairs
FAR_WEIGHT = 6.0  # of a far pair in the penalty: at 1, the ends draw together with the steps
KINDS = torch.tensor([0, 1])  # bins of the target: near, far

Predict = Callable[[Tensor, int], Tensor]


def sample(predict: Predict, noise: Tensor, schedule: Schedule) -> Tensor:
    """The latents [B, C, H, W] that DDIM reaches from `noise`, differentiable; `predict(latents, timestep)` is the
    network's output."""
    latents = noise
    for step in schedule.steps:
        output = predict(latents, step.timestep)
        latents = ddim_step(latents, output, step.alpha_from, step.alpha_to, schedule.prediction_type)
    return latents


def guided(unet: Callable[..., Tensor], with_text: Tensor, without: Tensor, guidance_scale: float) -> Predict:
    """Classifier-free guidance, diffusers' scale, over embeddings [B, L, D] with and without text."""
    context = with_text if guidance_scale == 1 else torch.cat([without, with_text])

    def predict(latents: Tensor, timestep: int) -> Tensor:
        rows = latents if guidance_scale == 1 else latents.repeat(2, 1, 1, 1)
        output = unet(rows, torch.full((len(rows),), timestep), context)
        if guidance_scale == 1:
            return output
        base, text = output.chunk(2)
        return base + guidance_scale * (text - base)

    return predict


def slerp_each(start: Tensor, end: Tensor, place: Tensor) -> Tensor:
    """Spherical interpolation of each sample [B, C, H, W] at its own place [B] in 0..1; independent noises are never
    parallel, so there is no line to fall back on."""
    cosine = torch.nn.functional.cosine_similarity(start.flatten(1).double(), end.flatten(1).double())
    angle = torch.arccos(cosine).view(-1, 1, 1, 1)
    place = place.double().view(-1, 1, 1, 1)
    mixed = (torch.sin((1 - place) * angle) * start + torch.sin(place * angle) * end) / torch.sin(angle)
    return mixed.to(start.dtype)


def draw_pairs(count: int, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of noises on paths between independent ones.

    Returns:
        Noises [2 count, *shape], of which rows i and count + i are a pair, and the index [count] of each pair's kind
        in `KINDS`.
    """
    start, end = torch.randn((2, count, *shape), generator=generator)
    far = torch.rand(count, generator=generator) < FAR
    gap = torch.where(far, 1.0, NEAR)
    place = torch.rand(count, generator=generator) * (1 - gap)
    return torch.cat([slerp_each(start, end, place), slerp_each(start, end, place + gap)]), far.long()


def pair_distances(latents: Tensor) -> Tensor:
    """n [B] of latents [2 B, C, H, W] that pairs of noises led to."""
    first, second = latents.chunk(2)
    distances: Tensor = torch.linalg.vector_norm((first - second).flatten(1), dim=1)
    return distances
