"""The default model's folder as it ships, from what its training left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from smooth_rt.errors import InputError
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.showcase import evaluation_prompts, write_examples
from smooth_rt.training.tiny_networks import pipeline

__all__ = ["need", "write_assets"]


def need(path: Path, stage: str) -> Path:
    """`path`, which a stage makes.

    Raises:
        InputError: it is not there.
    """
    if not path.exists():
        raise InputError(f"{path}: missing; run the stage {stage!r} first")
    return path


def write_assets(out: Path, model: Path, scenes: EmojiScenes) -> None:
    """Write `out/assets`: the trained networks under `model` as fp16, example images and evaluation prompts.

    Raises:
        InputError: a stage has not been run.
    """
    for name, stage in (("vae", "vae"), ("unet", "unet"), ("text_encoder", "unet"), ("tokenizer", "tokenizer")):
        need(model / name, stage)
    pipe = pipeline(
        AutoencoderKL.from_pretrained(model / "vae"),
        UNet2DConditionModel.from_pretrained(model / "unet"),
        CLIPTextModel.from_pretrained(model / "text_encoder"),
        CLIPTokenizer.from_pretrained(model / "tokenizer"),
    )
    partial = out / "assets.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(partial / "model", safe_serialization=True)
    # transformers loads a text encoder in the type its configuration names, diffusers loads the rest in float32: with
    # float16 there, StableDiffusionPipeline.from_pretrained(folder) would mix the two and fail.
    text_config = partial / "model" / "text_encoder" / "config.json"
    text_config.write_text(text_config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    # diffusers notes where it loaded a network from; that folder means nothing to anyone else.
    for path in (partial / "model").glob("*/config.json"):
        path.write_text(re.sub(r'\n *"_name_or_path": .*', "", path.read_text()))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(model / "tokenizer" / name, partial / "model" / "tokenizer" / name)
    for stage in ("attributes", "reference"):
        shutil.copyfile(need(out / f"{stage}.safetensors", stage), partial / f"{stage}.safetensors")
    write_examples(scenes, partial / "examples")
    (partial / "prompts.txt").write_text("\n".join(evaluation_prompts(scenes)) + "\n", encoding="utf-8")
    shutil.rmtree(out / "assets", ignore_errors=True)
    partial.rename(out / "assets")
