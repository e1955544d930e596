"""The Fréchet distance between two sets of pictures on features of the model's own VAE: "VAE-Fréchet", not FID.

FID (Heusel et al. 2017, arXiv 1706.08500) fits a Gaussian to Inception features of each set; here the features are the
mean of the VAE's posterior, averaged over a grid of 4 x 4 cells, so nothing has to be downloaded. It sees colours and
layout, little of what an image shows. Compare it between models on the same references and the same number of images:
like FID it falls as that number grows.

    d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smooth_rt.errors import InputError, ModelError, reason

__all__ = ["Gaussian", "fit", "frechet", "frechet_intervals", "load_reference", "vae_features"]

GRID = 4
DRAWS = 200

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of `count` features, float64."""

    mean: Features
    covariance: Features
    count: int


def vae_features(latents: Tensor) -> Features:
    """The features [N, C * 16] of latents [N, C, h, w]."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(latents.double(), GRID)
    return pooled.flatten(1).numpy()


def fit(features: Features) -> Gaussian:
    """The Gaussian of features [N, D].

    Raises:
        InputError: fewer than two.
    """
    if len(features) < 2:
        raise InputError(f"features: {len(features)}; give at least 2 images")
    return Gaussian(features.mean(0), np.cov(features, rowvar=False), len(features))


def frechet(one: Gaussian, other: Gaussian) -> float:
    """The distance of two Gaussians.

    Raises:
        InputError: they have different dimensions.
    """
    if one.mean.shape != other.mean.shape:
        raise InputError(f"reference: features of {other.mean.size} dimensions, the images' have {one.mean.size}")
    # tr (C1 C2)^(1/2) from the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which has the same.
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)).sum()
    apart = float(np.square(one.mean - other.mean).sum())
    return apart + float(np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)


def frechet_intervals(
    features: Features, reference: Gaussian, base: Features | None = None, seed: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the distance of `features`, and that distance less the one of `base`, lie with 95 % confidence: a bootstrap
    over images, drawn in pairs, since image i of both is from the same noise. Without `base`, both are the same.

    Raises:
        InputError: different numbers of images.
    """
    if base is not None and base.shape != features.shape:
        raise InputError(f"features: {len(base)} and {len(features)} images; give the same noises for both")
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, len(features), len(features)) for _ in range(DRAWS)]
    found = np.array([frechet(fit(features[rows]), reference) for rows in drawn])
    less = 0.0 if base is None else np.array([frechet(fit(base[rows]), reference) for rows in drawn])
    return _middle(found), _middle(found - less)


def load_reference(path: Path | None = None) -> Gaussian:
    """Statistics that the recipe wrote; None: those of the default model's data, which ship.

    Raises:
        ModelError: the file is not such.
    """
    path = path or Path(str(resources.files("smooth_rt"))) / "assets" / "reference.safetensors"
    try:
        with safe_open(path, "pt") as file:
            mean, covariance = (file.get_tensor(name).double().numpy() for name in ("mean", "covariance"))
            return Gaussian(mean, covariance, int(file.metadata()["count"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not a reference's statistics ({reason(error)})") from error


def _middle(values: Features) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
