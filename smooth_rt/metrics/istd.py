"""ISTD, the interpolation standard deviation of Smooth Diffusion (arXiv 2312.04410), and what must stand beside it.

For each prompt, images are made from noises that are interpolated evenly between two (slerp at 0, 0.1, ..., 1: eleven
images). The distances between neighbours, L2 in pixel space, are all the same where the latent space is smooth:

    ISTD = mean over prompts of std over i of ||x_{i+1} - x_i||_2

The paper does not state the range of the pixels nor the standard deviation's ddof; here 0..255 and 0. Against the
paper's tables compare ratios of two models, not the numbers: ISTD grows with the pixel range and the picture's size.

A model that ignores its noise scores 0. So `diversity` and the mean step are to be shown beside it: smoothness is a
lower ISTD at the same diversity, and a lower ISTD over the mean step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from smooth_rt.errors import InputError
from smooth_rt.metrics.pixels import FramesLike, as_pixels

__all__ = ["Istd", "diversity", "istd", "istd_of", "neighbour_distances", "ratio_interval"]

DRAWS = 4000
LEAST_RESAMPLED = 5  # prompts


@dataclass(frozen=True)
class Istd:
    """What `istd` measured; distances in units of the pixel range.

    Args:
        istd: mean over prompts of the standard deviation of the distances.
        mean_step: mean over prompts of the mean distance.
        istd_over_mean_step: `istd / mean_step`, free of the pixel range; nan where nothing moves.
        per_prompt: the standard deviation of each prompt's distances.
        distances: for each prompt, the distances between neighbouring frames.
    """

    istd: float
    mean_step: float
    istd_over_mean_step: float
    per_prompt: tuple[float, ...]
    distances: tuple[tuple[float, ...], ...]


def neighbour_distances(frames: FramesLike, *, pixel_range: float = 255.0, what: str = "frames") -> tuple[float, ...]:
    """L2 distances in pixel space between neighbouring frames, F - 1 of them.

    Args:
        frames: [F, H, W, C] or F pictures, in order; uint8 or floats in 0..1.
        pixel_range: pixels are measured in 0..pixel_range.
        what: their name in messages.

    Raises:
        InputError: fewer than two frames, or pixels that are not pictures'.
    """
    pixels = as_pixels(frames, 4, what)
    if len(pixels) < 2:
        raise InputError(f"{what}: {len(pixels)} frame; give at least 2")
    steps = np.diff(pixels, axis=0).reshape(len(pixels) - 1, -1)
    return tuple(float(x) for x in pixel_range * np.linalg.norm(steps, axis=1))


def istd(images: ArrayLike | Sequence[FramesLike], *, pixel_range: float = 255.0, ddof: int = 0) -> Istd:
    """The interpolation standard deviation of the frames of one or more prompts.

    Args:
        images: [N, F, H, W, C], or N arrays [F, H, W, C] whose F and sizes may differ: F >= 2 frames in order for each
            of N prompts, uint8 or floats in 0..1.
        pixel_range: pixels are measured in 0..pixel_range.
        ddof: delta degrees of freedom of the standard deviation.

    Raises:
        InputError: no prompt, too few frames for `ddof`, or pixels that are not pictures'.
    """
    if not len(images):  # type: ignore[arg-type]
        raise InputError("istd: no prompts; give the frames of at least one")
    distances = tuple(
        neighbour_distances(frames, pixel_range=pixel_range, what=f"istd: prompt {number}")
        for number, frames in enumerate(images)  # type: ignore[arg-type]
    )
    return istd_of(distances, ddof=ddof)


def istd_of(distances: Sequence[Sequence[float]], *, ddof: int = 0) -> Istd:
    """ISTD from the distances between neighbouring frames of each prompt.

    Raises:
        InputError: too few frames for `ddof`.
    """
    held = tuple(tuple(one) for one in distances)
    shortest = min(len(d) for d in held)
    if shortest <= ddof:
        raise InputError(f"istd: {shortest + 1} frames; give at least {ddof + 2} for ddof={ddof}")
    per_prompt = tuple(float(np.std(d, ddof=ddof)) for d in held)
    deviation = float(np.mean(per_prompt))
    mean_step = float(np.mean([np.mean(d) for d in distances]))
    return Istd(
        istd=deviation,
        mean_step=mean_step,
        istd_over_mean_step=deviation / mean_step if mean_step > 0 else math.nan,
        per_prompt=per_prompt,
        distances=held,
    )


def diversity(images_per_prompt: ArrayLike | Sequence[FramesLike], *, pixel_range: float = 255.0) -> float:
    """Mean L2 distance in pixel space between images of independent seeds: over all pairs, then over prompts.

    Args:
        images_per_prompt: [N, S, H, W, C], or N arrays [S, H, W, C] with S >= 2 seeds; uint8 or floats in 0..1.
        pixel_range: pixels are measured in 0..pixel_range.

    Raises:
        InputError: no prompt, fewer than two seeds, or pixels that are not pictures'.
    """
    if not len(images_per_prompt):  # type: ignore[arg-type]
        raise InputError("diversity: no prompts; give the images of at least one")
    means = []
    for number, seeds in enumerate(images_per_prompt):  # type: ignore[arg-type]
        pixels = as_pixels(seeds, 4, f"diversity: prompt {number}")
        if len(pixels) < 2:
            raise InputError(f"diversity: prompt {number} has {len(pixels)} image; give at least two seeds")
        means.append(np.mean([np.linalg.norm(a - b) for a, b in combinations(pixels, 2)]))
    return pixel_range * float(np.mean(means))


def ratio_interval(base: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Where `mean(other) / mean(base)` lies with 95 % confidence: a bootstrap over prompts, which are drawn in pairs.

    None for fewer than `LEAST_RESAMPLED` prompts: drawn again, so few say nothing about others.

    Args:
        base: a number above 0 for each prompt, as `Istd.per_prompt`.
        other: the same prompts on another model.

    Raises:
        InputError: the numbers of prompts differ, or there is none.
    """
    first, second = np.asarray(base, float), np.asarray(other, float)
    if first.shape != second.shape or not first.size:
        raise InputError(f"per_prompt: {first.size} and {second.size} prompts; give the same prompts for both")
    if first.size < LEAST_RESAMPLED:
        return None
    drawn = np.random.default_rng(seed).integers(0, first.size, (DRAWS, first.size))
    with np.errstate(divide="ignore", invalid="ignore"):  # a base that does not move at all
        low, high = np.percentile(second[drawn].mean(1) / first[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)
