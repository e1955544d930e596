"""The default size of an image, read from the networks' configs as diffusers' StableDiffusionPipeline reads it."""

from __future__ import annotations

from typing import Any

from packaging.version import InvalidVersion, Version

from smooth_rt.errors import ModelError
from smooth_rt.ranges import as_whole, shown

__all__ = ["correct_sample_size", "latent_size"]

# Early conversions of Stable Diffusion 1.x state 32, of a model that was trained at 64: 512 pixels.
MISSTATED_BEFORE = Version("0.9.0.dev0")
LEAST = 64


def correct_sample_size(source: str, unet: Any) -> None:
    """Correct a UNet's `sample_size` in place, as diffusers' StableDiffusionPipeline does.

    In a config that diffusers older than 0.9 wrote, a whole number below 64 becomes 64.

    Args:
        source: the model's name in messages.
        unet: diffusers' UNet2DConditionModel.

    Raises:
        ModelError: the size is below 64, and the diffusers version beside it is no version.
    """
    config = unet.config
    size = config.sample_size
    if not isinstance(size, int) or size >= LEAST or not hasattr(config, "_diffusers_version"):
        return
    written_by = config._diffusers_version
    try:
        # The base version of 0.9.0.dev0 is 0.9.0, which is not corrected.
        outdated = Version(Version(written_by).base_version) < MISSTATED_BEFORE
    except (InvalidVersion, TypeError) as error:
        raise ModelError(
            f"{source}: unet/config.json: _diffusers_version is {shown(written_by)}; give the version of diffusers "
            "that wrote it, or leave it out"
        ) from error
    if outdated:
        unet.register_to_config(sample_size=LEAST)


def latent_size(source: str, unet: Any, vae: Any, vae_factor: int) -> tuple[int, int]:
    """Return height and width, in latent cells, of the images that a model was trained at.

    Args:
        source: the model's name in messages.
        unet: the UNet's config, corrected; its `sample_size` is one number or a pair.
        vae: the VAE's config, whose `sample_size` in pixels is taken where the UNet states none.
        vae_factor: pixels per latent cell, on each side.

    Raises:
        ModelError: the size is neither a number of cells nor a pair of them, or is not stated.
    """
    part, unit, stated = "unet", 1, unet.sample_size
    if not stated:
        part, unit, stated = "vae", vae_factor, vae.sample_size
    sides = stated if isinstance(stated, (list, tuple)) else (stated, stated)
    cells = [0 if (side := as_whole(one)) is None else side // unit for one in sides]
    if len(cells) != 2 or min(cells) < 1:
        raise ModelError(
            f"{source}: {part}/config.json: sample_size is {shown(stated)}; give one number, or height and width"
        )
    return cells[0], cells[1]
