"""Which method a budget takes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import Tensor

from smooth_rt import cli
from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion import METHODS, choose, choosing


def row(method: str, steps: int, psnr: float, evaluations: float, **more: float) -> dict[str, Any]:
    base = {"guidance_scale": 1.0, "noise_std": 0.8, "gradient_evaluations": 0.0}
    return {"method": method, "steps": steps, "psnr": psnr, "evaluations": evaluations, **base, **more}


def test_the_best_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("ddim", 10, 27.0, 20), row("ddim", 50, 29.0, 100), row("edict", 10, 30.0, 40), row("belm", 20, 29.95, 39),
        row("direct", 5, 31.0, 10), row("belm", 50, 31.0, 60, noise_std=5.0), row("spdinv", 10, 31.0, 20,
        gradient_evaluations=100), row("null-text", 50, 29.0, 100, guidance_scale=7.5),
    ]  # fmt: skip
    monkeypatch.setattr("smooth_rt.tasks.inversion.choosing._rows", lambda: rows)
    # Nearly as good as edict, in more steps; direct, wide noise and costly gradients are passed over.
    assert choose(60).method == "belm"
    assert choose(60).num_inference_steps == 20
    assert choose(25).method == "ddim"
    assert choose(400).method == "spdinv"
    assert choose(100, 3.0).method == "null-text"
    assert "39 evaluations of the 60 allowed, 29.95 dB" in choose(60).reason
    assert "320 evaluations of the 400 allowed on average" in choose(400).reason
    for budget, said in (
        (19, r"budget=19: the least .* takes 20 evaluations \(ddim, 10 steps\)"),
        (0, "budget=0: give"),
    ):
        with pytest.raises(InputError, match=said):
            choose(budget)


@pytest.mark.parametrize("scale", [None, 1.0, 7.5])
@pytest.mark.parametrize("budget", [30, 60, 100, 400, 1000, 2000])
def test_what_the_shipped_table_picks_keeps_within_the_budget(budget: int, scale: float | None) -> None:
    found = choose(budget, scale)
    guided = scale is not None and scale != 1
    (row,) = (
        row
        for row in choosing._rows()
        if (row["method"], row["steps"], row["guidance_scale"] != 1)
        == (found.method, found.num_inference_steps, guided)
    )
    assert choosing._cost(row) <= budget
    told = METHODS[found.method].evaluations(found.num_inference_steps, guided)
    assert row["evaluations"] == told.there + told.back
    assert row["gradient_evaluations"] <= told.gradients


def test_invert_says_what_it_picked(
    pipe: SmoothPipeline, images: Tensor, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "smooth_rt")
    found = pipe.invert(images[0], "dog", method="auto", budget=60)
    picked = choose(60)
    assert found.method == picked.method
    assert picked.reason in caplog.text
    with pytest.raises(InputError, match="budget=60: it is for method 'auto'"):
        pipe.invert(images[0], "dog", method="ddim", budget=60)
    with pytest.raises(InputError, match="num_inference_steps=7: method 'auto' picks them by budget"):
        pipe.invert(images[0], "dog", method="auto", num_inference_steps=7)
    asked = ["invert", "a.png", "--prompt", "p", "--method", "auto", "--num-inference-steps"]
    for steps in ("7", "50"):
        assert cli.main([*asked, steps]) == 2
        assert f"--num-inference-steps={steps}: --method auto picks the steps" in capsys.readouterr().err
    with pytest.raises(InputError, match="method='auto' is unknown"):
        pipe.interpolate("dog", images[:2], method="auto")
    assert cli.main(["invert", "a.png", "--prompt", "p", "--method", "auto", "--budget", "1"]) == 2
    assert "budget=1: the least that was measured takes" in capsys.readouterr().err
