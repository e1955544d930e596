"""The unevenness of whole paths, on networks whose sampling is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smooth_rt.schedule import Schedule
from smooth_rt.tasks.mixing import slerp
from smooth_rt.training.paths import Lengths, draw_path, draw_schedule, guided, measure, sample, unevenness, window

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SHAPE = (3, 4, 4)
POINTS = 11


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(count: int, points: int) -> Tensor:
    """So many paths of one seed, one after the other."""
    paths = [draw_path(points, (4, 8, 8), torch.Generator().manual_seed(seed)) for seed in range(count)]
    return torch.cat(paths)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_sampling_of_a_known_denoiser(steps: int) -> None:
    """Where x0 is predicted as c * x, each DDIM step multiplies by one factor."""
    c = 0.3
    schedule = Schedule.from_config({**CONFIG, "prediction_type": "sample", "timestep_spacing": "trailing"}, steps)
    noise = normal(4, *SHAPE)
    factor = 1.0
    for step in schedule.steps:
        part = (1 - math.sqrt(step.alpha_from) * c) / math.sqrt(1 - step.alpha_from)
        factor *= math.sqrt(step.alpha_to) * c + math.sqrt(1 - step.alpha_to) * part
    predict = guided(lambda x, *_: c * x, torch.empty(0), torch.empty(0), 1.0)
    torch.testing.assert_close(sample(predict, noise, schedule), factor * noise)


def test_its_gradient_agrees_with_finite_differences() -> None:
    schedule = Schedule.from_config({**CONFIG, "timestep_spacing": "trailing"}, 3)
    noise, context = normal(2 * POINTS, *SHAPE), normal(2 * POINTS, 2, 5, seed=1)
    before = Lengths(normal(2, POINTS - 1, seed=2).abs(), normal(2, seed=3).abs())

    def penalty(weight: Tensor) -> Tensor:
        def unet(x: Tensor, _: Tensor, with_context: Tensor) -> Tensor:
            return torch.tanh(weight * x) + with_context.mean(dim=(1, 2)).view(-1, 1, 1, 1)

        found = measure(sample(guided(unet, context, -context, 2.0), noise, schedule), POINTS)
        return unevenness(found, before, 0.8, 4.0)

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(penalty(weight), weight)
    step = 1e-6
    difference = (penalty(weight.detach() + step) - penalty(weight.detach() - step)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-9)


def test_guidance_is_that_of_diffusers() -> None:
    latents, text, empty = normal(2, *SHAPE), normal(2, 2, 5, seed=1), normal(2, 2, 5, seed=2)

    def unet(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return x * context.sum(dim=(1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1)

    times = torch.tensor([7, 8])
    without, with_text = unet(latents, times, empty), unet(latents, times, text)
    found = guided(unet, text, empty, 3.0)(latents, times)
    torch.testing.assert_close(found.output, without + 3 * (with_text - without))
    torch.testing.assert_close(found.conditional, with_text)
    torch.testing.assert_close(guided(unet, text, empty, 1.0)(latents, times).output, with_text)


def test_paths_lead_evenly_between_independent_noises() -> None:
    noises = drawn(3, POINTS)
    assert noises.shape == (3 * POINTS, 4, 8, 8)
    assert noises.std().item() == pytest.approx(1, abs=0.03)
    for path in noises.reshape(3, POINTS, 4, 8, 8):
        for k, point in enumerate(path):
            torch.testing.assert_close(point, slerp(path[0], path[-1], k / (POINTS - 1)), rtol=1e-5, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(path[0].flatten(), path[-1].flatten(), dim=0)
        assert abs(cosine) < 0.3  # 256 numbers: four standard deviations of independence
    assert torch.equal(noises, drawn(3, POINTS))


def test_a_shorter_path_has_the_same_steps() -> None:
    whole, part = (drawn(2, points) for points in (POINTS, 4))
    assert torch.equal(part.reshape(2, 4, -1), whole.reshape(2, POINTS, -1)[:, :4])


@pytest.mark.parametrize("steps", [1, 2, 9, 50])
def test_a_drawn_schedule_leads_from_about_pure_noise_to_none(steps: int) -> None:
    alphas = torch.linspace(0.999, 0.005, 1000)
    schedules = [draw_schedule(alphas, steps, "epsilon", torch.Generator().manual_seed(seed)) for seed in range(20)]
    for schedule in schedules:
        timesteps = [step.timestep for step in schedule.steps]
        assert len(timesteps) == steps
        assert 950 <= timesteps[0] <= 999
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert all(step.alpha_from == float(alphas[step.timestep]) for step in schedule.steps)
        following = [step.alpha_from for step in schedule.steps[1:]]
        assert [step.alpha_to for step in schedule.steps] == [*following, 1.0]
    assert len({schedule.steps for schedule in schedules}) > 10
    assert schedules[0] == draw_schedule(alphas, steps, "epsilon", torch.Generator().manual_seed(0))


def test_lengths_are_those_of_neighbours_and_ends_of_each_path() -> None:
    line = torch.arange(POINTS, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, *SHAPE)
    found = measure(torch.cat([line, 2 * line + 5]), POINTS)
    side = math.sqrt(math.prod(SHAPE))
    torch.testing.assert_close(found.steps, side * torch.tensor([[1.0], [2.0]]).double().expand(2, POINTS - 1))
    torch.testing.assert_close(found.ends, side * torch.tensor([10.0, 20.0]).double())


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_window_and_what_leads_to_it(length: int) -> None:
    schedule = Schedule.from_config({**CONFIG, "timestep_spacing": "trailing"}, 9)
    seen = set()
    for seed in range(60):
        before, within = window(schedule, length, torch.Generator().manual_seed(seed))
        assert len(within.steps) == length
        assert before.steps + within.steps == schedule.steps[: len(before.steps) + length]
        seen.add(len(before.steps))
    assert seen == set(range(9 - length + 1))


def test_even_steps_of_the_share_that_is_asked_cost_nothing() -> None:
    steps = normal(2, POINTS - 1).abs() + 0.1
    before = Lengths(steps, torch.tensor([3.0, 4.0], dtype=torch.float64))
    even = Lengths(0.8 * steps.mean(1, keepdim=True).expand_as(steps), before.ends)
    assert unevenness(even, before, 0.8, 4.0).item() == pytest.approx(0, abs=1e-12)
    # As they were: the mean square of the logarithm of what each is of their mean.
    relative = (steps / steps.mean(1, keepdim=True)).log()
    assert unevenness(before, before, 1.0, 4.0).item() == pytest.approx(relative.square().mean().item())
    # A step of half the length costs as much as one of twice the length.
    half, twice = (Lengths(factor * even.steps, before.ends) for factor in (0.5, 2.0))
    assert unevenness(half, before, 0.8, 4.0).item() == pytest.approx(unevenness(twice, before, 0.8, 4.0).item())
    # Ends that draw together cost what their share of the weight says.
    nearer = Lengths(even.steps, before.ends * torch.tensor([0.5, 1.0]))
    assert unevenness(nearer, before, 0.8, 4.0).item() == pytest.approx(4 * math.log(2) ** 2 / 2)
