"""train tiny, train smooth-lora: both resumable; whatever stops them, the state is saved first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from smooth_rt.commands.options import listed
from smooth_rt.ranges import choice

if TYPE_CHECKING:
    from engines.contract import Dims
    from smooth_rt.training.settings import Precision

__all__ = ["smooth_lora", "tiny"]

WATCHED = 8  # prompts of a look: 88 samplings by default

Output = Annotated[Path, typer.Option(help="Folder of the run: checkpoints, log, result.", show_default=False)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that the folder holds; steps and rates may differ.")
]
Seed = Annotated[int, typer.Option(help="Decides weights, pictures and noise.")]


def tiny(
    output: Output,
    data: Annotated[Path, typer.Option(help="Where the emoji are, or are fetched to by npm.", show_default=False)],
    stages: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "tokenizer,vae,latents,unet,attributes,reference,scenes,assets",
    vae_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = 3000,
    unet_steps: Annotated[int, typer.Option(help="Steps of the UNet and text encoder.")] = 20000,
    attribute_steps: Annotated[int, typer.Option(help="Steps of the classifier that judges pictures.")] = 3000,
    vae_lr: Annotated[float, typer.Option(help="AdamW's rate for the autoencoder.")] = 1e-3,
    unet_lr: Annotated[float, typer.Option(help="AdamW's rate for the UNet and text encoder.")] = 8e-4,
    resume: Resume = False,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
) -> dict[str, Any]:
    """Train the default model from nothing."""
    from smooth_rt.training.tiny import train_tiny
    from smooth_rt.training.tiny_networks import TinyConfig
    from smooth_rt.writers import check_output

    check_output(output)
    check_output(data)
    chosen = tuple(listed(stages))
    config = TinyConfig(seed=seed, vae_lr=vae_lr, unet_lr=unet_lr)
    written = train_tiny(output, data, chosen, vae_steps, unet_steps, resume, config, device, attribute_steps)
    return {"command": "train tiny", "output": str(written)}


def smooth_lora(
    output: Output,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of images with metadata.jsonl (file_name, text) or a .txt beside each; WebDataset shards, "
            "as 'data-{000..012}.tar'; a Hugging Face dataset; or what `train tiny` fetched.",
            show_default=False,
        ),
    ],
    cache: Annotated[
        Path | None, typer.Option(help="Keep latents and text embeddings here, encoded once.", show_default=False)
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels a side; left out: those of the model's own size.", show_default=False)
    ] = None,
    crop: Annotated[str, typer.Option(help="centre, or buckets: of several aspects.")] = "centre",
    split: Annotated[str, typer.Option(help="Of a Hugging Face dataset.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Of it; left out: guessed.", show_default=False)] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of it; left out: guessed.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="As for the other commands.")] = "default",
    model_config: Annotated[str | None, typer.Option(help="As for the other commands.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 30000,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all devices.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Parts of a step, one after the other: less memory.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice: less memory.")
    ] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16, or fp16 (on a GPU).")] = "no",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    lr: Annotated[float, typer.Option(help="AdamW's rate.")] = 1e-4,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 8,
    lora_alpha: Annotated[
        float | None, typer.Option(help="The rank if left out: a scale of 1.", show_default=False)
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="Comma-separated: how the names of the layers end that get a LoRA.")
    ] = "to_q,to_k,to_v,to_out.0",
    format: Annotated[str, typer.Option(help="diffusers, or attn-procs: the authors' keys.")] = "diffusers",
    reg_weight: Annotated[float, typer.Option(help="The paper's lambda.")] = 1.0,
    reg_every: Annotated[int, typer.Option(help="One step in so many bears the penalty, so many times as heavy.")] = 1,
    reg_guidance: Annotated[float, typer.Option(help="Guidance of the regularised prediction; 1: none.")] = 1.0,
    reg_gradient: Annotated[
        str, typer.Option(help="exact (double backward), or difference: first-order gradients alone.")
    ] = "exact",
    svr_target: Annotated[str, typer.Option(help="scalar (the paper's), per-timestep or anchored.")] = "scalar",
    svr_share: Annotated[float, typer.Option(help="Share of the model's own variation that anchored asks for.")] = 1.0,
    path_weight: Annotated[float, typer.Option(help="Of uneven steps on sampled paths; 0: none are sampled.")] = 0.0,
    path_end_weight: Annotated[float, typer.Option(help="Of the ends of a path, within that.")] = 4.0,
    path_share: Annotated[float, typer.Option(help="Share of the model's own steps that a path is asked for.")] = 1.0,
    path_steps: Annotated[int, typer.Option(help="DDIM steps of a path's samplings.")] = 18,
    path_window: Annotated[int, typer.Option(help="How many of these are trained at a time.")] = 3,
    path_points: Annotated[
        int,
        typer.Option(help="Noises of a path, 2 to 11: 11 lead all the way to an independent one, a tenth of it each."),
    ] = 6,
    path_guidance: Annotated[float, typer.Option(help="Their guidance.")] = 7.5,
    paths_per_step: Annotated[int, typer.Option(help="Paths a training step.")] = 2,
    drop_prompt: Annotated[float, typer.Option(help="Share of empty prompts.")] = 0.0,
    save_every: Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint.")] = 200,
    keep: Annotated[int, typer.Option(help="Checkpoints that stay, the newest.")] = 2,
    watch_every: Annotated[
        int, typer.Option(help="Steps from look to look, each ISTD on a few prompts and a morph strip; 0: none.")
    ] = 0,
    watch_prompts: Annotated[
        Path | None,
        typer.Option(help="For the looks, one prompt a line. Left out: 8 of the model's.", show_default=False),
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="Comma-separated trackers that accelerate knows, as tensorboard.", show_default=False)
    ] = "",
    resume: Resume = False,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Train a Smooth-LoRA: Step-wise Variation Regularization, and the same of whole paths."""
    from smooth_rt.writers import check_output

    check_output(output)
    from dataclasses import asdict

    from smooth_rt.errors import InputError
    from smooth_rt.evaluation import read_prompts
    from smooth_rt.lora import LoraFormat
    from smooth_rt.model import load_model
    from smooth_rt.training.pictures import Reading, open_pictures
    from smooth_rt.training.settings import check_count, check_steps
    from smooth_rt.training.smooth_lora import train_smooth_lora
    from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
    from smooth_rt.training.watch import Watch
    from smooth_rt.training.world import launched

    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(f"cache={str(cache)!r}: not a folder; name one")
    check_steps("steps", steps)
    check_count("save_every", save_every)
    check_count("keep", keep)
    layout = cast("LoraFormat", choice("format", format, get_args(LoraFormat)))
    config = SmoothLoraConfig(
        seed=seed,
        rank=rank,
        lora_alpha=lora_alpha,
        target_modules=tuple(listed(target_modules)),
        batch_size=batch_size,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=cast("Precision", mixed_precision),
        lr=lr,
        reg_weight=reg_weight,
        reg_every=reg_every,
        reg_guidance=reg_guidance,
        reg_gradient=reg_gradient,
        svr_target=svr_target,
        svr_share=svr_share,
        drop_prompt=drop_prompt,
        path_weight=path_weight,
        path_end_weight=path_end_weight,
        path_share=path_share,
        path_steps=path_steps,
        path_window=path_window,
        path_points=path_points,
        path_guidance=path_guidance,
        paths_per_step=paths_per_step,
    )
    if watch_every < 0:
        raise InputError(f"watch_every={watch_every}: give a whole number of at least 0")
    prompts = read_prompts(watch_prompts)[:WATCHED] if watch_every else []
    trackers = listed(report_to)
    world = launched(output, config.mixed_precision, device, trackers, asdict(config))
    loaded = load_model(model, config=model_config)
    multiple = loaded.dims.image_multiple
    if resolution is not None and (resolution < multiple or resolution % multiple):
        raise InputError(f"resolution={resolution}: give a multiple of {multiple}")
    reading = Reading(
        resolution or _square_side(loaded.dims),
        seed,
        crop,
        batch_size // accumulate,
        multiple,
        split,
        image_column,
        caption_column,
    )
    pictures = open_pictures(data, reading)
    written = train_smooth_lora(
        loaded,
        pictures,
        output,
        steps,
        resume,
        config,
        every=[(watch_every, Watch(loaded, output, prompts, world))] if watch_every else [],
        format=layout,
        save_every=save_every,
        keep=keep,
        world=world,
        cache=cache,
    )
    skipped = dict(sorted({k: v for part in world.gather([dict(pictures.skipped)]) for k, v in part.items()}.items()))
    world.close()
    if not world.main:  # one speaks for all
        return {}
    result: dict[str, Any] = {"command": "train smooth-lora", "output": str(written)}
    if skipped:
        result |= {"skipped": len(skipped), "first_skipped": [f"{k}: {v}" for k, v in list(skipped.items())[:5]]}
    return result


def _square_side(dims: Dims) -> int:
    """Return the side, in pixels, of the square that has about as many pixels as the model's own size."""
    unit = dims.image_multiple
    return max(1, math.isqrt(math.prod(dims.image_size)) // unit) * unit
