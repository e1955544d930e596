"""Fixtures: a model small enough to export in seconds, whose sizes differ from every usual default; its pictures."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Networks this small run faster on one thread, and on busy cores many times faster: idle threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights: f = 2, latents of 8x8, 12 tokens of width 32."""
    import torch
    from diffusers import StableDiffusionPipeline

    from smooth_rt.training.tiny_networks import TinyConfig, new_text_encoder, new_unet, new_vae, scheduler
    from smooth_rt.training.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    config = TinyConfig(size=16, tokens=12, width=32, vae_channels=(16, 32), unet_channels=(16, 32, 32))
    torch.manual_seed(0)
    captions = [f"{thing} on {colour} background" for thing in ("red apple", "dog") for colour in ("blue", "white")]
    tokenizer = train_tokenizer(captions, config.tokens, folder / "tokenizer")
    vae, unet = new_vae(config), new_unet(config)
    # A fresh UNet's last layer makes a prediction that hardly depends on its inputs; spread it.
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=new_text_encoder(config, tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the npm packages that `smooth_rt.training.data.fetch` takes for complete: each listed object as a
    coloured disc, in the packages' own layout."""
    folder = tmp_path_factory.mktemp("emoji")
    pictures = folder / "fluent" / "package" / "assets"
    names = folder / "names" / "package"
    pictures.mkdir(parents=True)
    names.mkdir(parents=True)
    listed = (resources.files("smooth_rt.training") / "objects.txt").read_text(encoding="utf-8")
    records = []
    for index, line in enumerate(line for line in listed.splitlines() if line and not line.startswith("#")):
        short_name = line.split("=")[0].strip()
        code = f"{0x1F000 + index:x}"
        picture = Image.new("RGBA", (32, 32))
        colour = (37 * index % 256, 91 * index % 256, 53 * index % 256, 255)
        ImageDraw.Draw(picture).ellipse((2, 2, 29, 29), fill=colour)
        picture.save(pictures / f"{code}.webp", lossless=True)
        records.append({"short_name": short_name, "unified": code.upper(), "non_qualified": None})
    (names / "emoji.json").write_text(json.dumps(records), encoding="utf-8")
    return folder
