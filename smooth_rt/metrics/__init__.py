"""Measures of smoothness (istd) and of likeness between a picture and its reconstruction."""

from smooth_rt.metrics.istd import Istd, diversity, istd, neighbour_distances, ratio_interval
from smooth_rt.metrics.reconstruction import Reconstruction, lpips, mse, psnr, reconstruction, ssim

__all__ = [
    "Istd",
    "Reconstruction",
    "diversity",
    "istd",
    "lpips",
    "mse",
    "neighbour_distances",
    "psnr",
    "ratio_interval",
    "reconstruction",
    "ssim",
]
