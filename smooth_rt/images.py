"""Images in and out: whatever a caller has becomes a float tensor [3, H, W] in 0..1, and back again.

Accepted: a path, a PIL image, a numpy array [H, W, 1|3|4] or [H, W] (float in 0..1, or uint8), a torch tensor
[1|3|4, H, W] (float in 0..1, or uint8). Alpha is composited on white, EXIF orientation is applied, greyscale (8 or
16 bit) becomes RGB.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from engines.paths import expanded
from smooth_rt.errors import InputError
from smooth_rt.pil_images import to_pixels
from smooth_rt.ranges import MAX_SIDE, check_dense, shown

__all__ = ["MAX_PIXELS", "MIN_SIDE", "ImageLike", "Images", "OutputType", "as_list", "read", "to_images"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor"
Images: TypeAlias = "list[Image.Image] | NDArray[np.float32] | Tensor"
OutputType = Literal["pil", "np", "pt", "latent"]

MAX_PIXELS = 100_000_000
MIN_SIDE = 4  # pixels; below it there is nothing to enlarge


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image or many as a list: a numpy or torch batch (4 axes) is split along its first axis.

    Raises:
        InputError: there is no image.
    """
    if isinstance(images, Tensor):
        check_dense("images", images)
    if isinstance(images, (np.ndarray, Tensor)):
        found: list[ImageLike] = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, (str, os.PathLike, Image.Image)):
        found = [images]
    elif isinstance(images, Sequence):
        found = list(images)
    else:
        raise InputError(f"image: {type(images).__name__} is not an image; give a path, PIL, numpy or torch image")
    if not found:
        raise InputError("images: the list is empty; give at least one image")
    return found


def read(images: ImageLike | Sequence[ImageLike], height: int, width: int) -> Tensor:
    """Images of any kind as one batch: scaled to cover `height` x `width`, centre-cropped.

    Returns:
        [N, 3, height, width], float32 in 0..1.

    Raises:
        InputError: something is not an image, cannot be decoded, is smaller than MIN_SIDE or larger than MAX_SIDE or
            MAX_PIXELS (refused before it is decoded), or has values out of range.
    """
    found = as_list(images)
    batch = []
    for index, image in enumerate(found):
        name = str(image) if isinstance(image, (str, os.PathLike)) else f"image {index + 1} of {len(found)}"
        batch.append(_cover(_one(image, name), height, width))
    return torch.stack(batch)


def to_images(pixels: Tensor, output_type: OutputType) -> Images:
    """A batch of pixels in the form asked for.

    Args:
        pixels: [N, 3, H, W] in 0..1.
        output_type: "pil": a list of 8-bit RGB images; "np": [N, H, W, 3] in 0..1; "pt": `pixels` as they are.
    """
    if output_type == "pt":
        return pixels
    array = cast("NDArray[np.float32]", pixels.permute(0, 2, 3, 1).contiguous().numpy())
    if output_type == "np":
        return array
    return [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]


def _one(image: ImageLike, name: str) -> Tensor:
    if isinstance(image, (str, os.PathLike)):
        return _file(expanded(image), name)
    if isinstance(image, Image.Image):
        _check_size(*image.size, name)
        return _pil(image, name)
    if isinstance(image, np.ndarray):
        channels_first = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0) if image.ndim == 3 else image
        if channels_first.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise InputError(f"{name}: numpy {image.dtype} is not an image; give uint8, or float in 0..1")
        return _array(torch.from_numpy(np.ascontiguousarray(channels_first)), name, "[H, W, 3]", image.shape)
    if isinstance(image, Tensor):
        check_dense(name, image)
        one = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise InputError(f"{name}: torch {image.dtype} is not an image; give uint8, or float in 0..1")
        return _array(one.detach().cpu(), name, "[3, H, W]", image.shape)
    raise InputError(f"{name}: {type(image).__name__} is not an image; give a path, PIL, numpy or torch image")


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name}: {width}x{height} px is too small; give at least {MIN_SIDE}x{MIN_SIDE}")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: {width}x{height} px is too large; give at most {MAX_SIDE} px a side "
            f"and {MAX_PIXELS // 1_000_000} megapixels"
        )


def _file(path: Path, name: str) -> Tensor:
    try:
        there = path.exists()
    except OSError as error:  # its name is too long
        raise InputError(f"image {shown(name)}: {error.strerror}; check the path") from error
    if not there:
        raise InputError(f"{name}: no such file; check the path")
    try:
        with warnings.catch_warnings():
            # Pillow warns below its own limit; ours is lower and checked next, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: too large; give at most {MAX_SIDE} px a side and {MAX_PIXELS // 1_000_000} megapixels"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name}: not an image that can be read; give a PNG, JPEG or WebP file") from error
    with image:
        _check_size(*image.size, name)
        return _pil(image, name)


def _pil(image: Image.Image, name: str) -> Tensor:
    try:
        return to_pixels(image, name)
    except InputError:
        raise
    except Exception as error:  # a decoder of a damaged file raises anything
        raise InputError(f"{name}: the image is damaged and cannot be decoded; give another file") from error


def _array(image: Tensor, name: str, wanted: str, shape: Sequence[int]) -> Tensor:
    """[1|3|4, H, W] of uint8 or floats to RGB in 0..1."""
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise InputError(f"{name}: shape {list(shape)} is not an image; give {wanted}")
    _check_size(image.shape[2], image.shape[1], name)
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not bool(torch.isfinite(pixels).all()):
        raise InputError(f"{name}: NaN or infinite values; give floats in 0..1")
    if float(pixels.min()) < 0 or float(pixels.max()) > 1:
        raise InputError(
            f"{name}: values from {float(pixels.min()):.3g} to {float(pixels.max()):.3g}; give floats in 0..1, or uint8"
        )
    if image.shape[0] == 4:
        alpha = pixels[3:]
        return pixels[:3] * alpha + (1 - alpha)
    return pixels.expand(3, -1, -1)


def _cover(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[1:] == (height, width):
        return pixels
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    size = [max(height, round(pixels.shape[1] * scale)), max(width, round(pixels.shape[2] * scale))]
    if size[0] * size[1] > MAX_PIXELS:  # a sliver, which would have to be blown up
        raise InputError(
            f"images: {pixels.shape[2]}x{pixels.shape[1]} px cannot cover {width}x{height} px; crop it nearer to square"
        )
    resized = F.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width]
