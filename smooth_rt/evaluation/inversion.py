"""How near images come to themselves after inversion and sampling back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from smooth_rt.errors import InputError
from smooth_rt.evaluation.inputs import Example
from smooth_rt.evaluation.rows import Progress, in_batches
from smooth_rt.images import read
from smooth_rt.metrics.reconstruction import Reconstruction, reconstruction
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import check

__all__ = ["InversionTask", "measure_inversion"]


@dataclass(frozen=True)
class InversionTask:
    """Item i is image i, inverted by `method` and sampled back.

    Raises:
        InputError: no image, or a batch out of its range.
    """

    images: tuple[Example, ...]
    method: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    images_per_batch: int = 16
    version: int = 3  # of the rows: what they hold

    def __post_init__(self) -> None:
        if not self.images:
            raise InputError("images=0: give at least 1")
        check(batch=self.images_per_batch)

    def batches(self) -> list[list[int]]:
        return in_batches(len(self.images), self.images_per_batch)

    def measure(self, pipe: SmoothPipeline, items: Sequence[int]) -> list[dict[str, Any]]:
        """Each image's distances to its reconstruction ("rebuilt") and to the VAE's own ("bound"), the mean squared
        error of its latent, the deviation of its noise (a prior's is 1), and what it took: the batch's rows of the UNet
        and of its gradients, and seconds, by image."""
        batch = [self.images[item] for item in items]
        pictures = [example.path for example in batch]
        began = time.perf_counter()
        with pipe.call() as call:
            made = pipe.invert(
                pictures,
                [example.caption for example in batch],
                method=self.method,
                height=self.height,
                width=self.width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                keep=False,
                output_type="np",
            )
        count = len(items)
        took = {
            "evaluations": call.evaluations["forward"] / count,
            "gradient_evaluations": call.evaluations["gradient"] / count,
            "seconds": (time.perf_counter() - began) / count,
        }
        assert made.final_latents is not None
        spreads = made.latents.flatten(1).std(1).tolist()
        errors = (made.final_latents - made.image_latents).square().flatten(1).mean(1).tolist()
        back = cast("NDArray[np.float32]", made.images)
        alone = cast("NDArray[np.float32]", pipe.decode(made.image_latents, "np"))
        originals: Any = read(pictures, *back.shape[1:3]).permute(0, 2, 3, 1).numpy()
        return [
            {
                "rebuilt": asdict(reconstruction(a, b)),
                "bound": asdict(reconstruction(a, c)),
                "latent_mse": error,
                "noise_std": spread,
                **took,
            }
            for a, b, c, error, spread in zip(originals, back, alone, errors, spreads, strict=True)
        ]


def measure_inversion(
    pipe: SmoothPipeline,
    images: Sequence[Example],
    *,
    method: str = "ddim",
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    images_per_batch: int = 16,
    progress: Progress | None = None,
) -> tuple[list[Reconstruction], list[Reconstruction]]:
    """Invert and rebuild each image; the distances of each to its original.

    Returns:
        The reconstructions, and the VAE's own bound: encode and decode alone.

    Raises:
        InputError: no image, or an option out of its range.
    """
    task = InversionTask(tuple(images), method, num_inference_steps, guidance_scale, height, width, images_per_batch)
    rows: list[dict[str, Any]] = []
    for batch in task.batches():
        rows += task.measure(pipe, batch)
        if progress is not None:
            progress(len(rows), len(images))
    return [Reconstruction(**row["rebuilt"]) for row in rows], [Reconstruction(**row["bound"]) for row in rows]
