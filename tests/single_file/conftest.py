"""Tensors of diffusers' layout under the names that the original Stable Diffusion code gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from smooth_rt.architecture import CONFIGS

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
    if "attentions" in key:
        key = (
            key.replace("mid_block.attentions.0", "mid.attn_1")
            .replace("group_norm", "norm")
            .replace("to_out.0", "proj_out")
        )
        key = re.sub(r"to_([qkv])\.", r"\1.", key)
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


OPEN_CLIP = (
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"), ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"),
)  # fmt: skip


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder as Stable Diffusion 2 stores it: OpenCLIP's, one layer more than is used, and a projection."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for name, original in OPEN_CLIP:
            key = key.replace(name, original)
        renamed[key] = value
    width = renamed["ln_final.weight"].shape[0]
    for key in [key for key in renamed if ".q_proj." in key]:
        joined = torch.cat([renamed.pop(key.replace(".q_proj.", f".{one}_proj.")) for one in "qkv"])
        renamed[key.replace(".q_proj.", ".in_proj_")] = joined
    first = "transformer.resblocks.0."
    unused = {key.replace(".0.", ".23.", 1): value.clone() for key, value in renamed.items() if key.startswith(first)}
    projection = torch.zeros(width, width, dtype=torch.float16, device=renamed["ln_final.weight"].device)
    return {**renamed, **unused, "text_projection": projection, "logit_scale": projection[0, 0].clone()}


def rename(
    configs: dict[str, Any], tensors: dict[str, Mapping[str, Tensor]], by_open_clip: bool = False
) -> dict[str, Tensor]:
    """The tensors of text_encoder, unet and vae as one checkpoint."""
    unet, blocks = configs["unet"], len(configs["vae"]["block_out_channels"])
    attention = tuple("CrossAttn" in name for name in unet["up_block_types"])
    renamed = {}
    for key, value in tensors["unet"].items():
        renamed[f"model.diffusion_model.{original_unet_key(key, unet['layers_per_block'], attention)}"] = value
    for key, value in tensors["vae"].items():
        # The original attends by convolutions of one pixel.
        square = value[..., None, None] if "attentions" in key and value.ndim == 2 else value
        renamed[f"first_stage_model.{original_vae_key(key, blocks)}"] = square
    text = {key.removeprefix("text_model."): value for key, value in tensors["text_encoder"].items()}
    if by_open_clip:
        return renamed | {f"cond_stage_model.model.{key}": value for key, value in open_clip(text).items()}
    return renamed | {f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.items()}


PARTS = ("text_encoder", "unet", "vae")


def read_parts(folder: Path) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
    return read_configs(folder), {name: load_file(next((folder / name).glob("*.safetensors"))) for name in PARTS}


def read_configs(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / name / "config.json").read_text()) for name in PARTS}


@pytest.fixture(scope="session")
def original_checkpoint() -> Callable[..., dict[str, Tensor]]:
    """Of a diffusers folder: its weights as a single-file checkpoint holds them."""
    return lambda folder, by_open_clip=False: rename(*read_parts(folder), by_open_clip)


@pytest.fixture(scope="session")
def renamed() -> Callable[..., dict[str, Tensor]]:
    """`rename`, for weights that lie in no folder."""
    return rename


@pytest.fixture(scope="session")
def without_weights() -> Callable[[str], tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]]:
    """Configs and tensors of a shipped architecture at its full size, the tensors without memory."""

    def build(name: str) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        from accelerate import init_empty_weights
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        configs = read_configs(CONFIGS / name)
        with init_empty_weights():
            networks = (
                CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
                UNet2DConditionModel.from_config(configs["unet"]),
                AutoencoderKL.from_config(configs["vae"]),
            )
        return configs, {part: network.state_dict() for part, network in zip(PARTS, networks, strict=True)}

    return build
