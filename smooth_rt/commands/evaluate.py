"""evaluate istd, evaluate inversion: the numbers of a model with and without its LoRA, printed and written as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from smooth_rt.commands.options import RunOptions
from smooth_rt.commands.running import Stopwatch, described, item_progress, open_pipeline

if TYPE_CHECKING:
    from smooth_rt.metrics.reconstruction import Reconstruction
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["inversion", "istd"]

Result = TypeVar("Result")


def istd(
    options: RunOptions,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line. Left out: those of the default model.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many of the prompts.", min=1, show_default=False)] = None,
    frames: Annotated[
        int, typer.Option(help="Images a prompt, with both ends; at most 10000 over the prompts of a batch.")
    ] = 11,
    batch: Annotated[int, typer.Option(help="Prompts sampled together.")] = 4,
) -> dict[str, Any]:
    """ISTD, mean step and diversity over prompts, without and with the LoRA, from the same noises."""
    from smooth_rt.evaluation import check_istd, measure_istd, read_prompts
    from smooth_rt.metrics import ratio_interval

    texts = read_prompts(prompts)[:limit]
    check_istd(len(texts), frames, options.seed, batch)
    _check_file(options, "istd", [] if prompts is None else [prompts])
    rows: list[dict[str, Any]] = []
    for name, found, told in _measured(
        options,
        "ISTD",
        lambda pipe, progress: measure_istd(
            pipe,
            texts,
            frames=frames,
            seed=options.seed,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=7.5 if options.guidance_scale is None else options.guidance_scale,
            height=options.height,
            width=options.width,
            prompts_per_batch=batch,
            progress=progress,
        ),
    ):
        rows.append(
            {
                "variant": name,
                **told,
                "istd": found.istd.istd,
                "mean_step": found.istd.mean_step,
                "istd_over_mean_step": found.istd.istd_over_mean_step,
                "diversity": found.diversity,
                "per_prompt": list(found.istd.per_prompt),
            }
        )
    setup: dict[str, Any] = {"command": "evaluate istd", "prompts": len(texts), "frames": frames}
    setup |= {"steps": options.num_inference_steps, "seed": options.seed}
    if len(rows) > 1:
        base, smooth = rows
        keys = ("istd", "mean_step", "istd_over_mean_step", "diversity")
        setup["smooth_over_base"] = {key: smooth[key] / base[key] if base[key] else None for key in keys}
        setup["istd_95_percent"] = list(ratio_interval(base["per_prompt"], smooth["per_prompt"]))
    return _finish(options, "istd", setup, rows)


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
    method: Annotated[str, typer.Option(help="ddim, ddim-without-text or negative-prompt.")] = "ddim",
    batch: Annotated[int, typer.Option(help="Images inverted together.")] = 16,
) -> dict[str, Any]:
    """How near images come to themselves after inversion and sampling back, without and with the LoRA."""
    from smooth_rt.evaluation import captioned, examples, measure_inversion

    images = examples() if data is None else captioned(data)
    _check_file(options, "inversion", [example.path for example in images])
    rows: list[dict[str, Any]] = []
    for name, (rebuilt, bound), told in _measured(
        options,
        "inversion",
        lambda pipe, progress: measure_inversion(
            pipe,
            images,
            method=method,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            height=options.height,
            width=options.width,
            images_per_batch=batch,
            progress=progress,
        ),
    ):
        if not rows:
            rows.append({"variant": "VAE bound", **told, **_means(bound)})
        rows.append({"variant": name, **told, **_means(rebuilt)})
    setup = {"images": len(images), "method": method, "steps": options.num_inference_steps}
    return _finish(options, "inversion", {"command": "evaluate inversion", **setup}, rows)


def _measured(
    options: RunOptions, title: str, measure: Callable[[SmoothPipeline, Callable[[int, int], None]], Result]
) -> Iterator[tuple[str, Result, dict[str, Any]]]:
    """`measure` of the model without and with its LoRA, one after the other; of a bundle, of what it holds.

    Yields the variant's name, what was measured and what of the run is told.
    """
    plain = replace(options, lora="none")
    named = {"bundle": options} if options.engines is not None else {"base": plain}
    if options.engines is None and options.chosen_lora is not None:
        named["smooth"] = options
    for name, chosen in named.items():
        with open_pipeline(chosen) as pipe, item_progress(f"{title}, {name}") as progress:
            watch = Stopwatch()
            found = measure(pipe, progress)
            told = {**described(pipe, chosen), "seconds": watch.seconds}
        yield name, found, told


def _means(found: Sequence[Reconstruction]) -> dict[str, float | None]:
    import statistics

    means: dict[str, float | None] = {
        name: statistics.fmean(getattr(one, name) for one in found) for name in ("psnr", "ssim", "mse")
    }
    # LPIPS is there for every image or for none.
    perceptual = [one.lpips for one in found if one.lpips is not None]
    return {**means, "lpips": statistics.fmean(perceptual) if perceptual else None}


def _check_file(options: RunOptions, name: str, inputs: Sequence[Path]) -> None:
    from smooth_rt.writers import check_output

    check_output(options.output, [f"{name}.json"], [*inputs, *options.inputs])


def _finish(options: RunOptions, name: str, setup: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the whole as JSON; of what is printed for people, leave out what fills a page."""
    from smooth_rt.commands.show import finite
    from smooth_rt.writers import encode_json, write_files

    result = {**setup, "results": rows}
    (written,) = write_files(options.output, {f"{name}.json": encode_json(finite(result))})
    if not options.json:
        long = ("per_prompt", "reason", "model", "lora")
        result["results"] = [{key: value for key, value in row.items() if key not in long} for row in rows]
    return {**result, "file": str(written)}
