"""evaluate istd, inversion, editing, quality: a model with and without its LoRA in numbers: tables, JSON, a plot.

What is measured is kept row by row under `--output`/rows, so that a command that was stopped goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smooth_rt.commands.measuring import check_file, finish, measured
from smooth_rt.commands.options import RunOptions, listed
from smooth_rt.commands.progress import item_progress
from smooth_rt.commands.running import open_pipeline
from smooth_rt.errors import InputError

if TYPE_CHECKING:
    from smooth_rt.metrics.frechet import Gaussian
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["editing", "inversion", "istd", "quality"]

Prompts = Annotated[
    Path | None, typer.Option(help="One prompt a line. Left out: those of the default model.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(help="Only so many of the prompts.", min=1, show_default=False)]
# Of an image's inversion, beside its distances:
TOOK = ("latent_mse", "noise_std", "evaluations", "gradient_evaluations", "seconds")
Processes = Annotated[int, typer.Option(help="Share the work; the results are the same.", min=1, max=256)]


def istd(
    options: RunOptions,
    prompts: Prompts = None,
    limit: Limit = None,
    frames: Annotated[
        int, typer.Option(help="Images a prompt, with both ends; at most 10000 over the prompts of a batch.")
    ] = 11,
    pairs: Annotated[int, typer.Option(help="Pairs of noises a prompt.")] = 1,
    pixel_range: Annotated[float, typer.Option(help="Pixels are measured in 0 to this; the paper does not say.")] = 255,
    ddof: Annotated[int, typer.Option(help="Of the standard deviation; the paper does not say.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Prompts sampled together.")] = 4,
    processes: Processes = 1,
) -> dict[str, Any]:
    """ISTD, mean step and diversity over prompts, without and with the LoRA, from the same noises."""
    from smooth_rt.evaluation import IstdTask, read_prompts, summarise_istd
    from smooth_rt.evaluation.tables import distances_plot, said_interval
    from smooth_rt.metrics import ratio_interval

    if not 0 < pixel_range <= 1e9:
        raise InputError(f"pixel_range={pixel_range}: give a number above 0, such as 255")
    if frames - 1 <= ddof:
        raise InputError(f"ddof={ddof}: give less than the steps between {frames} frames")
    texts = read_prompts(prompts)[:limit]
    task = IstdTask(
        tuple(texts), frames, pairs, options.seed, options.num_inference_steps, options.guidance, options.height,
        options.width, batch, pixel_range,
    )  # fmt: skip
    check_file(options, "istd", [] if prompts is None else [prompts])
    rows: list[dict[str, Any]] = []
    distances = {}
    for variant, found, told, _ in measured(options, "istd", task, processes):
        summary = summarise_istd(found, ddof)
        distances[variant] = summary.istd.distances
        rows.append(
            {
                "variant": variant,
                **told,
                "istd": summary.istd.istd,
                "mean_step": summary.istd.mean_step,
                "istd_over_mean_step": summary.istd.istd_over_mean_step,
                "diversity": summary.diversity,
                "per_prompt": list(summary.istd.per_prompt),
            }
        )
    setup: dict[str, Any] = {"command": "evaluate istd", "prompts": len(texts), "pairs": pairs, "frames": frames}
    setup |= {"steps": options.num_inference_steps, "seed": options.seed}
    notes = []
    if len(rows) > 1:
        base, smooth = rows
        keys = ("istd", "mean_step", "istd_over_mean_step", "diversity")
        setup["smooth_over_base"] = {key: smooth[key] / base[key] if base[key] else None for key in keys}
        setup["istd_95_percent"] = ratio_interval(base["per_prompt"], smooth["per_prompt"])
        ratio = setup["smooth_over_base"]["istd"] or float("nan")
        notes = [f"ISTD, smooth over base: {ratio:.3f} ({said_interval(setup['istd_95_percent'], 'prompts')})."]
    columns = {
        "variant": "model", "istd": "ISTD", "mean_step": "mean step", "istd_over_mean_step": "ISTD / mean step",
        "diversity": "diversity",
    }  # fmt: skip
    plot = distances_plot(distances).encode()
    return finish(options, "istd", setup, rows, columns, notes, {"istd.svg": plot})


def inversion(
    options: RunOptions,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images with metadata.jsonl (file_name, text) or a .txt beside each. "
            "Left out: those that ship.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option("--method", help="Comma-separated, of those that `invert --help` names; or all."),
    ] = "ddim",
    limit: Annotated[int | None, typer.Option(help="Only so many of the images.", min=1, show_default=False)] = None,
    batch: Annotated[int, typer.Option(help="Images inverted together.")] = 16,
    processes: Processes = 1,
) -> dict[str, Any]:
    """How near images come to themselves after inversion and sampling back, without and with the LoRA."""
    from smooth_rt.evaluation import InversionTask, captioned, examples
    from smooth_rt.evaluation.tables import inversion_plot
    from smooth_rt.ranges import choice
    from smooth_rt.tasks.inversion import METHODS

    named = listed(methods)
    asked = list(METHODS) if "all" in named else [choice("method", name, tuple(METHODS)) for name in named]
    if not asked:
        raise InputError(f"method={methods!r}: names none; name at least one, or all")
    images = (examples() if data is None else captioned(data))[:limit]
    check_file(options, "inversion", [example.path for example in images])
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    for name in asked:
        task = InversionTask(
            tuple(images), name, options.num_inference_steps, options.guidance_scale, options.height, options.width,
            batch,
        )  # fmt: skip
        scale = METHODS[name].guidance_scale if options.guidance_scale is None else options.guidance_scale
        for variant, found, told, _ in measured(options, "inversion", task, processes, METHODS[name].gradients(scale)):
            if not rows:
                nothing = dict.fromkeys(TOOK, "")
                first = {"variant": "VAE bound", "method": "", "guidance_scale": ""}
                rows.append({**first, **told, **_means(found, "bound"), **nothing})
            took = {key: statistics.fmean(row[key] for row in found) for key in TOOK}
            asked_for = {"variant": variant, "method": name, "guidance_scale": scale}
            rows.append({**asked_for, **told, **_means(found, "rebuilt"), **took})
            notes |= dict.fromkeys(
                f"LPIPS is not measured: {row['rebuilt']['lpips_missing']}"
                for row in found
                if row["rebuilt"]["lpips_missing"]
            )
    if any(row.get("gradient_evaluations") for row in rows):
        notes["In the plot a gradient counts as three evaluations: a forward pass and one back."] = None
    if "direct" in asked:
        notes["direct steers back to stored latents: its figure is the VAE's bound, and says nothing of its noise."] = (
            None
        )
    setup = {"images": len(images), "method": asked[0] if len(asked) == 1 else asked}
    setup = {"command": "evaluate inversion", **setup, "steps": options.num_inference_steps}
    columns = {
        "variant": "model", "method": "method", "guidance_scale": "guidance", "mse": "MSE", "lpips": "LPIPS",
        "ssim": "SSIM", "psnr": "PSNR", "latent_mse": "latent MSE", "noise_std": "noise's deviation",
        "evaluations": "evaluations", "gradient_evaluations": "gradients", "seconds": "s an image",
    }  # fmt: skip
    plot = inversion_plot(rows).encode()
    return finish(options, "inversion", setup, rows, columns, list(notes), {"inversion.svg": plot})


def editing(
    options: RunOptions,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images with metadata.jsonl (file_name, text, target, mask). Left out: those that ship.",
            show_default=False,
        ),
    ] = None,
    edit_methods: Annotated[str, typer.Option(help="Comma-separated.")] = "eq15,sdedit",
    edit_strengths: Annotated[str, typer.Option(help="Comma-separated, 0 to 1.")] = "0.4,0.6,0.8",
    batch: Annotated[int, typer.Option(help="Images edited together.")] = 16,
    processes: Processes = 1,
) -> dict[str, Any]:
    """What editing by prompt keeps outside the object, and whether the edit happened, without and with the LoRA."""
    from smooth_rt.evaluation import EditingTask, edit_cases, summarise_editing
    from smooth_rt.metrics.attributes import load_attributes

    try:
        strengths = [float(strength) for strength in listed(edit_strengths, "edit_strengths")]
    except ValueError as error:
        raise InputError(f"edit_strengths={edit_strengths!r}: give numbers from 0 to 1, as 0.4,0.8") from error
    methods = listed(edit_methods, "edit_methods")
    cases = edit_cases(data)
    attributes = load_attributes() if options.model == "default" and options.engines is None else None
    tasks = [
        EditingTask(
            tuple(cases), attributes, method, strength, options.seed, options.num_inference_steps, options.guidance,
            options.height, options.width, batch,
        )
        for method in methods
        for strength in strengths
    ]  # fmt: skip
    check_file(options, "editing", [path for case in cases for path in (case.path, case.mask)])
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for variant, found, told, _ in measured(options, "editing", task, processes):
            asked = {"variant": variant, "method": task.edit_method, "strength": task.edit_strength}
            rows.append({**asked, **told, **summarise_editing(found)})
    columns = {
        "variant": "model", "method": "method", "strength": "strength", "psnr": "PSNR outside the mask",
        "ssim": "SSIM outside the mask", "happened": "shows the target", "kept": "keeps the background",
    }  # fmt: skip
    notes = (
        [] if attributes else ["What is shown is not measured: the classifier knows the default model's data alone."]
    )
    setup = {"command": "evaluate editing", "images": len(cases), "steps": options.num_inference_steps}
    return finish(options, "editing", setup, rows, columns, notes)


def quality(
    options: RunOptions,
    prompts: Prompts = None,
    images: Annotated[
        int, typer.Option(help="In all, two of independent noises at a time, over the prompts in turn.", min=2)
    ] = 512,
    reference: Annotated[
        Path | None,
        typer.Option(help="A folder of real images. Left out: the default model's own data.", show_default=False),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="For the CLIP score: a model in the Hugging Face cache, or its folder. "
            "Left out: openai/clip-vit-large-patch14, if it is there.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pairs of images sampled together.")] = 16,
    processes: Processes = 1,
) -> dict[str, Any]:
    """How near images are to real ones, whether they show what the prompt says, how different they are."""
    from smooth_rt.evaluation import ByNetworks, QualityTask, read_prompts, summarise_quality
    from smooth_rt.metrics.attributes import load_attributes
    from smooth_rt.metrics.frechet import load_reference

    ours = options.model == "default" and options.engines is None
    if reference is None and not ours:
        raise InputError("--reference: name a folder of real images, since only the default model's statistics ship")
    files = _images_of(reference, options.output) if reference is not None else []
    networks = ByNetworks(files, clip)
    texts = read_prompts(prompts)
    attributes = load_attributes() if ours else None
    task = QualityTask(
        tuple(texts), images // 2, attributes, options.seed, options.num_inference_steps, options.guidance,
        options.height, options.width, batch,
    )  # fmt: skip
    check_file(options, "quality", [*files, *([] if prompts is None else [prompts])])
    rows: list[dict[str, Any]] = []
    first: list[dict[str, Any]] | None = None
    real = load_reference() if reference is None else _statistics(options, files)
    for variant, found, told, done in measured(options, "quality", task, processes):
        with item_progress(f"quality, {variant}, by networks") as progress:
            judged = networks.of(done.kept(), progress)
        told["pictures"] = str(done.pictures)
        rows.append({"variant": variant, **told, **judged, **summarise_quality(found, real, first)})
        first = first or found
    notes = ["VAE-Fréchet: on the model's own VAE features; it is not FID.", *networks.missing]
    for key, name in (("vae_frechet", "VAE-Fréchet"), ("object_accuracy", "objects right")):
        if (between := rows[-1].get(f"{key}_less_base_95_percent")) is not None:
            notes.append(f"{name}, smooth less base: {between[0]:.4g} to {between[1]:.4g} (95 %, paired bootstrap).")
    if attributes is None:
        notes.append("Accuracies are not measured: the classifier knows the default model's data alone.")
    else:
        own = attributes.accuracy
        notes.append(f"On real pictures the classifier is right about {own['object']:.1%} of objects.")
    columns = {
        "variant": "model", "images": "images", "fid": "FID", "clip": "CLIP score",
        "vae_frechet": "VAE-Fréchet", "vae_frechet_95_percent": "95 %",
        "object_accuracy": "objects right", "colour_accuracy": "colours right", "diversity": "diversity",
    }  # fmt: skip
    setup = {"command": "evaluate quality", "prompts": len(texts), "images": 2 * (images // 2)}
    return finish(options, "quality", {**setup, "steps": options.num_inference_steps}, rows, columns, notes)


def _means(found: Sequence[dict[str, Any]], part: str) -> dict[str, float | None]:
    held = [row[part] for row in found]
    means: dict[str, float | None] = {
        name: statistics.fmean(one[name] for one in held) for name in ("psnr", "ssim", "mse")
    }
    # LPIPS is there for every image or for none.
    perceptual = [one["lpips"] for one in held if one["lpips"] is not None]
    return {**means, "lpips": statistics.fmean(perceptual) if perceptual else None}


def _images_of(folder: Path, output: Path) -> list[Path]:
    """Those of a folder and of the folders in it, but what was made there."""
    from engines.paths import absolute
    from smooth_rt.image_folders import images_of

    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name one of real images")
    found = [path for path in images_of(absolute(folder)) if not path.resolve().is_relative_to(output.resolve())]
    if len(found) < 2:
        raise InputError(f"{folder}: {len(found)} images; give a folder of at least 2, better thousands")
    return found


def _statistics(options: RunOptions, files: Sequence[Path]) -> Gaussian:
    """Those of real images, by the VAE of the model that the options name."""
    import numpy as np

    from smooth_rt.metrics.frechet import fit, vae_features

    def features(pipe: SmoothPipeline, some: Sequence[Path]) -> Any:
        return vae_features(pipe.encode_image(list(some), options.height, options.width) / pipe.scaling_factor)

    with open_pipeline(options) as pipe, item_progress("quality, real images") as progress:
        found = []
        for first in range(0, len(files), 16):
            found.append(features(pipe, files[first : first + 16]))
            progress(min(first + 16, len(files)), len(files))
    return fit(np.concatenate(found))
