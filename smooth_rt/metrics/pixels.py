"""Pictures as float64 arrays in 0..1, whatever they came as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from smooth_rt.errors import InputError

__all__ = ["FramesLike", "PictureLike", "Pixels", "as_pixels"]

Pixels = NDArray[np.float64]
PictureLike: TypeAlias = ArrayLike | Image.Image
FramesLike: TypeAlias = ArrayLike | Sequence[Image.Image]
TOLERANCE = 1e-3  # a float picture that was clamped in half precision may stand this far outside 0..1


def as_pixels(images: PictureLike | FramesLike, axes: int, what: str) -> Pixels:
    """`images` as float64 in 0..1 of `axes` axes, the last three [H, W, C]: uint8 is divided by 255, floats are kept.

    Raises:
        InputError: another number of axes, an empty axis, another dtype, or values that are not in 0..1.
    """
    try:
        array: NDArray[Any] = np.asarray(cast(Any, images))
    except ValueError as error:  # pictures of several sizes
        raise InputError(f"{what}: pictures of different sizes; give one size") from error
    if array.ndim != axes or 0 in array.shape:
        raise InputError(f"{what}: shape {list(array.shape)}; give {axes} axes, the last three height, width, channels")
    if array.dtype == np.uint8:
        return array.astype(np.float64) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{what}: dtype {array.dtype}; give uint8 in 0..255 or floats in 0..1")
    pixels = array.astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise InputError(f"{what}: floats from {low:g} to {high:g}; give floats in 0..1 or uint8")
    return pixels
