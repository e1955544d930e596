"""ISTD of a pipeline, with diversity beside it (Smooth Diffusion, arXiv 2312.04410; see `metrics.istd`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from smooth_rt.errors import InputError
from smooth_rt.evaluation.rows import Progress, in_batches
from smooth_rt.metrics.istd import Istd, istd_of, neighbour_distances
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import check, check_images, seeds_from
from smooth_rt.tasks.mixing import slerp

__all__ = ["IstdTask", "Look", "Smoothness", "check_istd", "measure_istd", "summarise_istd"]

Look = Callable[[NDArray[np.float32]], None]


@dataclass(frozen=True)
class Smoothness:
    """ISTD over the prompts, and the mean pixel distance between the two ends of each: images of independent noises."""

    istd: Istd
    diversity: float


def check_istd(prompts: int, frames: int, seed: int, prompts_per_batch: int, pairs: int = 1) -> None:
    """Whether an `IstdTask` can be asked for so much, asked before a model is loaded.

    Raises:
        InputError: no prompt, a number out of its range, more images in a batch than MOST_IMAGES, or a seed that does
            not fit into 64 bits.
    """
    if prompts < 1:
        raise InputError("prompts=0: give at least 1")
    if not 1 <= pairs <= 1000:
        raise InputError(f"pairs={pairs}: give a whole number from 1 to 1000")
    check(frames=frames, batch=prompts_per_batch)
    check_images("frames", frames, min(prompts * pairs, prompts_per_batch), "prompts in a batch")
    seeds_from(seed, 2 * prompts * pairs)


@dataclass(frozen=True)
class IstdTask:
    """For each prompt and pair of noises, `frames` images along the slerp between the two.

    Item i is pair i % `pairs` of prompt i // `pairs`; its noises are drawn from seeds `seed + 2 i` and `seed + 2 i + 1`
    on the CPU: the same for every model and engine, whatever the batch.

    Raises:
        InputError: see `check_istd`.
    """

    prompts: tuple[str, ...]
    frames: int = 11
    pairs: int = 1
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    prompts_per_batch: int = 4
    pixel_range: float = 255.0

    def __post_init__(self) -> None:
        check_istd(len(self.prompts), self.frames, self.seed, self.prompts_per_batch, self.pairs)

    def batches(self) -> list[list[int]]:
        return in_batches(len(self.prompts) * self.pairs, self.prompts_per_batch)

    def measure(self, pipe: SmoothPipeline, items: Sequence[int], look: Look | None = None) -> list[dict[str, Any]]:
        """The distances between neighbours, and that of the ends."""
        alphas = [i / (self.frames - 1) for i in range(self.frames)]
        paths = []
        for item in items:
            pair = [torch.Generator().manual_seed(self.seed + 2 * item + end) for end in (0, 1)]
            start, end = pipe.draw_noise(2, self.height, self.width, pair)
            paths.append(torch.stack([slerp(start, end, alpha) for alpha in alphas]))
        images = pipe(
            [self.prompts[item // self.pairs] for item in items for _ in alphas],
            latents=torch.cat(paths),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            output_type="np",
        ).images
        rows = []
        for frames in np.split(cast("NDArray[np.float32]", images), len(items)):
            distances = neighbour_distances(frames, pixel_range=self.pixel_range)
            (ends,) = neighbour_distances(frames[[0, -1]], pixel_range=self.pixel_range)
            rows.append({"distances": list(distances), "ends": ends})
            if look is not None:
                look(frames)
        return rows


def summarise_istd(rows: Sequence[dict[str, Any]], ddof: int = 0) -> Smoothness:
    """What rows of an `IstdTask` come to.

    Raises:
        InputError: fewer frames than `ddof` needs.
    """
    found = istd_of([row["distances"] for row in rows], ddof=ddof)
    return Smoothness(found, float(np.mean([row["ends"] for row in rows])))


def measure_istd(
    pipe: SmoothPipeline,
    prompts: Sequence[str],
    *,
    frames: int = 11,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    prompts_per_batch: int = 4,
    progress: Progress | None = None,
    look: Look | None = None,
) -> Smoothness:
    """ISTD of an open pipeline, one pair of noises a prompt; see `IstdTask` for the options.

    Args:
        progress: called with prompts done and in all.
        look: called with the frames [F, H, W, 3] of each prompt, in 0..1.

    Raises:
        InputError: no prompt, or an option out of its range.
    """
    task = IstdTask(
        tuple(prompts), frames, 1, seed, num_inference_steps, guidance_scale, height, width, prompts_per_batch
    )
    rows: list[dict[str, Any]] = []
    for batch in task.batches():
        rows += task.measure(pipe, batch, look)
        if progress is not None:
            progress(len(rows), len(prompts))
    return summarise_istd(rows)
