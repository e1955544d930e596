"""Scheduler configurations as models bring them, read as diffusers' own StableDiffusionPipeline reads them."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from engines.contract import NETWORKS, contract
from engines.eager import EagerEngine, torch_networks
from smooth_rt.checkpoint import quiet
from smooth_rt.errors import InputError, ModelError
from smooth_rt.model import Model, load_model, read_config
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.schedule import Schedule
from smooth_rt.scheduler_config import corrected_config, finite_config, read_scheduler
from smooth_rt.training.objective import Objective
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.world import World

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def written(name: str, **options: Any) -> dict[str, Any]:
    """The scheduler_config.json that the installed diffusers writes for one of its schedulers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of how some of them convert tensors
        scheduler = getattr(diffusers, name)(**{**BETAS, **options})
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return config


# Those that are spelled out are files of models on the hub: diffusers of their time left out what it did not know.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1.1, diffusers 0.2": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.2.2", **BETAS, "num_train_timesteps": 1000,
        "skip_prk_steps": True, "tensor_format": "pt", "timestep_values": None, "trained_betas": None,
    },
    "sd1.4": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", **BETAS, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    },
    "sd1.5 with offset 0": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 0, "trained_betas": None,
    },
    "sd2.1": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **BETAS, "clip_sample": False,
        "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "k-lms, diffusers 0.4": {"_class_name": "LMSDiscreteScheduler", **BETAS, "num_train_timesteps": 1000},
    "ddim that clips": written("DDIMScheduler"),
    "ddim": written("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim with offset 10": written("DDIMScheduler", clip_sample=False, steps_offset=10),
    "ddim, zero snr": written(
        "DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "ddim, linspace": written("DDIMScheduler", timestep_spacing="linspace", set_alpha_to_one=False),
    "ddim, 500 timesteps": written("DDIMScheduler", num_train_timesteps=500),
    "ddim, sample": written("DDIMScheduler", prediction_type="sample"),
    "ddpm": written("DDPMScheduler"),
    "ddpm, linear": written("DDPMScheduler", beta_schedule="linear", variance_type="fixed_large"),
    "ddpm, cosine": written("DDPMScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=False),
    "pndm": written("PNDMScheduler", skip_prk_steps=True, steps_offset=1),
    "lms": written("LMSDiscreteScheduler", use_karras_sigmas=True),
    "euler": written("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
    "euler, trailing": written("EulerDiscreteScheduler", timestep_spacing="trailing", final_sigmas_type="sigma_min"),
    "euler, karras": written("EulerDiscreteScheduler", use_karras_sigmas=True, prediction_type="v_prediction"),
    "euler ancestral": written("EulerAncestralDiscreteScheduler", steps_offset=1),
    "euler ancestral, zero snr": written(
        "EulerAncestralDiscreteScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
    "heun": written("HeunDiscreteScheduler", clip_sample=True),
    "kdpm2": written("KDPM2DiscreteScheduler"),
    "kdpm2 ancestral": written("KDPM2AncestralDiscreteScheduler"),
    "dpm++ 2m": written("DPMSolverMultistepScheduler", use_karras_sigmas=True),
    "dpm++ 2m sde": written("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", steps_offset=1),
    "dpm++ single step": written("DPMSolverSinglestepScheduler", final_sigmas_type="zero"),
    "dpm++ sde": {"_class_name": "DPMSolverSDEScheduler", **BETAS, "noise_sampler_seed": None, "steps_offset": 0},
    "unipc": written("UniPCMultistepScheduler", disable_corrector=[0], timestep_spacing="trailing"),
    "deis": written("DEISMultistepScheduler"),
    "lcm": written("LCMScheduler", original_inference_steps=50),
    "tcd": written("TCDScheduler"),
    "trained betas": written("DDIMScheduler", trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()),
    "more trained betas than timesteps": {"trained_betas": [0.01] * 1001, "num_train_timesteps": 1000},
    "no class": {**BETAS, "set_alpha_to_one": False},
    "nothing": {},
    "a class of the future": {**BETAS, "_class_name": "BestScheduler", "more": [1, {"a": None}], "steps_offset": 7},
    "a class of one's own": {**BETAS, "_class_name": ["own_scheduler", "OwnScheduler"]},
    "nulls": {**BETAS, "clip_sample": None, "steps_offset": None, "set_alpha_to_one": None, "thresholding": None},
}  # fmt: skip
COUNTS = (1, 3, 7, 20, 25, 30, 50, 100, 450)


def reference(config: dict[str, Any], model: Model | None = None) -> Any:
    """diffusers' pipeline with DDIM of a configuration."""
    names = ("vae", "text_encoder", "tokenizer", "unet")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of each value that it corrects
        pipe = diffusers.StableDiffusionPipeline(
            **{name: None if model is None else getattr(model, name) for name in names},
            scheduler=diffusers.DDIMScheduler.from_config(dict(config)),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(tiny_model)


def pipeline(model: Model, config: dict[str, Any]) -> SmoothPipeline:
    """The pipeline of `model` with another scheduler's configuration."""
    modules = torch_networks(model.text_encoder, model.unet, model.vae)
    engines = {name: EagerEngine(contract(name, model.dims), modules[name]) for name in NETWORKS}
    return SmoothPipeline(engines, replace(model.config(), scheduler_config=config), model.dims)


@pytest.mark.parametrize("name", CONFIGS)
def test_read_scheduler_equals_the_one_of_diffusers_pipeline(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    ours = read_scheduler(CONFIGS[name])
    assert capfd.readouterr() == ("", "")
    theirs = reference(CONFIGS[name]).scheduler
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert float(ours.final_alpha_cumprod) == float(theirs.final_alpha_cumprod)
    known = ("prediction_type", "timestep_spacing", "num_train_timesteps", "steps_offset")
    assert {key: ours.config[key] for key in known} == {key: theirs.config[key] for key in known}
    assert not ours.config["clip_sample"]
    assert not theirs.config["clip_sample"]
    for count in COUNTS:
        theirs.set_timesteps(count)
        schedule = Schedule.from_config(CONFIGS[name], count)
        assert list(schedule.timesteps) == theirs.timesteps.tolist()
        assert schedule.prediction_type == theirs.config["prediction_type"]


@pytest.mark.parametrize("name", CONFIGS)
def test_pipeline_samples_what_diffusers_pipeline_samples(model: Model, name: str) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = reference(CONFIGS[name], model)("red apple", height=16, width=16, latents=latents.clone(), **options)
    ours = pipeline(model, CONFIGS[name])("red apple", latents=latents, **options)
    torch.testing.assert_close(torch.as_tensor(ours.images), theirs.images, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_folder_and_bundle_config_keep_the_schedule(model: Model, tiny_model: Path, tmp_path: Path, name: str) -> None:
    expected = Schedule.from_config(CONFIGS[name], 20)
    loaded = replace(model, scheduler_config=CONFIGS[name])
    loaded.write_config(tmp_path / "bundle")
    kept = read_config(tmp_path / "bundle")
    assert Schedule.from_scheduler(kept.scheduler(), 20) == expected
    # Others read the corrected configuration, which is JSON without infinite values.
    text = json.dumps(finite_config(kept.sampling_config), allow_nan=False)
    assert Schedule.from_config(json.loads(text), 20) == expected


def test_load_model_with_an_infinite_value_succeeds(model: Model, tmp_path: Path) -> None:
    config = CONFIGS["dpm++ 2m"]
    assert config["lambda_min_clipped"] == -math.inf
    replace(model, scheduler_config=config).save(tmp_path / "saved")
    found = load_model(tmp_path / "saved")
    assert found.config().scheduler().config["timestep_spacing"] == "linspace"
    assert found.digests["scheduler"] != model.digests["scheduler"]


def test_corrected_config_drops_values_listed_as_defaults() -> None:
    """A scheduler's `config` in memory states defaults too, and lists them; diffusers ignores those."""
    config = dict(diffusers.PNDMScheduler(**BETAS).config)
    assert "set_alpha_to_one" in config["_use_default_values"]
    corrected = corrected_config(config)
    assert "set_alpha_to_one" not in corrected
    assert (corrected["clip_sample"], corrected["steps_offset"]) == (False, 1)
    theirs = reference(config).scheduler
    assert float(read_scheduler(config).final_alpha_cumprod) == float(theirs.final_alpha_cumprod) == 1.0
    clips = dict(diffusers.DDIMScheduler(**BETAS).config)
    assert clips["clip_sample"]
    assert not read_scheduler(clips).config["clip_sample"]


def test_training_reads_the_same_scheduler(model: Model) -> None:
    config = CONFIGS["ddim, zero snr"]
    objective = Objective(replace(model, scheduler_config=config), SmoothLoraConfig(), World())
    assert torch.equal(objective.alphas, reference(config).scheduler.alphas_cumprod)
    assert objective.prediction_type == "v_prediction"


def test_pipeline_with_a_changed_scheduler_config_follows_it(model: Model) -> None:
    pipe = pipeline(model, dict(BETAS))
    pipe.scheduler_config |= {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    assert pipe.schedule(4).timesteps == (999, 749, 499, 249)
    assert pipe.prediction_type == pipe.schedule(4).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"clip_sample": 1}, "clip_sample is 1, which is for models of pixels; set it to false"),
        ({"thresholding": True}, "thresholding is True, which is for models of pixels; set it to false"),
        ({"prediction_type": "flow"}, "unknown prediction_type 'flow'; it is one of epsilon, v_prediction, sample"),
        ({"prediction_type": None}, "unknown prediction_type None"),
        ({"prediction_type": ["epsilon"]}, "unknown prediction_type"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', which diffusers' DDIMScheduler does not have"),
        ({"beta_schedule": None}, "beta_schedule is None"),
        ({"beta_start": "x"}, "give values that diffusers' DDIMScheduler accepts"),
        ({"beta_start": -0.1}, "give values that diffusers' DDIMScheduler accepts"),
        ({"beta_start": math.nan}, "beta is nan and alpha-bar nan at timestep 0; give beta_start, beta_end or"),
        ({"beta_end": 1.5, "beta_schedule": "linear"}, "beta is 1.00028 and alpha-bar -0 at timestep 666"),
        ({"beta_start": 0, "beta_end": 0, "rescale_betas_zero_snr": True}, "beta is nan and alpha-bar nan"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has shape [2]; give one number for each of the 1000 training"),
        ({"trained_betas": [[0.1] * 1000]}, "trained_betas has shape [1, 1000]; give one number"),
        ({"trained_betas": []}, "trained_betas has shape [0]; give one number"),
        ({"trained_betas": ["a"] * 1000}, "give values that diffusers' DDIMScheduler accepts"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; give the number of training steps, from 2 to 100000"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000; give the number"),
        ({"_use_default_values": 5}, "_use_default_values is 5; give a list, or leave it out"),
        ({"num_train_timesteps": -5}, "num_train_timesteps is -5"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0"),
        ({"num_train_timesteps": None}, "num_train_timesteps is None"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; give leading, trailing or linspace"),
        ({"timestep_spacing": None}, "timestep_spacing is None; give leading"),
        ({"_class_name": 3}, "give values that diffusers' DDIMScheduler accepts"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "_class_name is FlowMatchEulerDiscrete"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "_class_name is EDMEulerScheduler, which is not of"),
        (written("UniPCMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas is True, which is not of discrete"),
        (written("EulerDiscreteScheduler", timestep_type="continuous"), "timestep_type is 'continuous'"),
        (written("CogVideoXDDIMScheduler", snr_shift_scale=3.0), "snr_shift_scale is 3.0"),
    ],
)  # fmt: skip
def test_config_that_ddim_cannot_follow_is_refused(model: Model, config: dict[str, Any], said: str) -> None:
    for read in (read_scheduler, lambda config: pipeline(model, config)):
        with pytest.raises(ModelError) as caught:
            read({**BETAS, **config})
        assert str(caught.value).startswith("scheduler_config: ")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_noise_prediction_from_zero_snr_is_refused() -> None:
    config = {**BETAS, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ModelError, match=r"^scheduler_config: sampling starts at timestep 999, which has zero SNR"):
        Schedule.from_config(config, 10)
    assert Schedule.from_config({**config, "timestep_spacing": "leading"}, 10).timesteps[0] == 901
    assert Schedule.from_config({**config, "prediction_type": "v_prediction"}, 10).steps[0].alpha_from == 0


def test_steps_that_diffusers_rounds_below_zero_are_refused() -> None:
    config = {**BETAS, "timestep_spacing": "trailing"}
    theirs = reference(config).scheduler
    theirs.set_timesteps(61)
    assert theirs.timesteps.tolist()[-2:] == [15, -1]
    with pytest.raises(InputError, match=r"^num_inference_steps=61: diffusers' trailing timesteps end at -1.* as 60$"):
        Schedule.from_config(config, 61)
    assert min(Schedule.from_config(config, 60).timesteps) == 16
