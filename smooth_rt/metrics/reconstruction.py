"""How near a reconstruction is to its picture: MSE, PSNR and SSIM by scikit-image, LPIPS where its network is at hand.

Each takes two pictures [H, W, C] of the same shape, uint8 or floats in 0..1, or PIL; the data range is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smooth_rt.errors import InputError
from smooth_rt.metrics.pixels import PictureLike, Pixels, as_pixels
from smooth_rt.metrics.pretrained import MissingError, lpips_network

__all__ = ["Reconstruction", "lpips", "mse", "outside", "psnr", "reconstruction", "ssim"]

SSIM_WINDOW = 7  # scikit-image's default, a uniform window


@dataclass(frozen=True)
class Reconstruction:
    """The distances of one pair. `lpips` is None where its network is not at hand and `lpips_missing` then says why."""

    mse: float
    psnr: float
    ssim: float
    lpips: float | None
    lpips_missing: str | None


def mse(image: PictureLike, reconstructed: PictureLike) -> float:
    """Mean squared error, 0..1.

    Raises:
        InputError: the pictures are not [H, W, C] of the same shape, or their values not in range.
    """
    from skimage.metrics import mean_squared_error

    return float(mean_squared_error(*_pair(image, reconstructed)))


def psnr(image: PictureLike, reconstructed: PictureLike) -> float:
    """Peak signal-to-noise ratio in dB: `10 log10(1 / mse)`; inf for equal pictures.

    Raises:
        InputError: as `mse`.
    """
    from skimage.metrics import peak_signal_noise_ratio

    first, second = _pair(image, reconstructed)
    return math.inf if (first == second).all() else float(peak_signal_noise_ratio(first, second, data_range=1.0))


def ssim(image: PictureLike, reconstructed: PictureLike) -> float:
    """Structural similarity, -1..1, mean over channels, in windows of 7x7 with equal weights.

    Raises:
        InputError: as `mse`, or a side is shorter than the window.
    """
    from skimage.metrics import structural_similarity

    first, second = _pair(image, reconstructed)
    if min(first.shape[:2]) < SSIM_WINDOW:
        size = f"{first.shape[0]}x{first.shape[1]}"
        raise InputError(f"ssim: pictures of {size}; give sides of at least {SSIM_WINDOW} pixels")
    return float(structural_similarity(first, second, data_range=1.0, channel_axis=-1, win_size=SSIM_WINDOW))


def outside(image: PictureLike, other: PictureLike, mask: NDArray[np.bool_]) -> tuple[float, float]:
    """PSNR and SSIM of two pictures where `mask` [H, W] is false: of the pixels there, and of the windows around them.

    Raises:
        InputError: as `ssim`, or the mask is of another size or covers all.
    """
    from skimage.metrics import structural_similarity

    first, second = _pair(image, other)
    if mask.shape != first.shape[:2] or mask.all():
        raise InputError(
            f"mask: {list(mask.shape)} for a picture of {list(first.shape[:2])}; leave something outside it"
        )
    error = float(np.square(first - second)[~mask].mean())
    _, local = structural_similarity(first, second, data_range=1.0, channel_axis=-1, win_size=SSIM_WINDOW, full=True)
    return (10 * math.log10(1 / error) if error else math.inf), float(local[~mask].mean())


def lpips(image: PictureLike, reconstructed: PictureLike) -> float:
    """Learned perceptual distance with AlexNet; see `pretrained`.

    Raises:
        InputError: as `mse`, or the pictures have not 3 channels.
        MissingError: the network is not at hand; the line says how to get it.
    """
    import torch

    pair = _pair(image, reconstructed)
    if pair[0].shape[2] != 3:
        raise InputError(f"lpips: pictures of {pair[0].shape[2]} channels; give RGB")
    network = lpips_network()
    first, second = (torch.from_numpy(p).float().permute(2, 0, 1)[None] * 2 - 1 for p in pair)
    with torch.no_grad():
        return float(network(first, second))


def reconstruction(image: PictureLike, reconstructed: PictureLike) -> Reconstruction:
    """All distances of one pair, LPIPS where its network is at hand.

    Raises:
        InputError: as `mse` and `ssim`.
    """
    perceptual, missing = None, None
    values = mse(image, reconstructed), psnr(image, reconstructed), ssim(image, reconstructed)
    try:
        perceptual = lpips(image, reconstructed)
    except MissingError as error:
        missing = str(error)
    return Reconstruction(*values, perceptual, missing)


def _pair(image: PictureLike, reconstructed: PictureLike) -> tuple[Pixels, Pixels]:
    first, second = as_pixels(image, 3, "picture"), as_pixels(reconstructed, 3, "reconstruction")
    if first.shape != second.shape:
        raise InputError(f"reconstruction: {list(second.shape)}, the picture {list(first.shape)}; give equal shapes")
    return first, second
