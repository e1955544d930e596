"""Scatter plots as inline SVG, in the manner of `smooth_rt.plot`: labels stand where nothing else does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from smooth_rt.plot import LEFT, RIGHT, WIDTH, ticks

__all__ = ["Point", "scatter_plot"]

HEIGHT, TOP, BOTTOM = 400, 34, 48
NEAR = 10  # points that lie so near share a label; in the units of the view box
LINE, LETTER = 14, 6.8  # of a label: its height, and the width of a letter at most


@dataclass(frozen=True)
class Point:
    """One point: its CSS class, the label beside it, the name that is read out, and its place (x above 0)."""

    style: str
    label: str
    name: str
    x: float
    y: float


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def scatter_plot(
    points: Sequence[Point],
    along: str,
    up: str,
    level: float | None = None,
    level_name: str = "",
    styles: Mapping[str, str] | None = None,
) -> str:
    """The points over a logarithmic axis named `along` and an even one named `up`, with a line at `level` if given.

    Labels of points that lie nearly on one another are written as one, each once.

    Args:
        styles: what each CSS class stands for, for the legend.
    """
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    points = [point for point in points if math.isfinite(point.y)]
    heights = [point.y for point in points] + ([] if level is None else [level])
    marked = _even(min(heights, default=0.0), max(heights, default=1.0))
    first, last = (math.log10(f(point.x for point in points)) for f in (min, max)) if points else (0.0, 1.0)
    first, last = first - 0.05, max(last, first + 0.1) + 0.05

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - first) / (last - first)
        return LEFT + wide * across, TOP + high * (1 - (y - marked[0]) / (marked[-1] - marked[0]))

    marks, said = [], []
    for tick in marked:
        y = at(10**first, tick)[1]
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _marks(first, last):
        x = at(tick, marked[0])[0]
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    marks.append(f'<text x="{LEFT + wide / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(along)}</text>')
    marks.append(f'<text x="4" y="{TOP - 18}">{escape(up)}</text>')
    taken = []
    if level is not None:
        y = at(10**first, level)[1]
        marks.append(f'<line class="level" x1="{LEFT}" x2="{LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT + wide + 14}" y="{y + 4:.1f}">{escape(level_name)}</text>')
        taken += [_Box(LEFT, y - 1, LEFT + wide, y + 1), _Box(LEFT + wide + 10, y - 8, WIDTH, y + 8)]
        said.append(f"{level_name}: {level:.1f}.")
    for row, (style, name) in enumerate((styles or {}).items()):
        x, y = LEFT + wide + 18, HEIGHT - BOTTOM - 16 * row
        marks.append(f'<circle class="dot {style}" cx="{x}" cy="{y}" r="3.2"/>')
        marks.append(f'<text x="{x + 9}" y="{y + 4}">{escape(name)}</text>')
        taken.append(_Box(x - 4, y - 8, WIDTH, y + 8))
    spots = [(point, *at(point.x, point.y)) for point in points]
    dots = []
    for point, x, y in spots:
        tip = escape(f"{point.name}: {point.x:.4g}, {point.y:.2f}")
        dots.append(
            f'<circle class="dot {point.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{tip}</title></circle>'
        )
        said.append(f"{point.name}: {point.x:.0f}, {point.y:.1f}.")
        taken.append(_Box(x - 4, y - 4, x + 4, y + 4))
    for x, y, label in _together(spots):
        box, side = _free(x, y, label, taken)
        taken.append(box)
        middle = (box.top + box.bottom) / 2
        if abs(middle - y) > 1:  # too far away to be taken for the point's own
            end = box.left - 2 if side == "start" else box.right + 2
            marks.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{middle:.1f}"/>')
        where = box.left if side == "start" else box.right
        marks.append(f'<text x="{where:.1f}" y="{middle + 4:.1f}" text-anchor="{side}">{escape(label)}</text>')
    drawn = "".join([*marks, *dots])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(" ".join(said))}">{drawn}</svg>'


def _together(spots: Sequence[tuple[Point, float, float]]) -> Iterator[tuple[float, float, str]]:
    """Where a label belongs, and what it says: points nearer than NEAR to a first one share one."""
    left = list(spots)
    while left:
        _, x, y = left[0]
        near = [spot for spot in left if math.hypot(spot[1] - x, spot[2] - y) < NEAR]
        left = [spot for spot in left if spot not in near]
        names = {spot[0].label for spot in near}
        # The rest of these labels' points a little farther away need none of their own.
        left = [s for s in left if not (s[0].label in names and math.hypot(s[1] - x, s[2] - y) < 3 * NEAR)]
        yield x, y, ", ".join(dict.fromkeys(spot[0].label for spot in near))


def _free(x: float, y: float, label: str, taken: Sequence[_Box]) -> tuple[_Box, str]:
    """The place nearest to a point where a label meets nothing, and the text's anchor there."""
    wide = LETTER * len(label)
    found = None
    for away in range(2 * HEIGHT // LINE):
        shift = LINE * ((away + 1) // 2) * (1 if away % 2 else -1)
        for side, left in (("start", x + 7 + abs(shift) / 3), ("end", x - 7 - abs(shift) / 3 - wide)):
            box = _Box(left, y + shift - LINE / 2, left + wide, y + shift + LINE / 2)
            inside = box.left >= LEFT and box.right <= WIDTH and box.top >= 2 and box.bottom <= HEIGHT - BOTTOM + 4
            found = found or (box, side)
            if inside and not any(box.meets(other) for other in taken):
                return box, side
    assert found is not None
    return found  # a plot as full as this has no place better than another


def _marks(first: float, last: float) -> list[float]:
    """Round numbers between two powers of ten: more of them where these lie near."""
    leading = (1, 2, 5) if last - first > 1.2 else (1, 1.5, 2, 3, 4, 5, 7)
    powers = range(math.floor(first), math.ceil(last) + 1)
    return [m * 10.0**power for power in powers for m in leading if first <= math.log10(m * 10.0**power) <= last]


def _even(least: float, most: float) -> list[float]:
    """Equal round steps from at or below `least` to at or above `most`."""
    step = ticks(max(most - least, 1e-6))[1]
    first = math.floor(least / step + 1e-9)
    return [i * step for i in range(first, max(first + 1, math.ceil(most / step - 1e-9)) + 1)]
