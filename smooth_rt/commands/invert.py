"""invert: images into noise and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands.methods import check_inverted, gradients_of, walks_of
from smooth_rt.commands.options import Prompts, RunOptions
from smooth_rt.commands.pictures import as_pictures, as_seen, file_names, write_pictures
from smooth_rt.commands.running import run
from smooth_rt.errors import InputError
from smooth_rt.ranges import INVERSION_METHODS, choice

__all__ = ["invert"]


def invert(
    options: RunOptions,
    context: typer.Context,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One or more images.", show_default=False)],
    prompt: Prompts = None,
    method: Annotated[
        str, typer.Option(help="As of `interpolate`; or auto: method and steps by --budget, from a measured table.")
    ] = "ddim",
    budget: Annotated[
        int | None,
        typer.Option(
            help="For auto: evaluations of the UNet an image, there and back; of gradients, on average.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Turn images into noise and back: reconstructions as PNG, the noise and what else leads back as safetensors."""
    picked = None
    method = choice("method", method, (*INVERSION_METHODS, "auto"))
    if method == "auto":
        from smooth_rt.tasks.inversion import choose

        given = context.get_parameter_source("num_inference_steps")
        if given is not None and given.name == "COMMANDLINE":
            raise InputError(
                f"--num-inference-steps={options.num_inference_steps}: --method auto picks the steps, by --budget; "
                "leave it out, or name a method"
            )
        picked = choose(budget, options.guidance_scale)
        method = picked.method
        options = replace(options, num_inference_steps=picked.num_inference_steps)
    elif budget is not None:
        raise InputError(f"--budget: it is for --method auto, which picks by it; leave it out with {method}")
    check_inverted(images, method, prompt)
    names = [*file_names({"original": len(images), "reconstruction": len(images)}), "noise.safetensors"]
    result, told = run(
        options,
        "invert",
        walks_of(method) * options.num_inference_steps,
        lambda pipe, shared: pipe.invert(
            images, prompt, method=method, guidance_scale=options.guidance_scale, **shared
        ),
        names,
        images,
        gradients_of(method, options.guidance_scale),
    )
    import numpy as np
    from safetensors.torch import save

    from smooth_rt.metrics import psnr

    made = as_pictures(result.images)
    originals = as_seen(images, made[0])
    quality = [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(originals, made, strict=True)]
    held = {
        "latents": result.latents, "companion": result.companion, "corrections": result.corrections,
        "negative_prompt_embeds": result.negative_prompt_embeds if result.negative_prompt_embeds.ndim == 4 else None,
    }  # fmt: skip
    noise = save({name: tensor.contiguous() for name, tensor in held.items() if tensor is not None})
    files = write_pictures(options.output, names, [originals, made], [noise])
    chosen = {"method": method} if picked is None else {"method": method, "chosen": picked.reason}
    return {**told, **chosen, "psnr": quality, "files": files}
