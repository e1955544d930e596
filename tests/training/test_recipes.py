"""Both recipes from end to end in a few steps, on discs in place of emoji."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from smooth_rt.errors import InputError
from smooth_rt.lora import fuse, read_lora
from smooth_rt.model import load_model
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.smooth_lora import SmoothLoraConfig, train_smooth_lora
from smooth_rt.training.tiny import train_tiny, training_device
from smooth_rt.training.tiny_networks import TinyConfig

CONFIG = TinyConfig(
    size=16,
    tokens=12,
    width=32,
    vae_channels=(16, 32),
    unet_channels=(16, 32, 32),
    vae_batch=2,
    unet_batch=2,
    pictures=8,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tiny_leaves_a_model_that_diffusers_samples(tmp_path: Path, emoji: Path) -> None:
    assets = train_tiny(tmp_path, emoji, vae_steps=2, unet_steps=2, config=CONFIG)
    pipe = StableDiffusionPipeline.from_pretrained(assets / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("dog face on blue background", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    weights = load_file(assets / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (assets / "model" / "tokenizer").iterdir()}
    written = [path.read_text() for path in (assets / "model").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in written)
    tokenizer = pipe.tokenizer
    assert tokenizer.model_max_length == 12
    ids = tokenizer("a 猫 dog").input_ids
    assert tokenizer.eos_token_id not in ids[:-1]
    assert (assets / "examples" / "captions.json").exists()


def test_stages_say_what_they_need(tmp_path: Path, emoji: Path) -> None:
    with pytest.raises(InputError, match="run the stage 'vae' first"):
        train_tiny(tmp_path, emoji, stages=("latents",), config=CONFIG)
    with pytest.raises(InputError, match=r"stage 'both': unknown; choose from tokenizer"):
        train_tiny(tmp_path, emoji, stages=("both",), config=CONFIG)


def test_a_device_that_is_not_there_is_named(tmp_path: Path, emoji: Path) -> None:
    assert training_device("cpu") == torch.device("cpu")
    for name, said in (("cuda:99", "GPUs here"), ("abacus", "unknown"), ("meta", "not supported")):
        with pytest.raises(InputError, match=rf"device='{name}': .*{said}"):
            train_tiny(tmp_path / "run", emoji, config=CONFIG, device=name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["scalar", "per-timestep", "anchored"])
def test_smooth_lora_trains_resumes_and_fuses(tmp_path: Path, emoji: Path, tiny_model: Path, target: str) -> None:
    config = SmoothLoraConfig(batch_size=2, lr=1e-2, svr_target=target, calibration_steps=2)
    scenes = EmojiScenes(emoji, 16)
    whole = train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "whole", steps=4, config=config)

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "two", 4, config=config, every={1: stop})
    resumed = train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "two", 4, resume=True, config=config)
    one, other = load_file(whole), load_file(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    model, base = load_model(tiny_model), load_model(tiny_model)
    fuse(model.unet, read_lora(whole))
    changed = [
        name
        for (name, fused), kept in zip(model.unet.named_parameters(), base.unet.parameters(), strict=True)
        if not torch.equal(fused, kept)
    ]
    assert changed
    assert all(".attn" in name for name in changed)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(InputError, match="rank=0"):
        SmoothLoraConfig(rank=0)
    with pytest.raises(InputError, match=r"reg-weight=-1"):
        SmoothLoraConfig(reg_weight=-1)
