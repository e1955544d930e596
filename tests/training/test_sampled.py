"""The variation of whole samplings, on networks whose sampling is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smooth_rt.schedule import Schedule
from smooth_rt.tasks.interpolate import slerp
from smooth_rt.training.sampled import FAR, draw_pairs, guided, pair_distances, sample, slerp_each

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SHAPE = (3, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_sampling_of_a_known_denoiser(steps: int) -> None:
    """Where x0 is predicted as c * x, each DDIM step multiplies by one factor, so the distance of a pair does too."""
    c = 0.3
    schedule = Schedule.from_config({**CONFIG, "prediction_type": "sample", "timestep_spacing": "trailing"}, steps)
    pairs = normal(4, *SHAPE)
    found = pair_distances(sample(lambda x, _: c * x, pairs, schedule))
    factor = 1.0
    for step in schedule.steps:
        noise = (1 - math.sqrt(step.alpha_from) * c) / math.sqrt(1 - step.alpha_from)
        factor *= math.sqrt(step.alpha_to) * c + math.sqrt(1 - step.alpha_to) * noise
    torch.testing.assert_close(found, abs(factor) * (pairs[:2] - pairs[2:]).flatten(1).norm(dim=1))


def test_its_gradient_agrees_with_finite_differences() -> None:
    schedule = Schedule.from_config({**CONFIG, "timestep_spacing": "trailing"}, 3)
    pairs, context = normal(4, *SHAPE), normal(4, 2, 5, seed=1)

    def distances(weight: Tensor) -> Tensor:
        def unet(x: Tensor, _: Tensor, with_context: Tensor) -> Tensor:
            return torch.tanh(weight * x) + with_context.mean(dim=(1, 2)).view(-1, 1, 1, 1)

        return pair_distances(sample(guided(unet, context, -context, 2.0), pairs, schedule)).sum()

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distances(weight), weight)
    step = 1e-6
    difference = (distances(weight.detach() + step) - distances(weight.detach() - step)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-7, atol=1e-9)


def test_guidance_is_that_of_diffusers() -> None:
    latents, text, empty = normal(2, *SHAPE), normal(2, 2, 5, seed=1), normal(2, 2, 5, seed=2)

    def unet(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return x * context.sum(dim=(1, 2)).view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1)

    times = torch.full((2,), 7)
    without, with_text = unet(latents, times, empty), unet(latents, times, text)
    torch.testing.assert_close(guided(unet, text, empty, 3.0)(latents, 7), without + 3 * (with_text - without))
    torch.testing.assert_close(guided(unet, text, empty, 1.0)(latents, 7), with_text)


def test_each_sample_is_interpolated_at_its_own_place() -> None:
    start, end = normal(3, *SHAPE).float(), normal(3, *SHAPE, seed=1).float()
    places = torch.tensor([0.0, 0.35, 1.0])
    wanted = torch.stack([slerp(a, b, float(t)) for a, b, t in zip(start, end, places, strict=True)])
    torch.testing.assert_close(slerp_each(start, end, places), wanted, rtol=1e-5, atol=1e-5)


def test_near_pairs_are_neighbours_and_far_ones_independent() -> None:
    count = 400
    noises, kinds = draw_pairs(count, (4, 8, 8), torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(noises[:count].flatten(1), noises[count:].flatten(1))
    assert abs(kinds.float().mean() - FAR) < 0.08
    assert cosine[kinds == 1].abs().max() < 0.3
    # A tenth of a right angle apart, give or take what 256 numbers leave of independence.
    assert (cosine[kinds == 0] - math.cos(0.1 * math.pi / 2)).abs().max() < 0.01
    again, _ = draw_pairs(count, (4, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(noises, again)
    assert noises.std().item() == pytest.approx(1, abs=0.02)
