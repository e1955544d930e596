"""generate: images from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smooth_rt.commands.options import Prompts, RunOptions
from smooth_rt.commands.pictures import as_pictures, file_names, write_pictures
from smooth_rt.commands.running import generators, run
from smooth_rt.errors import InputError, reason
from smooth_rt.ranges import check_images, seeds_from

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["generate"]


def generate(
    options: RunOptions,
    prompt: Prompts = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    num_images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt.")] = 1,
    latents: Annotated[
        Path | None,
        typer.Option(
            help="Noise that `invert` wrote, in the place of --seed; ddim's samples back at --guidance-scale 1.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Images from prompts, as PNG."""
    if not prompt:
        raise InputError("--prompt: missing; give at least one")
    check_images("num_images_per_prompt", num_images_per_prompt, len(prompt), "prompts")
    seeds = seeds_from(options.seed, len(prompt) * num_images_per_prompt)
    names = file_names({"image": len(seeds)})
    start: dict[str, Any] = {"generator": generators(seeds)}
    if latents is not None:
        start = {"latents": _read_noise(latents, len(seeds))}
    result, told = run(
        options,
        "generate",
        options.num_inference_steps,
        lambda pipe, shared: pipe(
            prompt,
            guidance_scale=options.guidance,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            **start,
            **shared,
        ),
        names,
        [] if latents is None else [latents],
    )
    return {**told, "files": write_pictures(options.output, names, [as_pictures(result.images)])}


def _read_noise(path: Path, count: int) -> Tensor:
    """The tensor `latents` [count, C, h, w] of a safetensors file, as `invert` writes it; the model has C, h and w."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise InputError(f"--latents: {path}: {what}; name the noise.safetensors that invert wrote")
    try:
        found: Tensor | None = load_file(path).get("latents")
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"--latents: {path}: no safetensors file ({reason(error)}); name one that invert wrote"
        ) from error
    if found is None or found.dtype != torch.float32:
        raise InputError(f"--latents: {path}: holds no float32 tensor named latents; name one that invert wrote")
    if found.ndim != 4 or len(found) != count or found.numel() == 0:
        raise InputError(f"--latents: {path}: shape {list(found.shape)}; {count} images need [{count}, C, h, w]")
    if not torch.isfinite(found).all():
        raise InputError(f"--latents: {path}: holds NaN or infinite values; name one that invert wrote")
    return found
