"""Read a single-file checkpoint in the layout of the original Stable Diffusion code, strictly.

It holds weights alone. The configs and the tokenizer are those that ship with the project, by what the weights are, or
those that the caller names.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from engines.paths import expanded
from smooth_rt.architecture import recognise, shipped_tokenizer
from smooth_rt.checkpoint import (
    CONFIG_FILES,
    HUB_ID,
    NAME_CONFIG,
    NETWORK_PARTS,
    UNUSED_PARTS,
    Parts,
    check_folder,
    download,
    open_safetensors,
    quiet,
)
from smooth_rt.errors import ModelError, reason
from smooth_rt.text_files import readable_folder

__all__ = ["predicts_noise", "read_file"]

log = logging.getLogger("smooth_rt")


def read_file(path: Path, config: str | Path | None = None) -> Parts:
    """The parts of a single-file checkpoint.

    Args:
        config: a diffusers folder of its architecture or a hub id, of which only the configs and the tokenizer are
            read. None: the shipped configs that fit the weights.

    Raises:
        ModelError: the file is no complete safetensors checkpoint, is of an architecture that does not ship, or does
            not fit `config`.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors checkpoints are loaded, pickles never; convert it first")
    if config is not None:
        open_safetensors(path)
        pipe = _load(path, _config_folder(str(config)), f"check that {config} is of its architecture")
        return _parts(pipe, dict(pipe.scheduler.config))

    found = recognise(path)
    # Where the file does not say, it is asked: the last of the folders is loaded, and the other where that was wrong.
    prediction = found.said or list(found.folders)[-1]
    folder = found.folders.get(prediction) or next(iter(found.folders.values()))
    pipe = _load_shipped(path, folder)
    if found.said is None and len(found.folders) > 1:
        prediction = "epsilon" if predicts_noise(pipe) else "v_prediction"
        if found.folders[prediction] != folder:
            folder = found.folders[prediction]
            del pipe
            pipe = _load_shipped(path, folder)
        log.info("%s: its UNet predicts %s, by what it makes of noise", path, prediction)
    log.info("%s: taken for %s", path, folder.name)
    return _parts(pipe, {**pipe.scheduler.config, "prediction_type": prediction})


@torch.no_grad()
def predicts_noise(pipe: Any) -> bool:
    """Whether a UNet predicts the noise; else it is the velocity.

    At the last timestep the latent is all but pure noise. What predicts the noise gives it back there; the velocity is
    then, up to its sign, the image, which has little to do with the noise.
    """
    unet, tokenizer = pipe.unet.float().eval(), pipe.tokenizer
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    text = pipe.text_encoder.float().eval()(ids)[0]
    side = 2 ** (len(unet.config.block_out_channels) + 1)  # small, and four pixels on the UNet's lowest level
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    made = unet(noise, pipe.scheduler.config.num_train_timesteps - 1, text).sample
    return float(torch.corrcoef(torch.stack([noise.flatten(), made.flatten()]))[0, 1]) > 0.5


def _load_shipped(path: Path, folder: Path) -> Any:
    tokenizer = shipped_tokenizer(folder)
    return _load(path, folder, f"name a complete checkpoint, or {NAME_CONFIG}", tokenizer=tokenizer)


def _load(path: Path, folder: Path, advice: str, **given: Any) -> Any:
    """The checkpoint as a diffusers pipeline, with the configs of `folder`; every weight is the file's."""
    with quiet():
        from diffusers import StableDiffusionPipeline

        try:
            with readable_folder(folder) as readable:
                pipe = StableDiffusionPipeline.from_single_file(
                    str(path), config=str(readable), local_files_only=True, **dict.fromkeys(UNUSED_PARTS[1:]), **given
                )
        except NotImplementedError as error:  # torch's word for moving a weight that was never filled
            raise ModelError(
                f"{path}: a weight of the UNet or the VAE is missing; name a complete checkpoint"
            ) from error
        except Exception as error:  # whatever the libraries make of it
            raise ModelError(
                f"{path}: not loaded as a Stable Diffusion checkpoint ({reason(error)}); {advice}"
            ) from error
    for name in NETWORK_PARTS:
        tensors = getattr(pipe, name).state_dict()
        unset = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
        if unset is not None:
            raise ModelError(f"{path}: holds no weight for {name}'s {unset}; name a complete checkpoint")
    return pipe


def _parts(pipe: Any, scheduler_config: dict[str, Any]) -> Parts:
    return Parts(pipe.tokenizer, {name: getattr(pipe, name) for name in NETWORK_PARTS}, scheduler_config)


def _config_folder(config: str) -> Path:
    """The folder that `config` names, checked; a hub id is downloaded, without its weights."""
    folder = expanded(config)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(config):
            raise ModelError(f"{config}: no such folder; as a checkpoint's config, name a diffusers folder or a hub id")
        folder = download(config, CONFIG_FILES, "name a diffusers folder as the checkpoint's config")
    check_folder(config, folder)
    return folder
