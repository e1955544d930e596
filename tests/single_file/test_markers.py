"""Statements of a checkpoint on its prediction and its noise schedule, and the schedule that they lead to."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt import architecture, single_file
from smooth_rt.errors import ModelError
from smooth_rt.markers import Markers, read_markers
from smooth_rt.model import load_model
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.weight_header import read_header

V = Markers("v_prediction", zero_snr=False)
V_ZERO = Markers("v_prediction", zero_snr=True)
EPSILON = Markers("epsilon", zero_snr=False)
SILENT = Markers(None, zero_snr=False)
EMPTY = torch.zeros(0)
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def alphas(zero_snr: bool) -> Tensor:
    table: Tensor = DDIMScheduler(**BETAS, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    return table


def markers(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Markers:
    save_file({"weight": torch.zeros(1), **tensors}, path, metadata)
    return read_markers(path, read_header(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ({}, {}, SILENT),
        ({"v_pred": EMPTY}, {}, V),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, V_ZERO),
        ({"ztsnr": EMPTY}, {}, V_ZERO),
        ({"ztsnr": EMPTY}, {"modelspec.prediction_type": "v"}, V_ZERO),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, {"modelspec.prediction_type": "epsilon"}, V_ZERO),
        ({}, {"modelspec.predict_key": "v"}, V),
        ({}, {"modelspec.predict_key": "epsilon"}, EPSILON),
        ({}, {"modelspec.prediction_type": "epsilon", "modelspec.predict_key": "v"}, EPSILON),
        ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, V_ZERO),
        ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "False"}, V),
        ({}, {"ss_v_parameterization": "False"}, EPSILON),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, V),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-512"}, EPSILON),
        ({}, {"modelspec.architecture": "stable-diffusion-v2"}, SILENT),
        ({}, {"modelspec.resolution": "768x768", "modelspec.usage_hint": "use v"}, SILENT),
        ({"alphas_cumprod": alphas(zero_snr=False)}, {}, SILENT),
        ({"alphas_cumprod": alphas(zero_snr=False).half()}, {}, SILENT),
        ({"alphas_cumprod": alphas(zero_snr=True)}, {}, V_ZERO),
        ({"alphas_cumprod": alphas(zero_snr=True).clamp(min=4.8973e-08)}, {}, V_ZERO),
        ({"alphas_cumprod": torch.zeros(1000)}, {}, SILENT),
        ({"alphas_cumprod": torch.zeros(())}, {}, SILENT),
    ],
)
def test_read_markers_of_a_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], expected: Markers
) -> None:
    assert markers(path, tensors, metadata) == expected


SGM = "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.denoiser.VScaling}}}}}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  params:\n    parameterization: v\n    use_ema: true\n", V),
        ("model: {params: {parameterization: eps}}", EPSILON),
        ("model: {params: {parameterization: 'v '}}", V),
        ("model: {params: {linear_start: 0.00085}}", SILENT),
        (SGM, V),
        ("- a list", SILENT),
        ("", SILENT),
        ("model: [1]", SILENT),
    ],
)
def test_read_markers_of_the_original_config(path: Path, text: str, expected: Markers) -> None:
    path.with_suffix(".yaml").write_text(text)
    assert markers(path, {}) == expected
    assert markers(path, {"v_pred": EMPTY}) == V


@pytest.mark.parametrize("said", ["x0", "3", "[v]"])
def test_read_markers_of_an_unknown_parameterization_raises(path: Path, said: str) -> None:
    path.with_suffix(".yaml").write_text(f"model: {{params: {{parameterization: {said}}}}}")
    with pytest.raises(ModelError, match=r"model\.yaml: parameterization is .*, and only eps and v can be sampled"):
        markers(path, {})


def test_read_markers_of_unknown_metadata_logs_it(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert markers(path, {}, {"modelspec.prediction_type": "sample"}) == SILENT
    assert "modelspec.prediction_type says 'sample', which is unknown and ignored" in caplog.text
    assert markers(path, {}, {"modelspec.prediction_type": " v "}) == V


@pytest.mark.parametrize("text", ["{,", "a: [", "!!python/object:os.system {}"])
def test_read_markers_of_a_damaged_config_raises(path: Path, text: str) -> None:
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(ModelError, match=r"model\.yaml: not readable YAML \(.*\); correct it, or move it") as error:
        markers(path, {})
    assert "\n" not in str(error.value)


def test_read_markers_that_disagree_logs_the_one_in_use(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert markers(path, {}, {"modelspec.prediction_type": "epsilon"}) == V
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "its .yaml says v_prediction and its metadata modelspec.prediction_type epsilon; the first is used" in line


@pytest.mark.parametrize("metadata", [{"modelspec.prediction_type": "epsilon"}, {"ss_v_parameterization": "False"}])
def test_read_markers_of_epsilon_at_zero_snr_raises(path: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(
        ModelError, match=r"says epsilon, and it is marked as of zero terminal SNR, .*; correct the one"
    ):
        markers(path, {"ztsnr": EMPTY}, metadata)


@pytest.fixture
def configs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs of the tiny model in the layout of the shipped ones, of a scheduler that knows no rescaling."""
    root = tmp_path / "configs"
    ignored = shutil.ignore_patterns("*.safetensors", "tokenizer.json", "vocab.json", "merges.txt")
    shutil.copytree(tiny_model, root / "a", ignore=ignored)
    shipped = json.loads((architecture.CONFIGS / "sd15" / "scheduler" / "scheduler_config.json").read_text())
    (root / "a" / "scheduler" / "scheduler_config.json").write_text(json.dumps(shipped))
    (root / "tokenizer").mkdir()
    load_model(tiny_model).tokenizer.backend_tokenizer.model.save(str(root / "tokenizer"))
    monkeypatch.setattr(architecture, "CONFIGS", root)
    monkeypatch.setattr(single_file, "predicts_noise", None)
    return root


