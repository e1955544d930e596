"""Metrics against cases that are worked out by hand."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from smooth_rt.errors import InputError
from smooth_rt.metrics import (
    diversity,
    istd,
    lpips,
    mse,
    neighbour_distances,
    psnr,
    ratio_interval,
    reconstruction,
    ssim,
)
from smooth_rt.metrics.pretrained import lpips_network


def grey(*values: float, size: tuple[int, int, int] = (2, 2, 1)) -> np.ndarray:
    """Frames [F, H, W, C], each of one grey."""
    return np.stack([np.full(size, value) for value in values])


def test_istd_by_hand() -> None:
    # Frames of 4 values: steps of 0.1, 0.3 and 0.2 a pixel are L2 distances of 2 * 0.1, 2 * 0.3, 2 * 0.2 in 0..1.
    found = istd(grey(0.0, 0.1, 0.4, 0.2)[None], pixel_range=1.0)
    assert found.distances[0] == pytest.approx((0.2, 0.6, 0.4))
    deviation = math.sqrt((0.2**2 + 0.2**2 + 0.0) / 3)
    assert found.istd == pytest.approx(deviation)
    assert found.mean_step == pytest.approx(0.4)
    assert found.istd_over_mean_step == pytest.approx(deviation / 0.4)


def test_istd_averages_the_prompts_deviations() -> None:
    even, uneven = grey(0.0, 0.25, 0.5), grey(0.0, 0.1, 0.4)
    found = istd([even, uneven])
    assert found.per_prompt == pytest.approx((0.0, 255 * 0.2))  # distances 0.2 and 0.6: deviation 0.2
    assert found.istd == pytest.approx(255 * 0.1)
    assert found.mean_step == pytest.approx(255 * (0.5 + 0.4) / 2)
    assert istd(np.stack([even, uneven])) == found


def test_the_interval_of_a_ratio_covers_it() -> None:
    generator = np.random.default_rng(1)
    base = generator.gamma(2.0, size=400)
    # Known beforehand: every prompt at 0.8 of itself, and then prompts that differ on their own.
    assert ratio_interval(base, 0.8 * base) == pytest.approx((0.8, 0.8))
    covered = 0
    for _ in range(60):
        first, second = generator.gamma(2.0, size=100), 0.8 * generator.gamma(2.0, size=100)
        low, high = ratio_interval(first, second) or (0.0, 0.0)
        assert 0.15 < high - low < 0.6
        covered += low <= 0.8 <= high
    assert 50 <= covered <= 60
    assert ratio_interval(base[:4], base[:4]) is None  # of so few it would say nothing
    with pytest.raises(InputError, match="100 and 99 prompts"):
        ratio_interval(base[:100], base[:99])


def test_istd_range_ddof_and_dtype() -> None:
    frames = grey(0.0, 0.2, 0.8, 0.4)[None]
    assert istd(frames).istd == pytest.approx(255 * istd(frames, pixel_range=1.0).istd)
    assert istd(frames, ddof=1).istd == pytest.approx(istd(frames).istd * math.sqrt(3 / 2))
    quantised = (frames * 255).astype(np.uint8)
    assert istd(quantised).distances == istd(quantised.astype(np.float64) / 255).distances
    assert istd(quantised).istd == pytest.approx(istd(frames).istd)


def test_istd_of_prompts_of_different_sizes() -> None:
    found = istd([grey(0.0, 0.5), grey(0.0, 0.5, 1.0, size=(4, 4, 1))], pixel_range=1.0)
    assert found.distances == ((1.0,), (2.0, 2.0))


def test_frames_as_pictures() -> None:
    pictures = [Image.new("RGB", (4, 2), (value, value, value)) for value in (0, 10, 30)]
    step = 10 * math.sqrt(4 * 2 * 3)
    assert neighbour_distances(pictures) == pytest.approx((step, 2 * step))
    assert istd([pictures]).istd == pytest.approx(step / 2)
    with pytest.raises(InputError, match="different sizes"):
        neighbour_distances([*pictures, Image.new("RGB", (5, 2))])


def test_a_model_that_ignores_its_noise() -> None:
    still = istd(grey(0.3, 0.3, 0.3)[None])
    assert (still.istd, still.mean_step) == (0.0, 0.0)
    assert math.isnan(still.istd_over_mean_step)
    assert diversity(grey(0.3, 0.3)[None]) == 0.0


def test_diversity_by_hand() -> None:
    # Pairs of greys 0, 0.1, 0.4 differ by 0.1, 0.4, 0.3 a pixel: twice that in L2 over 4 values, 1.6 / 3 on average.
    first, second = grey(0.0, 0.1, 0.4), grey(0.5, 0.6)
    assert diversity([first], pixel_range=1.0) == pytest.approx(1.6 / 3)
    assert diversity([first, second]) == pytest.approx(255 * (1.6 / 3 + 0.2) / 2)


@pytest.mark.parametrize("metric", [istd, diversity])
@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no prompts"),
        ([grey(0.5)], "at least"),
        (grey(0.1, 0.2), "4 axes"),
        ([grey(0.0, 128.0)], "128"),
        ([grey(0.0, math.nan)], "nan"),
        ([grey(0.0, 1.0).astype(np.int64)], "int64"),
        ([np.zeros((3, 0, 2, 1))], "shape"),
    ],
)
def test_what_is_no_sequence_of_pictures(metric: object, images: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        metric(images)  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_ddof_needs_frames() -> None:
    with pytest.raises(InputError, match="at least 3"):
        istd([grey(0.0, 1.0)], ddof=1)


def test_mse_and_psnr_by_hand() -> None:
    first, second = np.zeros((8, 8, 3)), np.full((8, 8, 3), 0.1)
    second[:4] = 0.3
    assert mse(first, second) == pytest.approx((0.01 + 0.09) / 2)
    assert psnr(first, second) == pytest.approx(10 * math.log10(1 / 0.05))
    assert psnr(second, second) == math.inf
    assert mse(Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8))) == pytest.approx(1 / 3)


def test_ssim_by_hand() -> None:
    # Of two constant pictures only the means count: (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2.
    first, second = np.full((8, 8, 3), 0.2), np.full((8, 8, 3), 0.6)
    assert ssim(first, second) == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4))
    assert ssim(first, first) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    noise = rng.random((16, 16, 3))
    assert ssim(noise, 1 - noise) < 0


def test_pictures_that_do_not_compare() -> None:
    picture = np.zeros((8, 8, 3))
    with pytest.raises(InputError, match="equal shapes"):
        mse(picture, np.zeros((8, 9, 3)))
    with pytest.raises(InputError, match="3 axes"):
        psnr(picture[..., 0], picture[..., 0])
    with pytest.raises(InputError, match="at least 7"):
        ssim(picture[:6], picture[:6])
    with pytest.raises(InputError, match="RGB"):
        lpips(picture[..., :1], picture[..., :1])


def test_lpips_takes_pictures_in_minus_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape == second.shape == (1, 3, 8, 8)
        return (first - second).abs().mean()

    monkeypatch.setattr(sys.modules["smooth_rt.metrics.reconstruction"], "lpips_network", lambda: distance)
    first, second = np.full((8, 8, 3), 0.25), np.full((8, 8, 3), 0.5)
    assert lpips(first, second) == pytest.approx(0.5)
    found = reconstruction(first, second)
    assert found.lpips == pytest.approx(0.5)
    assert found.lpips_missing is None


def test_reconstruction_says_why_lpips_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    lpips_network.cache_clear()
    first, second = np.zeros((8, 8, 3)), np.full((8, 8, 3), 0.1)
    found = reconstruction(first, second)
    assert (found.mse, found.psnr, found.ssim) == (mse(first, second), psnr(first, second), ssim(first, second))
    assert found.lpips is None
    assert found.lpips_missing is not None
    assert "pip install" in found.lpips_missing
