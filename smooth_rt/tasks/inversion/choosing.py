"""Which method to take for so many evaluations: read from what `evaluate inversion` measured on the default model.

The figures lie in `assets/inversions.json`, written by `docs/experiments/inversions.py`. Of the rows that a budget
allows, the one of the highest PSNR is taken, and of those within NEAR of it that of the most steps, whose path is the
finest, at the least cost. Two kinds of rows are left out:

- direct, whose reconstruction is stored and says nothing of its noise;
- those whose noise deviates by more than WIDEST (the prior's is 1): such noise comes back exactly and to nothing else,
  so it can be neither mixed nor edited. Exact methods under guidance are of this kind.

How many gradients null-text and SPDInv take depends on the image, for both end their rounds early: their rows hold the
mean over the images that were measured, so one image may take more than the budget.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from smooth_rt.errors import InputError
from smooth_rt.ranges import as_whole, check, shown

__all__ = ["BUDGET", "Chosen", "choose"]

BUDGET = 100  # evaluations, where none is given: what DDIM in 50 steps takes
NEAR = 0.1  # dB
WIDEST = 1.25


@dataclass(frozen=True)
class Chosen:
    """A method, the number of its steps, and why, in one line."""

    method: str
    num_inference_steps: int
    reason: str


def choose(budget: int | None = None, guidance_scale: float | None = None) -> Chosen:
    """The method for at most `budget` evaluations of the UNet an image, there and back; a gradient counts as three.

    Of methods that take gradients that is so on average: see above.

    Args:
        budget: None is BUDGET.
        guidance_scale: of the way back. None and 1 are without guidance; any other takes the figures measured at 7.5.

    Raises:
        InputError: the budget is no whole number above 0, or nothing that was measured fits into it.
    """
    most = BUDGET if budget is None else as_whole(budget)
    if most is None or most < 1:
        raise InputError(f"budget={shown(budget)}: give a whole number of evaluations, such as 60")
    (scale,) = check(guidance_scale=1.0 if guidance_scale is None else guidance_scale)
    guided = scale != 1
    rows = [
        row
        for row in _rows()
        if (row["guidance_scale"] != 1) == guided and row["method"] != "direct" and row["noise_std"] <= WIDEST
    ]
    least = min(rows, key=_cost)
    fitting = [row for row in rows if _cost(row) <= most]
    if not fitting:
        raise InputError(
            f"budget={most}: the least that was measured takes {_cost(least):.0f} evaluations ({least['method']}, "
            f"{least['steps']} steps); give as many, or name a method"
        )
    best = max(row["psnr"] for row in fitting)
    near = [row for row in fitting if row["psnr"] >= best - NEAR]
    taken = min(near, key=lambda row: (-row["steps"], _cost(row), -row["psnr"]))
    reason = (
        f"{taken['method']} in {taken['steps']} steps: {_cost(taken):.0f} evaluations of the {most} allowed"
        f"{' on average' if taken['gradient_evaluations'] else ''}, "
        f"{taken['psnr']:.2f} dB on the default model at guidance {taken['guidance_scale']:g}"
    )
    return Chosen(taken["method"], taken["steps"], reason)


def _cost(row: dict[str, Any]) -> float:
    found: float = row["evaluations"] + 3 * row["gradient_evaluations"]
    return found


@cache
def _rows() -> list[dict[str, Any]]:
    file = resources.files("smooth_rt") / "assets" / "inversions.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows
