"""What a checkpoint is, by its header alone: of files of the full sizes that hold nothing, and of other models."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt import architecture
from smooth_rt.architecture import recognise, shipped_tokenizer
from smooth_rt.checkpoint import empty_network
from smooth_rt.errors import ModelError
from smooth_rt.model import load_model
from smooth_rt.original_layout import destinations, part_of
from smooth_rt.weight_keys import is_ignored

CONFIGS = architecture.CONFIGS
UNET = "model.diffusion_model."
TO_K = "1.transformer_blocks.0.attn2.to_k.weight"
Names = Mapping[str, Sequence[int]]


def sparse(path: Path, shapes: Names, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of fp16 tensors whose bytes take no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("name", "parameters", "fits"),
    [
        ("sd15", (123_060_480, 859_520_964, 83_653_863), {"epsilon": "sd15"}),
        ("sd21", (340_387_840, 865_910_724, 83_653_863), {"epsilon": "sd21-base", "v_prediction": "sd21"}),
        ("sd21-base", (340_387_840, 865_910_724, 83_653_863), {"epsilon": "sd21-base", "v_prediction": "sd21"}),
    ],
)
def test_the_full_sizes(
    renamed: Callable[..., dict[str, Tensor]],
    without_weights: Callable[[str], Any],
    name: str,
    parameters: tuple[int, ...],
    fits: dict[str, str],
    tmp_path: Path,
) -> None:
    """As many parameters as the published models have, and a header that is recognised."""
    configs, tensors = without_weights(name)
    assert tuple(sum(one.numel() for one in part.values()) for part in tensors.values()) == parameters
    shapes = {key: value.shape for key, value in renamed(configs, tensors, name != "sd15").items()}
    found = recognise(sparse(tmp_path / "model.safetensors", shapes))
    assert {prediction: folder.name for prediction, folder in found.folders.items()} == fits
    assert found.said is None


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_every_weight_of_the_full_sizes_has_a_tensor(
    renamed: Callable[..., dict[str, Tensor]], without_weights: Callable[[str], Any], name: str
) -> None:
    configs, tensors = without_weights(name)
    shapes = {key: tuple(value.shape) for key, value in renamed(configs, tensors, name != "sd15").items()}
    read = set()
    for part, own in tensors.items():
        found = destinations(part, empty_network(part, CONFIGS / name / part), shapes)
        assert found.keys() == own.keys()
        read |= set(found.values())
    assert [key for key in shapes if key not in read and not is_ignored(*part_of(key))] == []


@pytest.mark.parametrize(("name", "pad"), [("sd15", 49407), ("sd21", 0), ("sd21-base", 0)])
def test_the_tokenizer_is_clips(name: str, pad: int) -> None:
    tokenizer = shipped_tokenizer(CONFIGS / name)
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, pad)
    ids = tokenizer("A photo of a  cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]
    assert tokenizer.decode(ids[1:6]) == "a photo of a cat"


def test_vocabulary_and_merges_agree() -> None:
    vocabulary = json.loads((CONFIGS / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    merges = (CONFIGS / "tokenizer" / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    assert sorted(vocabulary.values()) == list(range(49408))
    assert [vocabulary["".join(pair.split(" "))] for pair in merges] == list(range(512, 49406))


def model(width: int = 768, channels: int = 4, **more: Sequence[int]) -> dict[str, Sequence[int]]:
    """The keys by which a header is told from another."""
    blocks = {f"{UNET}input_blocks.{block}.0.norm.bias": (1,) for block in range(1, 12)}
    first = {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3), f"{UNET}input_blocks.1.{TO_K}": (320, width)}
    parts = {"cond_stage_model.transformer.x": (1,), "first_stage_model.decoder.x": (1,)}
    return {**first, **blocks, **parts, **more}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (model(2048), "seems to be Stable Diffusion XL;"),
        (model(1280), "seems to be the refiner of Stable Diffusion XL;"),
        (model(channels=9), r"seems to be an inpainting model \(its UNet takes 9 channels\);"),
        (model(1024, 5), "seems to be a depth-to-image model"),
        (model(channels=8), "seems to be an InstructPix2Pix model"),
        (model(1024, **{f"{UNET}label_emb.0.0.weight": (1,)}), "asks for more than text"),
        (model(**{"control_model.x": (1,)}), "seems to be a ControlNet;"),
        (model(**{f"{UNET}input_blocks.1.1.time_stack.x": (1,)}), "seems to be a video model;"),
        ({f"{UNET}joint_blocks.0.x_block.mlp.fc1.bias": (1,)}, "seems to be Stable Diffusion 3;"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, "seems to be FLUX;"),
        (
            {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (1,)},
            "seems to be a LoRA; name it with --lora$",
        ),
        ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (1,)}, "seems to be a LoRA;"),
        ({"mid_block.attn1.processor.to_q_lora.down.weight": (1,)}, "seems to be a LoRA;"),
        ({"lora_te_text_model_encoder.hada_w1_a": (1,)}, "seems to be a LoRA;"),
        ({"emb_params": (2, 768)}, "seems to be a textual inversion;"),
        ({"first_stage_model.decoder.conv_in.bias": (1,)}, "seems to be a VAE alone; name the whole checkpoint$"),
        ({"decoder.up_blocks.0.resnets.0.conv1.bias": (1,)}, "seems to be a VAE alone;"),
        ({"text_model.embeddings.position_ids": (1,)}, "seems to be a text encoder alone;"),
        ({"down_blocks.0.resnets.0.conv1.bias": (1,)}, "a UNet in diffusers' layout; name the diffusers folder"),
        ({"weight": (1,)}, r"no checkpoint of a Stable Diffusion model \(its first key is weight\);"),
        ({}, r"no checkpoint of a Stable Diffusion model \(it is empty\);"),
        (
            {k: v for k, v in model().items() if "cond_stage" not in k},
            r"the text encoder is missing .*; name a complete",
        ),
        ({k: v for k, v in model().items() if "first_stage" not in k}, r"the VAE is missing .*; name a complete"),
        (model(512), r"UNet \(text of width 512, 4 channels in, 320 .*, 12 input blocks\) .*; name .* --model-config"),
        (model(**{f"{UNET}input_blocks.1.{TO_K}": ()}), r"UNet \(text of width None, 4 channels in, .*\) .*; name .*"),
        ({k: v for k, v in model().items() if ".9." not in k}, r"768, .* 11 input blocks\) is of no architecture that"),
    ],
)
def test_other_files_are_named(shapes: Names, said: str, tmp_path: Path) -> None:
    path = sparse(tmp_path / "model.safetensors", shapes)
    with pytest.raises(ModelError, match=said) as error:
        load_model(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= len(str(path)) + 250


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for content in (b"", b"not safetensors at all", whole[:-1], whole[:40], whole + b"0"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged \(.*\); download it") as error:
            load_model(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, None),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, None),
        ({"modelspec.prediction_type": "flow"}, None),
    ],
)
def test_what_a_file_says_of_its_prediction(metadata: dict[str, str], said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert recognise(sparse(path, model(1024), metadata)).said == said
    assert recognise(sparse(path, model(1024, v_pred=(0,)), metadata)).said == "v_prediction"
