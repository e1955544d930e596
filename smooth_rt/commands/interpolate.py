"""interpolate: frames between two images, two seeds or two prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands.methods import check_inverted, gradients_of, walks_of
from smooth_rt.commands.options import Method, Prompts, RunOptions
from smooth_rt.commands.pictures import as_pictures, file_names, write_pictures
from smooth_rt.commands.running import generators, need_attention, run
from smooth_rt.errors import InputError

__all__ = ["interpolate"]


def interpolate(
    options: RunOptions,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[A B]", help="Two images, the ends.", show_default=False)
    ] = None,
    prompt: Prompts = None,
    seeds: Annotated[
        tuple[int, int] | None, typer.Option(help="Two seeds in the place of two images.", show_default=False)
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames with both ends.")] = 24,
    method: Method = "ddim",
    adain: Annotated[
        bool, typer.Option("--adain", help="Adapt the statistics of each frame's latents to the ends'.")
    ] = False,
    reschedule: Annotated[
        str | None,
        typer.Option(
            help="pixels or lpips: sample again, so that neighbours lie equally far apart in that.",
            show_default=False,
        ),
    ] = None,
    reschedule_passes: Annotated[
        int | None, typer.Option(help="How often at most. Left out: 3.", show_default=False)
    ] = None,
    attention_blend: Annotated[
        bool,
        typer.Option("--attention-blend", help="Let each frame's attention look at both ends; takes --engine eager."),
    ] = False,
    fps: Annotated[int, typer.Option(help="Frames a second of the films.", min=1, max=120)] = 12,
) -> dict[str, Any]:
    """Frames between two images, two seeds or two prompts, as PNG, MP4 and animated WebP."""
    if not images and seeds is None and len(prompt or []) < 2:
        raise InputError("interpolate: what between? give two images, --seeds A B, or --prompt twice")
    if images and seeds is not None:
        named = ", ".join(map(str, images))
        raise InputError(f"--seeds: takes two values and no images, got {named} too; give the images or the seeds")
    if attention_blend:
        need_attention(options, "--attention-blend")
    if images:
        if len(images) != 2:
            raise InputError(f"images: {len(images)} ({', '.join(map(str, images))}); give the two ends")
        check_inverted(images, method, prompt)
    else:
        _check_ends(prompt)
    walks = walks_of(method)
    if reschedule is None and reschedule_passes is not None:
        raise InputError(f"--reschedule-passes={reschedule_passes}: takes --reschedule pixels or lpips; add it")
    from smooth_rt.tasks.interpolate import PASSES

    passes = 0 if reschedule is None else reschedule_passes or PASSES
    names = file_names({"frame": frames}, film="morph")
    noise: Any = None if images else generators(seeds) if seeds is not None else generators((options.seed,))[0]
    result, told = run(
        options,
        "interpolate",
        options.num_inference_steps * ((walks if images else 1) + passes),
        lambda pipe, shared: pipe.interpolate(
            prompt,
            images or None,
            frames=frames,
            method=method,
            generator=noise,
            guidance_scale=options.guidance_scale,
            adain=adain,
            reschedule=reschedule,
            reschedule_passes=reschedule_passes,
            attention_blend=attention_blend,
            **shared,
        ),
        names,
        images or (),
        gradients_of(method, options.guidance_scale) if images else (),
    )
    import numpy as np

    from smooth_rt.metrics import istd
    from smooth_rt.writers import encode_mp4, encode_webp, there_and_back

    made = as_pictures(result.images)
    films = [encode_mp4(made, fps), encode_webp(there_and_back(made), fps)]
    files = write_pictures(options.output, names, [made], films)
    smooth = istd([np.stack([np.asarray(image) for image in made])])
    found = {"istd": smooth.istd, "mean_step": smooth.mean_step, "distances": list(smooth.distances[0])}
    return {**told, **found, "files": files}


def _check_ends(prompts: Sequence[str] | None) -> None:
    if not prompts:
        raise InputError("--prompt: missing; give one for both ends, or one each")
    from smooth_rt.tasks.checks import one_each

    one_each(prompts, 2, "prompts", "ends")
