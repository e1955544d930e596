"""Paths between pairs of real images: how even and how short they are, and whether pictures lie on them.

One without the other says nothing: the shortest and evenest path in pixels is a cross-fade, which shows two objects at
once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from smooth_rt.errors import InputError
from smooth_rt.evaluation.inputs import Example
from smooth_rt.evaluation.rows import ASIDE
from smooth_rt.images import read
from smooth_rt.metrics.attributes import Attributes
from smooth_rt.metrics.istd import istd_of, neighbour_distances
from smooth_rt.metrics.pretrained import MissingError
from smooth_rt.metrics.reconstruction import lpips, psnr
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import RESCHEDULES, check, shown
from smooth_rt.tasks.interpolate import PASSES

__all__ = ["InterpolationTask", "options_of", "summarise_interpolation"]

# What a way adds to `interpolate`; several are joined by "+".
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adain": {"adain": True},
    "attention": {"attention_blend": True},
    **{kind: {"reschedule": kind} for kind in RESCHEDULES},
}


def options_of(way: str) -> dict[str, Any]:
    """The options of `interpolate` that a way names, as "adain+pixels".

    Raises:
        InputError: there is no such part.
    """
    found: dict[str, Any] = {}
    for part in way.split("+"):
        if part not in PARTS:
            raise InputError(f"way={shown(way)}: of {', '.join(PARTS)}, or several with + between, as adain+pixels")
        found |= PARTS[part]
    return found


@dataclass(frozen=True)
class InterpolationTask:
    """Item i is the path from image 2 i to image 2 i + 1.

    Args:
        images: an even number.
        attributes: judges what is seen; None: that is not judged.
        way: see `options_of`.
        passes: of a way that reschedules, at most.

    Raises:
        InputError: an option out of its range, or no pair.
    """

    images: tuple[Example, ...]
    attributes: Attributes | None = field(metadata=ASIDE)
    way: str = "plain"
    method: str = "ddim"
    frames: int = 9
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    passes: int = PASSES

    def __post_init__(self) -> None:
        if len(self.images) < 2:
            raise InputError(f"images={len(self.images)}: give at least 2, the ends of a path")
        check(frames=self.frames, reschedule_passes=self.passes)
        if self.frames < 3:
            raise InputError(f"frames={self.frames}: give at least 3, both ends and what lies between")
        options_of(self.way)

    def batches(self) -> list[list[int]]:
        return [[item] for item in range(len(self.images) // 2)]

    def measure(self, pipe: SmoothPipeline, items: Sequence[int]) -> list[dict[str, Any]]:
        return [self._measured(pipe, self.images[2 * item : 2 * item + 2]) for item in items]

    def _measured(self, pipe: SmoothPipeline, pair: Sequence[Example]) -> dict[str, Any]:
        """The distances between neighbours and that of the ends, pixels in 0..255; LPIPS between neighbours; how sure
        the classifier is of an object on the ends and between them; the ends' PSNR to the images."""
        options = options_of(self.way)
        if "reschedule" in options:
            options["reschedule_passes"] = self.passes
        made = pipe.interpolate(
            [example.caption for example in pair],
            [example.path for example in pair],
            frames=self.frames,
            method=self.method,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            output_type="np",
            **options,
        )
        frames = cast("NDArray[np.float32]", made.images)
        originals = read([example.path for example in pair], *frames.shape[1:3]).permute(0, 2, 3, 1).numpy()
        (ends,) = neighbour_distances(frames[[0, -1]])
        perceptual, missing = None, None
        try:
            perceptual = [lpips(a, b) for a, b in itertools.pairwise(frames)]
        except MissingError as error:
            missing = str(error)
        sure = self.attributes.certainty(frames) if self.attributes is not None else None
        return {
            "distances": list(neighbour_distances(frames)),
            "ends": ends,
            "lpips": perceptual,
            "lpips_missing": missing,
            "certainty": None if sure is None else float(np.mean(sure[1:-1])),
            "certainty_of_ends": None if sure is None else (sure[0] + sure[-1]) / 2,
            "psnr": (psnr(originals[0], frames[0]) + psnr(originals[1], frames[-1])) / 2,
        }


def summarise_interpolation(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What rows of an `InterpolationTask` come to, means over paths: `istd`, `mean_step` and their ratio;
    `longest_step` over the mean one of its path; `detour`, the path's length over the distance of its ends;
    `lpips_length` and `lpips_std` of the steps in LPIPS, `certainty`, `certainty_of_ends`; None where not measured."""
    found = istd_of([row["distances"] for row in rows])

    def mean(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return float(np.mean(there)) if there else None

    return {
        "istd": found.istd,
        "mean_step": found.mean_step,
        "istd_over_mean_step": found.istd_over_mean_step,
        "longest_step": mean([max(row["distances"]) / np.mean(row["distances"]) for row in rows]),
        "detour": mean([sum(row["distances"]) / row["ends"] for row in rows]),
        "lpips_length": mean([None if row["lpips"] is None else sum(row["lpips"]) for row in rows]),
        "lpips_std": mean([None if row["lpips"] is None else float(np.std(row["lpips"])) for row in rows]),
        "certainty": mean([row["certainty"] for row in rows]),
        "certainty_of_ends": mean([row["certainty_of_ends"] for row in rows]),
        "psnr": mean([row["psnr"] for row in rows]),
        "per_prompt": list(found.per_prompt),
    }
