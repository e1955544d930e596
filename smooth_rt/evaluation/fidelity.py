"""How far an engine's images are from those of the torch modules in fp32: what a precision costs, as a user sees it.

Networks are compared output by output when they are built (`export.verify`). What their errors make of an image after
fifty guided steps follows from none of those numbers: it is sampled here.
"""

from __future__ import annotations

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
    """PSNR in dB, pixels in 0..1, of each image to the reference's of the same noise; infinite where they are equal."""

    psnr: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.psnr))

    @property
    def worst(self) -> float:
        return min(self.psnr)


def fidelity(
    pipes: Sequence[SmoothPipeline],
    reference: SmoothPipeline,
    prompts: Sequence[str],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Fidelity]:
    """One image a prompt, from the same noise on each of `pipes` and on `reference`.

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
    for first in range(0, len(prompts), CHUNK):
        some = list(prompts[first : first + CHUNK])

        def images(pipe: SmoothPipeline, some: list[str] = some, first: int = first) -> torch.Tensor:
            seeds = [torch.Generator().manual_seed(SEED + first + index) for index in range(len(some))]
            made = pipe(
                some,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=seeds,
                output_type="pt",
            )
            return torch.as_tensor(made.images).double()

        if progress is not None:
            progress("images", first, len(prompts))
        wanted = images(reference)
        for pipe, psnrs in zip(pipes, found, strict=True):
            error = (images(pipe) - wanted).square().flatten(1).mean(dim=1)
            psnrs += (-10 * error.log10()).tolist()
    return [Fidelity(tuple(psnrs)) for psnrs in found]
