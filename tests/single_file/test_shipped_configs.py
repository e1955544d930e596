"""A checkpoint that comes without configs. Those of the tiny model stand in for the ones that ship."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt import architecture, cli, single_file
from smooth_rt.errors import ModelError
from smooth_rt.model import Model, load_model
from smooth_rt.single_file import predicts_noise

Rename = Callable[..., dict[str, Tensor]]


@pytest.fixture
def configs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the tiny model, in the layout of the shipped ones: "a" predicts the noise, "b" the velocity."""
    root = tmp_path / "configs"
    shared = shutil.ignore_patterns("*.safetensors", "tokenizer.json", "vocab.json", "merges.txt")
    for name, prediction, side in (("a", "epsilon", 8), ("b", "v_prediction", 16)):
        shutil.copytree(tiny_model, root / name, ignore=shared)
        for file, change in (
            ("scheduler/scheduler_config.json", {"prediction_type": prediction}),
            ("unet/config.json", {"sample_size": side}),
        ):
            path = root / name / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (root / "tokenizer").mkdir()
    load_model(tiny_model).tokenizer.backend_tokenizer.model.save(str(root / "tokenizer"))
    monkeypatch.setattr(architecture, "CONFIGS", root)
    return root


def equal(found: Model, expected: Model) -> bool:
    return all(
        torch.equal(value, getattr(expected, part).state_dict()[key])
        for part in ("text_encoder", "unet", "vae")
        for key, value in getattr(found, part).state_dict().items()
    )


def test_one_architecture_fits(
    original_checkpoint: Rename, configs: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(configs / "b")
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    found, expected = load_model(path), load_model(tiny_model)
    assert found.digests == expected.digests
    assert found.dims == expected.dims
    text = "red apple on blue background"
    assert found.tokenizer(text).input_ids == expected.tokenizer(text).input_ids
    command = ["generate", "--prompt", "dog", "--model", str(path), "--num-inference-steps", "2", "--engine", "eager"]
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 0


def test_a_text_encoder_of_openclip(
    original_checkpoint: Rename, configs: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = original_checkpoint(tiny_model, by_open_clip=True)
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in tensors
    save_file(tensors, path)
    assert load_model(path).digests["text_encoder"] == load_model(tiny_model).digests["text_encoder"]


@pytest.mark.parametrize(("noise", "name", "side"), [(True, "epsilon", 8), (False, "v_prediction", 16)])
def test_the_unet_is_asked_what_it_predicts(
    original_checkpoint: Rename,
    configs: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise: bool,
    name: str,
    side: int,
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    monkeypatch.setattr(single_file, "predicts_noise", lambda _: noise)
    found = load_model(path)
    assert found.scheduler_config["prediction_type"] == name
    assert found.unet.config.sample_size == side
    assert equal(found, load_model(tiny_model))


def test_a_file_that_says_what_it_predicts_is_not_asked(
    original_checkpoint: Rename, configs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "predicts_noise", None)
    path, tensors = tmp_path / "model.safetensors", original_checkpoint(tiny_model)
    save_file(tensors, path, {"modelspec.prediction_type": "epsilon"})
    assert load_model(path).scheduler_config["prediction_type"] == "epsilon"
    save_file({**tensors, "v_pred": torch.zeros(0)}, path)
    assert load_model(path).unet.config.sample_size == 16
    shutil.rmtree(configs / "b")  # a velocity model of an architecture that is known to predict the noise
    assert load_model(path).scheduler_config["prediction_type"] == "v_prediction"
    config = configs / "a" / "scheduler" / "scheduler_config.json"
    stated = {key: value for key, value in json.loads(config.read_text()).items() if key != "prediction_type"}
    config.write_text(json.dumps(stated))  # it is then a default, which diffusers lists as such
    assert load_model(path).config().scheduler().config["prediction_type"] == "v_prediction"


def test_noise_and_velocity_are_told_apart() -> None:
    """By the default model, which predicts the noise, and by what it says of the velocity."""
    model = load_model("default")
    config = SimpleNamespace(num_train_timesteps=1000)
    pipe = SimpleNamespace(
        unet=model.unet,
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder,
        scheduler=SimpleNamespace(config=config),
    )
    assert predicts_noise(pipe)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = float((1 - betas).prod())
    forward = model.unet.forward

    def velocity(sample: Tensor, timestep: Any, text: Tensor) -> Any:
        noise = forward(sample, timestep, text).sample
        image = (sample - (1 - kept) ** 0.5 * noise) / kept**0.5
        return SimpleNamespace(sample=kept**0.5 * noise - (1 - kept) ** 0.5 * image)

    model.unet.forward = velocity
    assert not predicts_noise(pipe)


def test_a_missing_weight(original_checkpoint: Rename, configs: Path, tiny_model: Path, tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", original_checkpoint(tiny_model)
    for key in ("model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.weight"):
        save_file({name: value for name, value in tensors.items() if name != key}, path)
        with pytest.raises(ModelError, match=r"model\.safetensors: .*missing; name a complete checkpoint$"):
            load_model(path)
    save_file({**tensors, "model.diffusion_model.out.2.weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=r"not loaded as a Stable Diffusion .*; name a complete checkpoint") as error:
        load_model(path)
    assert "\n" not in str(error.value)
