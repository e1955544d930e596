"""Scatter plots: every label can be read, and belongs to its point."""

from __future__ import annotations

import itertools
import re
from html import unescape

from smooth_rt.evaluation.tables import inversion_plot
from smooth_rt.plot import WIDTH
from smooth_rt.scatter import HEIGHT, LETTER, LINE, Point, scatter_plot

TEXT = re.compile(r'<text x="([\d.-]+)" y="([\d.-]+)"(?: text-anchor="(\w+)")?>([^<]*)</text>')
# As of ten methods at guidance 1: four at 100 evaluations within 0.2 dB, four on the VAE's bound.
FOUND = {
    "ddim": (100, 29.21), "ddim-without-text": (100, 29.12), "negative-prompt": (100, 29.21), "null-text": (100, 29.21),
    "easyinv": (100, 28.42), "belm": (99, 29.65), "direct": (110, 29.65), "edict": (120, 29.65),
    "fixed-point": (300, 29.65), "spdinv": (352, 29.3),
}  # fmt: skip


def boxes(plot: str) -> dict[str, tuple[float, float, float, float]]:
    """Where each text lies."""
    found = {}
    for x, y, anchor, text in TEXT.findall(plot):
        said = unescape(text)
        wide = LETTER * len(said)
        left = float(x) - {"end": wide, "middle": wide / 2}.get(anchor, 0)
        found[said] = (left, float(y) - 4 - LINE / 2, left + wide, float(y) - 4 + LINE / 2)
    return found


def test_no_label_lies_on_another_nor_outside() -> None:
    rows = [
        {"variant": variant, "method": name, "evaluations": x, "gradient_evaluations": 0, "psnr": y + more}
        for name, (x, y) in FOUND.items()
        for variant, more in (("base", 0.0), ("smooth", 0.06))
    ]
    plot = inversion_plot([{"variant": "VAE bound", "evaluations": "", "psnr": 29.65}, *rows])
    found = boxes(plot)
    # Each method is named once, and those on one spot together.
    named = ", ".join(found).split(", ")
    assert all(named.count(name) == 1 for name in FOUND)
    assert "ddim, ddim-without-text, negative-prompt, null-text" in found
    assert {"base", "smooth", "VAE's bound", "PSNR, dB"} <= set(found)
    for left, top, right, bottom in found.values():
        assert left >= 0
        assert right <= WIDTH + 1
        assert top >= 0
        assert bottom <= HEIGHT
    for one, other in itertools.combinations(found, 2):
        a, b = found[one], found[other]
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), f"{one} on {other}"


def test_a_label_away_from_its_point_is_tied_to_it() -> None:
    points = [Point("base", name, name, x, 1.0) for name, x in (("one", 10.0), ("other one", 11.0), ("far", 100.0))]
    plot = scatter_plot(points, "work", "worth", 1.0, "bound")
    leads = re.findall(r'<line class="lead" x1="([\d.]+)" y1="([\d.]+)"', plot)
    dots = re.findall(r'<circle class="dot base" cx="([\d.]+)" cy="([\d.]+)"', plot)
    assert len(leads) == len(dots) == 3  # the level's line runs through all of them
    assert set(leads) == set(dots)
    assert plot.count("<title>") == 3


def test_points_without_a_height_and_none_at_all() -> None:
    assert "circle" not in scatter_plot([Point("base", "a", "a", 1.0, float("inf"))], "x", "y")
    assert scatter_plot([], "x", "y").startswith("<svg")
