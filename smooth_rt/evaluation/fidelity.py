"""How far an engine's images are from those of the torch modules in fp32: what a precision costs, as a user sees it.

Networks are compared output by output when they are built (`export.verify`). What their errors make of an image after
fifty guided steps follows from none of those numbers: it is sampled here, and timed, as the one is the other's price.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smooth_rt.pipeline import SmoothPipeline

__all__ = ["Fidelity", "fidelity"]

CHUNK = 8  # images at once, so that progress shows
SEED = 7_100_000  # away from the seeds of calibration


@dataclass(frozen=True)
class Fidelity:
    """PSNR in dB, pixels in 0..1, of each image to the reference's of the same noise; infinite where they are equal.

    `seconds` are those of an image, of each batch of them, and `reference_seconds` the reference's for the same ones.
    """

    psnr: tuple[float, ...]
    seconds: tuple[float, ...]
    reference_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.psnr))

    @property
    def worst(self) -> float:
        return min(self.psnr)

    @property
    def seconds_an_image(self) -> float:
        """The median over the batches."""
        return float(np.median(self.seconds))

    @property
    def speedup(self) -> float:
        """How many times as fast as the reference: the median over the batches, which the two made in turn."""
        return float(np.median(np.divide(self.reference_seconds, self.seconds)))


def fidelity(
    pipes: Sequence[SmoothPipeline],
    reference: SmoothPipeline,
    prompts: Sequence[str],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Fidelity]:
    """One image a prompt, from the same noise on each of `pipes` and on `reference`, after one step to warm up.

    Args:
        pipes: of the same model; all take images of the first one's size.
        reference: on the torch modules in fp32.
        prompts: one an image.
        num_inference_steps: DDIM steps.
        guidance_scale: as everywhere.
        progress: called with what is done, images done and images in all.
    """
    height, width = pipes[0].size
    found: list[list[float]] = [[] for _ in pipes]
    seconds: list[list[float]] = [[] for _ in (reference, *pipes)]
    for first in range(0, len(prompts), CHUNK):
        some = list(prompts[first : first + CHUNK])

        def images(pipe: SmoothPipeline, steps: int, some: list[str] = some, first: int = first) -> torch.Tensor:
            seeds = [torch.Generator().manual_seed(SEED + first + index) for index in range(len(some))]
            made = pipe(
                some,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=seeds,
                output_type="pt",
            )
            return torch.as_tensor(made.images).double()

        if progress is not None:
            progress("images", first, len(prompts))
        made = []
        for pipe, taken in zip((reference, *pipes), seconds, strict=True):
            if first == 0:
                images(pipe, 1)
            started = time.perf_counter()
            made.append(images(pipe, num_inference_steps))
            taken.append((time.perf_counter() - started) / len(some))
        for got, psnrs in zip(made[1:], found, strict=True):
            error = (got - made[0]).square().flatten(1).mean(dim=1)
            psnrs += (-10 * error.log10()).tolist()
    return [
        Fidelity(tuple(psnrs), tuple(taken), tuple(seconds[0])) for psnrs, taken in zip(found, seconds[1:], strict=True)
    ]
