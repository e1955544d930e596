"""The price of smoothness, as a table and a picture: `python docs/experiments/trade_off.py OUTPUT.svg NAME=istd.json …`

Each file is what `smooth-rt evaluate istd` wrote for a LoRA beside its base model; NAME may be `LoRA@strength`, and
those of one LoRA are joined by a line. To the right: images as different as the base model's. Down: lower ISTD.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52
COLOURS = ("#1f6fb2", "#b4552d", "#2e8b57", "#7a4fa3", "#a08000", "#555555", "#c03a6b", "#3a8f9c")
GOAL = (0.95, 0.40)  # diversity at least, ISTD at most, over the base model's
EVEN_PACE = 0.56  # straight motion at an even pace, which no map from noise has: ideal_istd.py


class Point(NamedTuple):
    """One LoRA at one strength, over its base model."""

    lora: str
    strength: str
    istd: float
    between: tuple[float, float]  # 95 %
    mean_step: float
    unevenness: float  # ISTD over the mean step
    diversity: float


def read(argument: str) -> Point:
    name, _, path = argument.partition("=")
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    over = found["smooth_over_base"]
    lora, _, strength = name.partition("@")
    low, high = found["istd_95_percent"]
    return Point(
        lora, strength or "1", over["istd"], (low, high), over["mean_step"], over["istd_over_mean_step"],
        over["diversity"],
    )  # fmt: skip


def table(points: Sequence[Point]) -> str:
    lines = [
        "| LoRA | strength | ISTD | 95 % | mean step | ISTD / mean step | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in points:
        between = f"{p.between[0]:.2f} to {p.between[1]:.2f}"
        numbers = f"{p.istd:.2f} | {between} | {p.mean_step:.2f} | {p.unevenness:.2f} | {p.diversity:.2f}"
        lines.append(f"| {p.lora} | {p.strength} | {numbers} |")
    return "\n".join(lines)


def drawing(points: Sequence[Point]) -> str:
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    left = min(0.8, *(p.diversity for p in points)) - 0.02
    right = max(1.05, *(p.diversity for p in points)) + 0.05
    top = max(1.1, *(p.between[1] for p in points)) + 0.02
    bottom = 0.3

    def at(diversity: float, istd: float) -> tuple[float, float]:
        return LEFT + wide * (diversity - left) / (right - left), TOP + high * (top - istd) / (top - bottom)

    marks = []
    for k in range(round(left * 20) + 1, round(right * 20) + 1):
        x, y = at(k / 20, bottom)
        if LEFT <= x <= WIDTH - RIGHT:
            marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y:.1f}"/>')
            marks.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{k / 20:.2f}</text>')
    for k in range(3, int(top * 10) + 1):
        x, y = at(left, k / 10)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{k / 10:.1f}</text>')
    x, y = at(*GOAL)
    marks.append(
        f'<rect class="goal" x="{x:.1f}" y="{y:.1f}" width="{WIDTH - RIGHT - x:.1f}" height="{TOP + high - y:.1f}"/>'
    )
    marks.append(f'<text x="{x + 6:.1f}" y="{y + 16:.1f}">goal</text>')
    x, y = at(left, EVEN_PACE)
    marks.append(f'<line class="pace" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    marks.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}">motion at an even pace; fading lies below</text>')
    x, y = at(1, 1)
    marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    marks.append(f'<text x="{x - 9:.1f}" y="{y - 7:.1f}" text-anchor="end">base model</text>')
    ordered = sorted(points, key=lambda p: (p.lora, float(p.strength)))
    for colour, (lora, some) in zip(COLOURS * 9, groupby(ordered, key=lambda p: p.lora), strict=False):
        group = list(some)
        # The base model is every LoRA at strength 0.
        line = [(1.0, 1.0), *((p.diversity, p.istd) for p in group)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*one) for one in line))
        marks.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-dasharray="3 3"/>')
        for p in group:
            (x, y), (_, low), (_, up) = at(p.diversity, p.istd), at(0, p.between[0]), at(0, p.between[1])
            marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{up:.1f}" stroke="{colour}"/>')
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
            said = lora if p.strength == "1" else p.strength
            marks.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{escape(said)}</text>')
    marks.append(
        f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 12}" text-anchor="middle">diversity over the base model\'s</text>'
    )
    marks.append(
        f'<text transform="translate(16 {TOP + high / 2}) rotate(-90)" text-anchor="middle">'
        "ISTD over the base model's</text>"
    )
    style = (
        "svg{background:#fff;font:12px sans-serif}text{fill:#333}.grid{stroke:#e4e4e4}"
        ".goal{fill:#2e8b57;fill-opacity:.13;stroke:#2e8b57}.pace{stroke:#999;stroke-dasharray:6 4}"
    )
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}><style>{style}</style>{"".join(marks)}</svg>\n'


def main(output: str, *arguments: str) -> None:
    points = [read(argument) for argument in arguments]
    print(table(points))
    Path(output).write_text(drawing(points), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
