"""evaluate interpolation: what each option of `interpolate` makes of paths between images, with and without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands.measuring import check_file, finish, measured
from smooth_rt.commands.options import RunOptions, listed
from smooth_rt.commands.running import need_attention
from smooth_rt.ranges import choice

__all__ = ["interpolation"]


def interpolation(
    options: RunOptions,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images with metadata.jsonl (file_name, text) or a .txt beside each: the first and the "
            "second make a path, and so on. Left out: those that ship.",
            show_default=False,
        ),
    ] = None,
    ways: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of plain, adain, pixels, lpips, attention; several at once with + between. "
            "attention takes --engine eager."
        ),
    ] = "plain,adain,pixels,adain+pixels",
    method: Annotated[str, typer.Option(help="How images are inverted, as of `interpolate`.")] = "ddim",
    frames: Annotated[int, typer.Option(help="Images a path, with both ends.")] = 9,
    limit: Annotated[int | None, typer.Option(help="Only so many of the paths.", min=1, show_default=False)] = None,
    processes: Annotated[int, typer.Option(help="Share the work; the results are the same.", min=1, max=256)] = 1,
) -> dict[str, Any]:
    """How even paths between images are and whether pictures lie on them, without and with the LoRA."""
    from smooth_rt.evaluation import InterpolationTask, captioned, examples, summarise_interpolation
    from smooth_rt.evaluation.interpolation import options_of
    from smooth_rt.evaluation.tables import said_interval
    from smooth_rt.metrics import ratio_interval
    from smooth_rt.metrics.attributes import load_attributes
    from smooth_rt.tasks.inversion import METHODS

    named = listed(ways, "ways")
    if any("attention_blend" in options_of(way) for way in named):
        need_attention(options, f"--ways {ways}")
    method = choice("method", method, tuple(METHODS))
    images = examples() if data is None else captioned(data)
    images = images[: len(images) // 2 * 2 if limit is None else 2 * limit]
    attributes = load_attributes() if options.model == "default" and options.engines is None else None
    steps, scale = options.num_inference_steps, options.guidance_scale
    tasks = [
        InterpolationTask(tuple(images), attributes, way, method, frames, steps, scale, options.height, options.width)
        for way in named
    ]
    check_file(options, "interpolation", [example.path for example in images])
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    for task in tasks:
        for variant, found, told, _ in measured(
            options, "interpolation", task, processes, METHODS[method].gradients(scale)
        ):
            rows.append({"variant": variant, "way": task.way, **told, **summarise_interpolation(found)})
            notes |= dict.fromkeys(
                f"LPIPS is not measured: {row['lpips_missing']}" for row in found if row["lpips_missing"]
            )
    for row in rows:
        plain = next((one for one in rows if (one["variant"], one["way"]) == (row["variant"], "plain")), None)
        if plain is not None and row is not plain:
            between = ratio_interval(plain["per_prompt"], row["per_prompt"])
            row["istd_over_plain_95_percent"] = between
            said = f"ISTD of {row['variant']}, {row['way']} over plain: {row['istd'] / plain['istd']:.3f}"
            notes[f"{said} ({said_interval(between, 'paths')})."] = None
    if attributes is None:
        notes["Certainty is not measured: the classifier knows the default model's data alone."] = None
    scale = METHODS[method].guidance_scale if scale is None else scale
    setup = {"command": "evaluate interpolation", "paths": len(images) // 2, "frames": frames, "method": method}
    setup |= {"steps": steps, "guidance_scale": scale}
    columns = {
        "variant": "model", "way": "way", "istd": "ISTD", "mean_step": "mean step",
        "istd_over_mean_step": "ISTD / mean step", "longest_step": "longest / mean step", "detour": "length / ends",
        "lpips_length": "LPIPS length", "lpips_std": "LPIPS std", "certainty": "certainty between",
        "certainty_of_ends": "certainty of ends", "psnr": "PSNR of ends",
    }  # fmt: skip
    return finish(options, "interpolation", setup, rows, columns, list(notes))
