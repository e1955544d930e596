"""A single-file checkpoint in the layout of the original Stable Diffusion code, with the configs of a local folder."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.bundle import Bundle, Source
from smooth_rt import cli
from smooth_rt.build import build_engines
from smooth_rt.errors import EngineError, InputError, ModelError
from smooth_rt.lora import Lora, LoraLayer, write_lora
from smooth_rt.model import Model, load_model
from smooth_rt.opening import reopen_model
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.schedule import Schedule

Rename = Callable[[Path], dict[str, Tensor]]


def test_single_file_equals_the_folder(original_checkpoint: Rename, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    folder, single = load_model(tiny_model), load_model(path, config=tiny_model)
    assert single.source == str(path)
    assert single.dims == folder.dims
    for part in ("text_encoder", "unet", "vae"):
        expected, found = getattr(folder, part).state_dict(), getattr(single, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert single.digests == folder.digests


@pytest.mark.parametrize("version", ["0.6.0", "0.42.1"])
@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True},
        {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"},
        {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf, "prediction_type": "sample"},
    ],
)
def test_single_file_with_old_configs_equals_the_folder(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], version: str,
    scheduler: dict[str, Any],
) -> None:  # fmt: skip
    path, configs = tmp_path / "model.safetensors", shutil.copytree(tiny_model, tmp_path / "configs")
    save_file(original_checkpoint(tiny_model), path)
    (configs / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name, change in (
        ("unet/config.json", {"_diffusers_version": version}),
        ("model_index.json", {"scheduler": ["diffusers", scheduler["_class_name"]]}),
    ):
        (configs / name).write_text(json.dumps({**json.loads((configs / name).read_text()), **change}))
    folder, single = load_model(configs), load_model(path, config=configs)
    assert capfd.readouterr() == ("", "")
    assert single.dims == folder.dims
    assert single.dims.sample_size == (64 if version == "0.6.0" else 8)
    assert single.digests["unet"] == folder.digests["unet"]
    schedules = [Schedule.from_config(model.scheduler_config, 10) for model in (folder, single)]
    assert schedules[0] == schedules[1]
    assert schedules[0].prediction_type == scheduler.get("prediction_type", "epsilon")


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.out.", "first_stage_model.encoder.conv_in", "cond_stage_model."]
)
def test_incomplete_single_file(original_checkpoint: Rename, tiny_model: Path, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.safetensors"
    tensors = original_checkpoint(tiny_model)
    save_file({key: value for key, value in tensors.items() if not key.startswith(prefix)}, path)
    assert len(load_file(path)) < len(tensors)
    with pytest.raises(ModelError, match=r"model\.safetensors: .*missing") as error:
        load_model(path, config=tiny_model)
    assert "\n" not in str(error.value)


def test_single_file_without_configs_says_what_to_pass(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    with pytest.raises(
        ModelError, match=r"is of no architecture that ships; name .* --model-config \(in Python: config=\)"
    ) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= len(str(path)) + 250


def test_the_advice_for_a_single_file_holds(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    command = ["generate", "--prompt", "dog", "--model", str(path), "--num-inference-steps", "2", "--engine", "eager"]
    command += ["--output", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "--model-config" in capsys.readouterr().err
    assert cli.main([*command, "--model-config", str(tiny_model)]) == 0
    with SmoothPipeline.from_pretrained(path, engine="eager", config=tiny_model) as pipe:
        made = pipe("dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(tmp_path / "out" / "image-001.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(made))


def test_configs_from_the_hub(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub repository only the configs are downloaded; what its index names beside them is not needed."""
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    ignored = shutil.ignore_patterns("*.safetensors")
    snapshot = shutil.copytree(tiny_model, tmp_path / "snapshot", ignore=ignored)
    index = json.loads((snapshot / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (snapshot / "model_index.json").write_text(json.dumps(index))
    asked: list[str] = []

    def download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        assert not [pattern for pattern in allow_patterns if "safetensors" in pattern]
        asked.append(repository)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model(path, config="some-body/some.model").digests == load_model(tiny_model).digests
    assert asked == ["some-body/some.model"]


def test_a_config_that_is_nowhere_or_needless(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"no/such/folder: no such folder; as a checkpoint's config, name"):
        load_model(path, config="no/such/folder")
    with pytest.raises(ModelError, match=r"nobody/nothing: .* name a diffusers folder as the checkpoint's config"):
        load_model(path, config="nobody/nothing")
    for model in (tiny_model, "default", "nobody/nothing"):
        with pytest.raises(InputError, match=r"is no file; --model-config .* is for a \.safetensors checkpoint"):
            load_model(model, config=tiny_model)


def test_damaged_single_file_and_config(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="truncated or damaged"):
        load_model(path, config=tiny_model)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(path, config=tiny_model)
    config = shutil.copytree(tiny_model, tmp_path / "config")
    (config / "unet" / "config.json").write_text("{,")
    with pytest.raises(ModelError, match="not readable JSON"):
        load_model(path, config=config)


def test_every_command_that_takes_a_model_takes_its_config(
    original_checkpoint: Rename,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    model = load_model(tiny_model)
    width = model.unet.get_submodule(layer).weight.shape[0]
    lora = write_lora(
        Lora({layer: LoraLayer(torch.ones(1, width), torch.ones(width, 1))}, "", ""), tmp_path / "l.safetensors"
    )
    named = ["--model", str(path), "--model-config", str(tiny_model), "--lora", str(lora)]
    assert cli.main(["fuse", *named, "--output", str(tmp_path / "fused")]) == 0
    fused = load_model(tmp_path / "fused").unet.get_submodule(layer).weight
    torch.testing.assert_close(fused, model.unet.get_submodule(layer).weight + 1)

    built: list[Model] = []

    def ensure_engines(model: Model, *_: object, **__: object) -> None:
        built.append(model)
        raise InputError("built")

    for place in ("build", "demo"):
        monkeypatch.setattr(f"smooth_rt.{place}.ensure_engines", ensure_engines)
    monkeypatch.setattr("smooth_rt.build.build_engines", ensure_engines)
    for command in ("build-engine", "demo", "evaluate inversion"):
        assert cli.main([*command.split(), *named, "--output", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "error: built"
    assert [one.digests for one in built] == [model.digests] * 3
    assert {one.source for one in built} == {str(path)}


def test_a_bundle_of_a_single_file_finds_its_weights_again(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    digests = load_model(tiny_model).digests
    source = Source(model=str(path), digests=digests)
    bundle: Any = SimpleNamespace(path=Path("bundle"), source=source)
    with pytest.raises(ModelError, match="--model-config"):
        reopen_model(bundle)
    assert reopen_model(bundle, tiny_model).digests == digests
    bundle.source = Source(model=str(path), digests=digests, config=str(tiny_model))  # as a build records it
    assert reopen_model(bundle).digests == digests


def test_a_bundle_of_a_single_file_is_added_to_with_its_configs(
    original_checkpoint: Rename, tiny_model: Path, tmp_path: Path
) -> None:
    path, folder = tmp_path / "model.safetensors", tmp_path / "b"
    save_file(original_checkpoint(tiny_model), path)
    bundle = build_engines(load_model(path, config=tiny_model), backends=["onnxruntime"], output=folder)
    assert bundle.source.config == str(tiny_model)
    with pytest.raises(EngineError, match=f"--model-config {tiny_model} ") as caught:
        SmoothPipeline.from_engines(folder, "openvino")
    assert cli.main(shlex.split(str(caught.value).split("`")[1])[1:]) == 0
    assert Bundle.open(folder).backends == ("onnxruntime", "openvino")
    with SmoothPipeline.from_engines(folder, "eager") as pipe:
        assert pipe.digests == load_model(tiny_model).digests
