"""Names in a single-file checkpoint: other spellings are loaded, what changes no image is ignored, all else refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt.errors import ModelError
from smooth_rt.model import load_model

Rename = Callable[..., dict[str, Tensor]]
UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.lora_A.default.weight", "LoRA weights; fuse them"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "LoRA weights; fuse them"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "LoRA weights; fuse them"),
        (f"{UNET}out.2.scale_weight", "scales of quantised weights"),
        ("scaled_fp8", "scales of quantised weights"),
        (f"{UNET}scaled_fp8", "scales of quantised weights"),
        (f"{UNET}input_blocks.30.0.in_layers.0.weight", "of layers that the config does not have"),
        (f"{UNET}surprise", "nothing here reads them"),
        ("first_stage_model.encoder.surprise", "nothing here reads them"),
        (f"{TEXT}text_model.encoder.layers.7.layer_norm1.bias", "of layers that the config does not have"),
        (f"{TEXT}text_model.surprise", "nothing here reads them"),
        ("text_encoders.clip_l.surprise", "nothing here reads them"),
        ("embedding_manager.string_to_param_dict.*", "textual inversion embeddings"),
        ("cond_stage_model.model.token_embedding.weight", "nothing here reads them"),
    ],
)
def test_a_checkpoint_with_unread_weights_is_refused(
    original_checkpoint: Rename, tiny_model: Path, path: Path, key: str, said: str
) -> None:
    save_file({**original_checkpoint(tiny_model), key: torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=rf"1 weight would be ignored \({re.escape(key)}\): {said}") as error:
        load_model(path, config=tiny_model)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= len(str(path)) + 250


def test_a_checkpoint_loads_whatever_training_left(original_checkpoint: Rename, tiny_model: Path, path: Path) -> None:
    besides = (
        "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "betas", "sqrt_alphas_cumprod",
        "posterior_mean_coef1", "logvar", "loss.logvar", "global_step", "optimizer_states.0.exp_avg",
        "safety_checker.concept_embeds", "denoiser.sigmas", "first_stage_model.loss.logvar",
        "cond_stage_model.logit_scale", f"{TEXT}text_model.embeddings.position_ids", f"{TEXT}logit_scale",
        f"{TEXT}vision_model.post_layernorm.weight", f"{TEXT}text_projection.weight",
    )  # fmt: skip
    save_file({**original_checkpoint(tiny_model), **{key: torch.zeros(3) for key in besides}}, path)
    assert load_model(path, config=tiny_model).digests == load_model(tiny_model).digests


def test_a_checkpoint_of_openclip_loads_without_its_last_layer(
    original_checkpoint: Rename, tiny_model: Path, path: Path
) -> None:
    tensors = original_checkpoint(tiny_model, by_open_clip=True)
    tensors["cond_stage_model.model.attn_mask"] = torch.zeros(12, 12)
    save_file(tensors, path)
    assert load_model(path, config=tiny_model).digests == load_model(tiny_model).digests
    key = "cond_stage_model.model.transformer.resblocks.22.ln_1.weight"
    save_file({**tensors, key: torch.zeros(32)}, path)
    with pytest.raises(ModelError, match=r"resblocks\.22\.ln_1\.weight\): of layers that the config does not have"):
        load_model(path, config=tiny_model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{TEXT}text_model.", TEXT),
        ("cond_stage_model.", "conditioner.embedders.0."),
        (r".attn_1.q.", ".attn_1.to_q."),
        (r".attn_1.k.", ".attn_1.key."),
        (r".attn_1.v.", ".attn_1.value."),
        (r".attn_1.proj_out.", ".attn_1.proj_attn."),
        (r".attn_1.proj_out.", ".attn_1.to_out.0."),
        (r".attn_1.norm.", ".attn_1.group_norm."),
    ],
)
def test_a_checkpoint_of_other_spellings_is_loaded(
    original_checkpoint: Rename, attentive_model: Path, path: Path, old: str, new: str
) -> None:
    tensors = original_checkpoint(attentive_model)
    spelled = {key.replace(old, new): value for key, value in tensors.items()}
    assert spelled.keys() != tensors.keys()
    save_file(spelled, path)
    assert load_model(path, config=attentive_model).digests == load_model(attentive_model).digests


def test_a_weight_under_two_names_is_loaded_where_they_agree(
    original_checkpoint: Rename, tiny_model: Path, path: Path
) -> None:
    tensors = original_checkpoint(tiny_model)
    twice = {key.replace("text_model.", ""): value.clone() for key, value in tensors.items() if "text_model" in key}
    save_file({**tensors, **twice}, path)
    assert load_model(path, config=tiny_model).digests == load_model(tiny_model).digests
    key = f"{TEXT}final_layer_norm.bias"
    save_file({**tensors, **twice, key: twice[key] + 1}, path)
    with pytest.raises(ModelError, match=r"final_layer_norm\.bias and .* are one weight and differ; remove the one"):
        load_model(path, config=tiny_model)


def test_a_checkpoint_of_quantised_numbers_is_refused(
    original_checkpoint: Rename, tiny_model: Path, path: Path
) -> None:
    tensors = original_checkpoint(tiny_model)
    key = f"{UNET}out.2.weight"
    save_file({**tensors, key: tensors[key].to(torch.float8_e4m3fn)}, path)
    loaded = load_model(path, config=tiny_model).unet.conv_out.weight
    assert torch.equal(loaded, tensors[key].to(torch.float8_e4m3fn).float())
    save_file({**tensors, key: tensors[key].to(torch.int8)}, path)
    with pytest.raises(ModelError, match=r"out\.2\.weight is stored as I8, as quantised models are; name a model in"):
        load_model(path, config=tiny_model)
