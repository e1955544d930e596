"""diffusers' pipeline as a peer, and PSNR against hand-computed values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.peers import diffusers_pipeline, worst_psnr
from smooth_rt.errors import EngineError
from smooth_rt.model import load_model


def test_psnr_of_an_even_difference() -> None:
    # MSE 0.01, peak 1: 20 dB.
    assert worst_psnr(np.full((1, 4, 4, 3), 0.5), np.full((1, 4, 4, 3), 0.6)) == pytest.approx(20.0)


def test_the_worst_image_counts() -> None:
    reference = np.zeros((3, 4, 4, 3))
    images = np.zeros((3, 4, 4, 3))
    images[1] += 0.001
    images[2] += 0.1
    assert worst_psnr(images, reference) == pytest.approx(20.0)


def test_identical_images_have_no_finite_psnr() -> None:
    images = np.random.default_rng(0).random((2, 4, 4, 3))
    assert worst_psnr(images, images.copy()) is None


def test_broken_images_do_not_pass_for_identical() -> None:
    images = np.zeros((1, 4, 4, 3))
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        worst_psnr(images, np.zeros((1, 4, 4, 3)))


def test_diffusers_pipeline_has_nothing_left_to_correct(tiny_model: Path) -> None:
    model = replace(load_model(tiny_model), scheduler_config={"_class_name": "PNDMScheduler", "beta_end": 0.012})
    scheduler = diffusers_pipeline(model).scheduler  # which would warn of each correction
    assert (scheduler.config["clip_sample"], scheduler.config["steps_offset"]) == (False, 1)
    assert scheduler.config["beta_end"] == 0.012
