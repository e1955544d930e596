"""Convert PIL images of any mode to RGB in 0..1, with transparency composited on white."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from smooth_rt.errors import InputError

__all__ = ["to_pixels"]

ORIENTATION = 0x0112  # EXIF's tag
TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # of [H, W, C], by EXIF's orientation
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
# Pillow decodes these to 8 bits, in which the transparent colour of a PNG is no longer found.
SIXTEEN_BIT_COLOURS = ("RGB;16B", "RGBA;16B")
# Pillow scales these values to 8 bits, and leaves the transparent one as it is stored.
GREY_SCALES = {"L;2": 85, "L;4": 17}
SIXTEEN_BITS = 65535
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # whose images of mode "I" have values up to 65535


def to_pixels(image: Image.Image, name: str) -> Tensor:
    """Return an image as RGB [3, H, W], float32 in 0..1, upright by EXIF, with transparency composited on white.

    16-bit greyscale and 16-bit colours of a PNG that is not decoded yet keep their precision; other 16-bit colours have
    8 bits in Pillow. Values of mode "I" (32 bits) are 16-bit ones, and 8-bit ones if none is above 255 and the image is
    not from a PNG or PGM file.

    Args:
        image: of any mode.
        name: the image's name for messages.

    Raises:
        InputError: the range of the values is not known.
        Exception: whatever the decoder of a damaged file raises.
    """
    if image.mode == "F":
        raise InputError(f"{name}: a float image has no known range; give a numpy array in 0..1")
    stored = next((tile[3] for tile in image.tile), None) if image.format == "PNG" and hasattr(image, "tile") else None
    if stored in SIXTEEN_BIT_COLOURS:
        return _on_white(_sixteen_bit_colours(image))
    from_file = image.format in SIXTEEN_BIT_FORMATS
    # Either way a copy, since its info is changed below.
    image = image.copy() if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _on_white(_deep_grey(image, name, from_file))
    key = image.info.get("transparency")
    if stored in GREY_SCALES and isinstance(key, int):
        image.info["transparency"] = key * GREY_SCALES[stored]
    elif image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # 16 bits, of an image that was decoded
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        # Pillow converts premultiplied alpha to RGBA by way of LA alone.
        over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    rgb = np.array(image.convert("RGB"))
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 255


def _orientation(image: Image.Image) -> Any:
    """Return EXIF's orientation; 1, upright, if the EXIF cannot be read, since the pixels may be whole."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a decoder of damaged EXIF raises anything; damaged pixels raise it again when they are read
        return 1


def _sixteen_bit_colours(image: Image.Image) -> NDArray[np.float32]:
    """Decode a PNG file with FFmpeg, which has 16 bits per channel, to [H, W, 3|4] in 0..1."""
    import av

    file: Any = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    with av.open(io.BytesIO(content), "r") as container:
        pixels: Any = next(container.decode(video=0)).to_ndarray()
    with Image.open(io.BytesIO(content)) as checked:  # Pillow reports damage that FFmpeg passes over
        checked.load()
        turn = TURNS.get(_orientation(checked))
    scaled: NDArray[np.float32] = np.divide(turn(pixels) if turn else pixels, SIXTEEN_BITS, dtype=np.float32)
    return scaled


def _deep_grey(image: Image.Image, name: str, from_file: bool) -> NDArray[np.float32]:
    """Return 16- or 32-bit greyscale as [H, W, 1|2] in 0..1."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > SIXTEEN_BITS:
        raise InputError(
            f"{name}: values from {low} to {high} in a 32-bit image, whose range is not known; give 8 or 16 bits, or a "
            "numpy array in 0..1"
        )
    eight_bits = image.mode == "I" and high <= 255 and not from_file
    grey = np.divide(values, 255 if eight_bits else SIXTEEN_BITS, dtype=np.float32)
    key = image.info.get("transparency")
    channels = [grey] if not isinstance(key, int) else [grey, (values != key).astype(np.float32)]
    return np.stack(channels, axis=-1)


def _on_white(pixels: NDArray[np.float32]) -> Tensor:
    """Composite [H, W, C] in 0..1, grey or RGB with alpha or without, on white: RGB [3, H, W]."""
    found = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    if len(found) in (2, 4):
        alpha = found[-1:]
        found = found[:-1] * alpha + (1 - alpha)
    return found.expand(3, -1, -1)