Rename = Callable[[Path], dict[str, Tensor]]


@pytest.mark.parametrize("named", [False, True])
def test_load_model_at_zero_snr_samples_as_diffusers(
    original_checkpoint: Rename, configs: Path, tiny_model: Path, tmp_path: Path, path: Path, named: bool
) -> None:
    from diffusers import StableDiffusionPipeline

    save_file({**original_checkpoint(tiny_model), "v_pred": EMPTY, "ztsnr": EMPTY}, path)
    model = load_model(path, config=tiny_model if named else None)
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert model.scheduler_config.items() >= wanted.items()
    model.save(tmp_path / "saved")
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(reference.scheduler) is DDIMScheduler
    reference.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    expected = reference("red apple", latents=noise, **options).images
    with SmoothPipeline.from_pretrained(model, engine="eager") as pipe:
        first = pipe.schedule(4).steps[0]
        assert (first.timestep, first.alpha_from) == (999, 0.0)
        torch.testing.assert_close(pipe("red apple", latents=noise, **options).images, expected)


def test_load_model_with_named_configs_follows_the_file(
    original_checkpoint: Rename, tiny_model: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**original_checkpoint(tiny_model), "v_pred": EMPTY}, path)
    assert load_model(path, config=tiny_model).scheduler_config["prediction_type"] == "v_prediction"
    assert "says that it predicts v_prediction, and so it is run" in caplog.text


def test_load_model_of_epsilon_with_configs_of_zero_snr_raises(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path, path: Path
) -> None:
    config = shutil.copytree(tiny_model, tmp_path / "config")
    file = config / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    save_file(original_checkpoint(tiny_model), path, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ModelError, match="predicts epsilon, and its config rescales to zero terminal SNR"):
        load_model(path, config=config)


@pytest.mark.parametrize("key", ["edm_mean", "edm_std", "edm_vpred.sigma_max"])
def test_load_model_of_edm_is_refused(
    original_checkpoint: Rename, configs: Path, tiny_model: Path, path: Path, key: str
) -> None:
    save_file({**original_checkpoint(tiny_model), key: torch.zeros(())}, path)
    with pytest.raises(ModelError, match=r"seems to be an EDM model, as Playground 2\.5 and CosXL are"):
        load_model(path)
    with pytest.raises(ModelError, match="1 weight would be ignored"):
        load_model(path, config=tiny_model)
