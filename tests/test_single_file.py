"""A single-file checkpoint in the layout of the original Stable Diffusion code, with the configs of a local folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from smooth_rt import cli
from smooth_rt.errors import InputError, ModelError
from smooth_rt.lora import Lora, LoraLayer, write_lora
from smooth_rt.model import Model, load_model
from smooth_rt.opening import reopen_model
from smooth_rt.pipeline import SmoothPipeline

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in.": "input_blocks.0.0.", "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
}  # fmt: skip


def original_unet_key(key: str, layers: int, with_attention: tuple[bool, ...]) -> str:
    for end, original in UNET_ENDS.items():
        if key.startswith(end):
            return original + key.removeprefix(end)
    match = re.fullmatch(
        r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    )
    assert match, key
    side, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        name, _, tail = rest.partition(".")
        rest = f"{RESNET[name]}.{tail}"
    if side == "mid":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + block * (layers + 1) + number}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if with_attention[block] else 1}.{rest}"
    return f"output_blocks.{block * (layers + 1) + number}.{int(kind == 'attentions')}.{rest}"


def original_vae_key(key: str, blocks: int) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def original_checkpoint(folder: Path) -> dict[str, Tensor]:
    unet = json.loads((folder / "unet" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    attention = tuple("CrossAttn" in name for name in unet["up_block_types"])
    tensors = {}
    for key, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        name = original_unet_key(key, unet["layers_per_block"], attention)
        tensors[f"model.diffusion_model.{name}"] = value
    for key, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        tensors[f"first_stage_model.{original_vae_key(key, len(vae['block_out_channels']))}"] = value
    for key, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return tensors


def test_single_file_equals_the_folder(tiny_model: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.out.", "first_stage_model.encoder.conv_in", "cond_stage_model."]
)
def test_incomplete_single_file(tiny_model: Path, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.safetensors"
    tensors = original_checkpoint(tiny_model)
    save_file({key: value for key, value in tensors.items() if not key.startswith(prefix)}, path)
    assert len(load_file(path)) < len(tensors)
    with pytest.raises(ModelError, match=r"model\.safetensors: .*missing") as error:
        load_model(path, config=tiny_model)
    assert "\n" not in str(error.value)


def test_single_file_without_configs_says_what_to_pass(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    with pytest.raises(
        ModelError, match=r"the hub did not give them; .* --model-config \(in Python: config=\)"
    ) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= len(str(path)) + 250


def test_the_advice_for_a_single_file_holds(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_configs_from_the_hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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

    def ensure_engines(model: Model, *_: object) -> None:
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


def test_a_bundle_of_a_single_file_finds_its_weights_again(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny_model), path)
    digests = load_model(tiny_model).digests
    source = SimpleNamespace(model=str(path), revision=None, digests=digests, lora=None)
    bundle: Any = SimpleNamespace(path=Path("bundle"), source=source)
    with pytest.raises(ModelError, match="--model-config"):
        reopen_model(bundle)
    assert reopen_model(bundle, tiny_model).digests == digests
