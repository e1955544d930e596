"""The networks of the default model: their sizes, and how diffusers puts them together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from smooth_rt.training.settings import check_count, check_number, check_rate, check_seed, check_steps

__all__ = ["TinyConfig", "new_text_encoder", "new_unet", "new_vae", "pipeline", "scheduler"]


@dataclass(frozen=True)
class TinyConfig:
    """What decides the weights. Sizes in pixels; rates per step; the defaults made the shipped model.

    Raises:
        InputError: a seed, a batch, a number of pictures or a rate is out of range.
    """

    seed: int = 0
    size: int = 64
    tokens: int = 32
    width: int = 128
    vae_channels: tuple[int, ...] = (32, 64, 128)
    vae_batch: int = 16
    vae_lr: float = 1e-3
    kl: float = 3e-4
    pictures: int = 32768
    unet_channels: tuple[int, ...] = (64, 128, 192)
    unet_batch: int = 32
    unet_lr: float = 8e-4

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_count("vae_batch", self.vae_batch)
        check_count("unet_batch", self.unet_batch)
        check_steps("pictures", self.pictures)
        check_rate("vae_lr", self.vae_lr)
        check_rate("unet_lr", self.unet_lr)
        check_number("kl", self.kl, 0)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of the run must agree with: all but the rates, which a resumed run may change."""
        return {name: value for name, value in asdict(self).items() if name not in ("vae_lr", "unet_lr")}


def new_vae(config: TinyConfig) -> AutoencoderKL:
    blocks = len(config.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=config.size,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def new_unet(config: TinyConfig) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=config.size // 2 ** (len(config.vae_channels) - 1),
        layers_per_block=1,
        block_out_channels=config.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=config.width,
        attention_head_dim=4,  # number of heads, by the naming that diffusers keeps
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def new_text_encoder(config: TinyConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=config.tokens,
            projection_dim=config.width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler() -> DDIMScheduler:
    """SD1.5's schedule: scaled linear betas, 1000 steps, sampled with a steps offset of 1 and no clipping."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
