"""Small line plots as inline SVG that take their colours from the page: classes `base` and `smooth`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["LEFT", "RIGHT", "WIDTH", "Curve", "line_plot", "ticks"]

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 170, 18, 44
LABEL_GAP = 18  # least distance between two labels, in the units of the view box


@dataclass(frozen=True)
class Curve:
    """One line: its CSS class, the label at its end, the name that is read out, and its values (0 or more)."""

    style: str
    label: str
    name: str
    values: Sequence[float]


def ticks(highest: float) -> list[float]:
    """From 0 in equal round steps (1, 2 or 5 times a power of ten) to the first at or above `highest`."""
    if highest <= 0 or not math.isfinite(highest):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(power * m for m in (1, 2, 5, 10) if highest <= 5 * power * m * (1 + 1e-9))
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def line_plot(curves: Sequence[Curve], name_of: Callable[[int], str]) -> str:
    """The curves over a common axis from 0; `name_of(i)` labels place i of the horizontal axis."""
    count = max(len(curve.values) for curve in curves)
    marked = ticks(max(max(curve.values) for curve in curves))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(i: int, value: float) -> tuple[float, float]:
        return LEFT + wide * i / max(1, count - 1), TOP + high * (1 - value / marked[-1])

    marks = []
    for tick in marked:
        y = at(0, tick)[1]
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i in range(0, count, -(-count // 12)):
        x = at(i, 0)[0]
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{escape(name_of(i))}</text>')
    ends, said = [], []
    for curve in curves:
        points = [at(i, value) for i, value in enumerate(curve.values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks.append(f'<polyline class="line {curve.style}" points="{line}"/>')
        for i, (x, y) in enumerate(points):
            tip = escape(f"{curve.name}, {name_of(i)}: {curve.values[i]:.2f}")
            marks.append(
                f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{tip}</title></circle>'
            )
        ends.append((points[-1][1], curve))
        said.append(f"{curve.name} ({curve.label}): {', '.join(f'{value:.1f}' for value in curve.values)}.")
    for y, curve in _apart(ends):
        marks.append(f'<text class="{curve.style}" x="{LEFT + wide + 14}" y="{y + 4:.1f}">{escape(curve.label)}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(" ".join(said))}">{"".join(marks)}</svg>'
    )


def _apart(ends: list[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """The ends of the lines from top to bottom, moved down so that their labels do not overlap."""
    placed: list[tuple[float, Curve]] = []
    for y, curve in sorted(ends, key=lambda end: end[0]):
        placed.append((max(y, placed[-1][0] + LABEL_GAP) if placed else y, curve))
    return placed
