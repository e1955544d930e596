"""edit: images under another prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands.methods import gradients_of, walks_of
from smooth_rt.commands.options import Method, Prompts, RunOptions
from smooth_rt.commands.pictures import as_pictures, as_seen, check_readable, file_names, write_pictures
from smooth_rt.commands.running import generators, run
from smooth_rt.errors import InputError
from smooth_rt.ranges import seeds_from

__all__ = ["edit"]

MOST_SHOWN = 10**6  # steps of a progress bar; a number that no float holds is refused by the schedule


def edit(
    options: RunOptions,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One or more images.", show_default=False)],
    prompt: Prompts = None,
    source_prompt: Annotated[
        list[str] | None, typer.Option(help="What the image shows now; eq15 needs it.", show_default=False)
    ] = None,
    edit_method: Annotated[str, typer.Option(help="eq15 or sdedit.")] = "eq15",
    edit_strength: Annotated[float, typer.Option(help="0..1: share of the steps under the new prompt.")] = 0.8,
    method: Method = "negative-prompt",
) -> dict[str, Any]:
    """Edit images by prompt, as PNG."""
    if not prompt:
        raise InputError("--prompt: missing; give what the image shall show")
    _check_count("--prompt", prompt, images)
    if edit_method == "eq15" and not source_prompt:
        raise InputError("--source-prompt: missing; eq15 needs what each image shows now")
    _check_count("--source-prompt", source_prompt, images)
    walks = walks_of(method)
    names = file_names({"before": len(images), "after": len(images)})
    targets, noise = prompt, generators(seeds_from(options.seed, len(images)))
    check_readable(images)
    steps = options.num_inference_steps
    result, told = run(
        options,
        "edit",
        int(min(steps, MOST_SHOWN) * edit_strength) if edit_method == "sdedit" else walks * steps,
        lambda pipe, shared: pipe.edit(
            images,
            targets,
            source_prompt,
            edit_method=edit_method,
            edit_strength=edit_strength,
            method=method,
            guidance_scale=options.guidance,
            generator=noise,
            **shared,
        ),
        names,
        images,
        () if edit_method == "sdedit" else gradients_of(method, options.guidance),
    )
    made = as_pictures(result.images)
    originals = as_seen(images, made[0])
    return {**told, "files": write_pictures(options.output, names, [originals, made])}


def _check_count(option: str, given: Sequence[str] | None, images: Sequence[Path]) -> None:
    if given and len(given) not in (1, len(images)):
        raise InputError(f"{option}: {len(given)} for {len(images)} images; give one for all or one each")
