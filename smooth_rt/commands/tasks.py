"""generate, interpolate, invert, edit: each computes with one call of the pipeline and writes its files at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from smooth_rt.commands.options import RunOptions
from smooth_rt.commands.running import generators, need_attention, run
from smooth_rt.errors import InputError, reason
from smooth_rt.ranges import check_images, seeds_from

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from smooth_rt.images import Images

__all__ = ["edit", "generate", "interpolate", "invert"]

MOST_SHOWN = 10**6  # steps of a progress bar; a number that no float holds is refused by the schedule

Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="May be given several times.", show_default=False)]
Method = Annotated[
    str,
    typer.Option(
        help="How images are inverted: ddim, ddim-without-text, negative-prompt, null-text, direct, fixed-point, "
        "spdinv, easyinv, edict or belm. For null-text and spdinv gradients are built, once."
    ),
]


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
    names = _names({"image": len(seeds)})
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
    return {**told, "files": _write(options.output, names, [_pictures(result.images)])}


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
            raise InputError(f"images: {len(images)}; give the two ends")
        _check_images(images, method, prompt)
    else:
        _check_ends(prompt)
    walks = _walks(method)
    if reschedule is None and reschedule_passes is not None:
        raise InputError(f"--reschedule-passes={reschedule_passes}: takes --reschedule pixels or lpips; add it")
    from smooth_rt.tasks.interpolate import PASSES

    passes = 0 if reschedule is None else reschedule_passes or PASSES
    names = _names({"frame": frames}, film="morph")
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
        _gradients(method, options.guidance_scale) if images else (),
    )
    import numpy as np

    from smooth_rt.metrics import istd
    from smooth_rt.writers import encode_mp4, encode_webp, there_and_back

    made = _pictures(result.images)
    films = [encode_mp4(made, fps), encode_webp(there_and_back(made), fps)]
    files = _write(options.output, names, [made], films)
    smooth = istd([np.stack([np.asarray(image) for image in made])])
    found = {"istd": smooth.istd, "mean_step": smooth.mean_step, "distances": list(smooth.distances[0])}
    return {**told, **found, "files": files}


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
    _check_images(images, method, prompt)
    names = [*_names({"original": len(images), "reconstruction": len(images)}), "noise.safetensors"]
    result, told = run(
        options,
        "invert",
        _walks(method) * options.num_inference_steps,
        lambda pipe, shared: pipe.invert(
            images, prompt, method=method, guidance_scale=options.guidance_scale, **shared
        ),
        names,
        images,
        _gradients(method, options.guidance_scale),
    )
    import numpy as np
    from safetensors.torch import save

    from smooth_rt.metrics import psnr

    made = _pictures(result.images)
    originals = _originals(images, made[0])
    quality = [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(originals, made, strict=True)]
    held = {
        "latents": result.latents, "companion": result.companion, "corrections": result.corrections,
        "negative_prompt_embeds": result.negative_prompt_embeds if result.negative_prompt_embeds.ndim == 4 else None,
    }  # fmt: skip
    noise = save({name: tensor.contiguous() for name, tensor in held.items() if tensor is not None})
    files = _write(options.output, names, [originals, made], [noise])
    chosen = {"method": method} if picked is None else {"method": method, "chosen": picked.reason}
    return {**told, **chosen, "psnr": quality, "files": files}


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
    walks = _walks(method)
    names = _names({"before": len(images), "after": len(images)})
    targets, noise = prompt, generators(seeds_from(options.seed, len(images)))
    _check_readable(images)
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
        () if edit_method == "sdedit" else _gradients(method, options.guidance),
    )
    made = _pictures(result.images)
    originals = _originals(images, made[0])
    return {**told, "files": _write(options.output, names, [originals, made])}


def _walks(method: str) -> int:
    """How often a method goes through all steps, there and back."""
    from smooth_rt.ranges import choice
    from smooth_rt.tasks.inversion import METHODS

    return METHODS[choice("method", method, tuple(METHODS))].walks


def _gradients(method: str, guidance_scale: float | None) -> tuple[str, ...]:
    """Those that a method takes."""
    from smooth_rt.ranges import choice
    from smooth_rt.tasks.inversion import METHODS

    return METHODS[choice("method", method, tuple(METHODS))].gradients(guidance_scale)


def _check_ends(prompts: Sequence[str] | None) -> None:
    if not prompts:
        raise InputError("--prompt: missing; give one for both ends, or one each")
    from smooth_rt.tasks.checks import one_each

    one_each(prompts, 2, "prompts", "ends")


def _read_noise(path: Path, count: int) -> Tensor:
    """The tensor `latents` [count, C, h, w] of a safetensors file, as `invert` writes it; the model has C, h and w."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"--latents: {path}: no such file; name the noise.safetensors that invert wrote")
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


def _check_images(images: Sequence[Path], method: str, prompts: Sequence[str] | None) -> None:
    """Refuse what cannot be inverted before an engine is built or opened."""
    from smooth_rt.tasks.inversion import source_texts

    source_texts(method, prompts, len(images))
    _check_readable(images)


def _check_readable(images: Sequence[Path]) -> None:
    from smooth_rt.images import read

    for path in images:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; name an image")
        read(path, 8, 8)


def _check_count(option: str, given: Sequence[str] | None, images: Sequence[Path]) -> None:
    if given and len(given) not in (1, len(images)):
        raise InputError(f"{option}: {len(given)} for {len(images)} images; give one for all or one each")


def _pictures(images: Images) -> list[Image]:
    """The images of a result, of which the commands ask as PIL images."""
    return cast("list[Image]", images)


def _originals(paths: Sequence[Path], like: Image) -> list[Image]:
    """The images as the networks saw them: scaled and cropped to the size of the results."""
    from smooth_rt.images import read, to_images

    return _pictures(to_images(read(list(paths), like.height, like.width), "pil"))


def _names(groups: dict[str, int], film: str | None = None) -> list[str]:
    """The files that a command writes: so many images of each group, the sheet, the film; known beforehand."""
    numbered = [f"{name}-{i:03d}.png" for name, count in groups.items() for i in range(1, count + 1)]
    return [*numbered, "sheet.png", *([] if film is None else [f"{film}.mp4", f"{film}.webp"])]


def _write(
    folder: Path, names: Sequence[str], groups: Sequence[Sequence[Image]], more: Sequence[bytes] = ()
) -> list[str]:
    """Each image as PNG, all of them on one sheet (a group a row where there are several), and what else there is."""
    from smooth_rt.writers import contact_sheet, encode_png, write_files

    pictures = [image for images in groups for image in images]
    sheet = contact_sheet(pictures, len(groups[0]) if len(groups) > 1 else None)
    files = dict(zip(names, [*map(encode_png, [*pictures, sheet]), *more], strict=True))
    return [str(path) for path in write_files(folder, files)]
