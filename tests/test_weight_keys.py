"""Names of weights that may go unread, and the refusal of all others."""

from __future__ import annotations

import re

import pytest

from smooth_rt.errors import ModelError
from smooth_rt.original_layout import part_of, plain_name
from smooth_rt.weight_keys import IGNORED, check_dtypes, check_unused, is_ignored

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    "key",
    [
        "model_ema.decay",
        "model_ema.num_updates",
        "model_ema.diffusion_modelinput_blocks00weight",
        "betas",
        "alphas_cumprod",
        "alpha_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "lvlb_weights",
        "logvar",
        "loss.logvar",
        "denoiser.sigmas",
        "global_step",
        "optimizer_states.0.state.12.exp_avg",
        "safety_checker.vision_model.vision_model.embeddings.class_embedding",
        "v_pred",
        "ztsnr",
        "first_stage_model.loss.discriminator.main.0.weight",
        "first_stage_model.model_ema.decay",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.embeddings.position_ids",
        "cond_stage_model.transformer.vision_model.encoder.layers.0.mlp.fc1.weight",
        "cond_stage_model.transformer.visual_projection.weight",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.visual.conv1.weight",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight",
        "conditioner.embedders.0.model.text_projection",
    ],
)
def test_is_ignored_of_published_checkpoints_is_true(key: str) -> None:
    assert is_ignored(*part_of(plain_name(key)))


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.model_ema.decay",
        "model.diffusion_model.vision_model.x",
        "model.diffusion_model.betas",
        "cond_stage_model.model.transformer.resblocks.24.ln_1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.12.layer_norm1.bias",
        "first_stage_model.vision_model.x",
        "embedding_manager.string_to_param_dict.*",
        "betas_of_something.weight",
    ],
)
def test_is_ignored_of_other_names_is_false(key: str) -> None:
    assert not is_ignored(*part_of(plain_name(key)))


def test_ignored_names_have_a_reason() -> None:
    assert all(reason for entries in IGNORED.values() for _, reason in entries)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            f"{BLOCK}.processor.to_q_lora.down.weight",
            "LoRA weights; fuse them into the model, or name the LoRA with --",
        ),
        (f"{BLOCK}.to_q.lora_A.default.weight", "LoRA weights"),
        (f"{BLOCK}.to_q.lora_magnitude_vector.weight", "LoRA weights"),
        (f"{BLOCK}.to_q.base_layer.weight", "LoRA weights"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "LoRA weights"),
        ("model.diffusion_model.middle_block.1.proj_in.hada_w1_a", "LoRA weights"),
        ("scaled_fp8", "scales of quantised weights; name a model in 16 or 32 bits"),
        ("model.diffusion_model.scaled_fp8", "scales of quantised weights"),
        ("model.diffusion_model.out.2.scale_weight", "scales of quantised weights"),
        ("model.diffusion_model.out.2.scale_input", "scales of quantised weights"),
        ("conv_in.weight_scale", "scales of quantised weights"),
        ("conv_in.comfy_quant", "scales of quantised weights"),
        ("conv_in.weight.absmax", "scales of quantised weights"),
        ("conv_in.weight.quant_state.bitsandbytes__nf4", "scales of quantised weights"),
        (f"{BLOCK}.to_q.SCB", "scales of quantised weights"),
        (f"{BLOCK}.to_q.qweight", "scales of quantised weights"),
        (f"{BLOCK}.processor.to_k_ip.0.weight", "an IP-Adapter"),
        (f"{BLOCK}.processor.to_k_custom_diffusion.weight", "weights of attention processors"),
        ("embedding_manager.string_to_param_dict.*", "textual inversion embeddings"),
        ("down_blocks.0.motion_modules.0.proj_in.weight", "a video model's layers"),
        (f"{BLOCK}.fuser.linear.weight", "GLIGEN's layers"),
        ("add_embedding.linear_1.weight", "embeddings of conditions other than text and time"),
        ("down_blocks.5.resnets.0.conv1.weight", "of layers that the config does not have"),
        ("surprise", "nothing here reads them"),
    ],
)
def test_check_unused_names_the_kind_of_weight(key: str, said: str) -> None:
    with pytest.raises(ModelError, match=rf"^x: 1 weight would be ignored \({re.escape(key)}\): {said}") as error:
        check_unused("x", [key])
    assert "\n" not in str(error.value)


def test_check_unused_shows_the_telling_key_of_many() -> None:
    keys = ["a", *(f"b{n}" for n in range(7)), "z.lora_A.weight"]
    with pytest.raises(ModelError, match=r"^x: 9 weights would be ignored \(z\.lora_A\.weight, a, b0, \.\.\.\): LoRA"):
        check_unused("x", keys)


def test_check_unused_of_long_names_stays_short() -> None:
    with pytest.raises(ModelError, match=r"would be ignored \(k{90}, \.\.\.\)") as error:
        check_unused("x", ["k" * 500, "l" * 500])
    assert len(str(error.value)) <= 250


def test_check_unused_without_keys_passes() -> None:
    check_unused("x", [])


def test_check_dtypes_of_whole_numbers_is_refused() -> None:
    check_dtypes("x", {"a": "F16", "b": "BF16", "c": "F8_E4M3", "d": "F32"})
    with pytest.raises(ModelError, match=r"^x: the weight b is stored as I8, as quantised models are; name a model in"):
        check_dtypes("x", {"a": "F16", "b": "I8"})
