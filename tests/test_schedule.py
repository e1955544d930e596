"""The schedule and the DDIM step against diffusers' own DDIMScheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from smooth_rt.errors import InputError
from smooth_rt.schedule import Schedule, add_noise, ddim_step

BASE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"steps_offset": 1, "set_alpha_to_one": False},
    "alpha one": {"set_alpha_to_one": True, "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "v": {"prediction_type": "v_prediction", "steps_offset": 1, "set_alpha_to_one": False},
    "sample": {"prediction_type": "sample", "steps_offset": 1},
}


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_is_that_of_diffusers(name: str, steps: int) -> None:
    config = {**BASE, **CONFIGS[name]}
    reference = DDIMScheduler.from_config(config)
    reference.set_timesteps(steps)
    schedule = Schedule.from_config(config, steps)
    assert list(schedule.timesteps) == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 3, 4, 4, generator=generator)
    for step in schedule.steps:
        output = torch.randn(ours.shape, generator=generator)
        ours = ddim_step(ours, output, step.alpha_from, step.alpha_to, schedule.prediction_type)
        theirs = reference.step(output, step.timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_configuration_of_another_scheduler_is_read() -> None:
    pndm = {
        **BASE,
        "_class_name": "PNDMScheduler",
        "skip_prk_steps": True,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    expected = Schedule.from_config({**BASE, "steps_offset": 1, "set_alpha_to_one": False}, 10)
    assert Schedule.from_config(pndm, 10) == expected


def test_inverse_steps_lead_back() -> None:
    schedule = Schedule.from_config({**BASE, **CONFIGS["sd1"]}, 10)
    assert [s.timestep for s in schedule.inverse_steps] == sorted(schedule.timesteps)
    levels = [s.alpha_from for s in schedule.inverse_steps]
    assert levels == sorted(levels, reverse=True)
    x = start = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = {t: torch.full_like(x, t / 1000) for t in schedule.timesteps}
    for step in (*schedule.steps, *schedule.inverse_steps):
        x = ddim_step(x, noise[step.timestep], step.alpha_from, step.alpha_to, "epsilon")
    torch.testing.assert_close(x, start, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_three_predictions_of_one_noise_agree(prediction_type: str) -> None:
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = 0.3, 0.7
    output = {"epsilon": eps, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x0, "sample": x0}[prediction_type]
    moved = ddim_step(add_noise(x0, eps, a), output, a, b, prediction_type)  # type: ignore[arg-type]
    torch.testing.assert_close(moved, add_noise(x0, eps, b))


def test_add_noise_is_that_of_diffusers() -> None:
    reference = DDIMScheduler.from_config(BASE)
    x0, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    theirs = reference.add_noise(x0, eps, torch.tensor([400]))
    torch.testing.assert_close(add_noise(x0, eps, float(reference.alphas_cumprod[400])), theirs)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "10"])
def test_a_wrong_number_of_steps(steps: Any) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps=.*whole number from 1 to 1000"):
        Schedule.from_config({**BASE, "timestep_spacing": "trailing"}, steps)


def test_an_offset_that_leads_beyond_the_last_timestep() -> None:
    with pytest.raises(InputError, match=r"num_inference_steps=1000: give a whole number from 1 to 999"):
        Schedule.from_config(BASE, 1000)
    assert Schedule.from_config(BASE, 999).timesteps[0] == 999
    for spacing in ("trailing", "linspace"):
        assert Schedule.from_config({**BASE, "timestep_spacing": spacing}, 1000).timesteps[0] == 999


def test_where_the_output_says_nothing() -> None:
    x = torch.zeros(1)
    with pytest.raises(InputError, match="zero SNR"):
        ddim_step(x, x, 0.0, 0.5, "epsilon")
    with pytest.raises(InputError, match="set_alpha_to_one"):
        ddim_step(x, x, 1.0, 0.5, "sample")
