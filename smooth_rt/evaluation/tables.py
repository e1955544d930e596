"""Results as Markdown tables in the layout of the paper's, and the plot of its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smooth_rt.plot import Curve, line_plot
from smooth_rt.scatter import Point, scatter_plot

__all__ = ["distances_plot", "inversion_plot", "markdown", "said_interval"]

# The plot is a file of its own, with no page to take colours from.
STYLE = (
    "svg{background:#fff;font:12px sans-serif}text{fill:#333}.grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
    ".lead{stroke:#aaa}.level{stroke:#777;stroke-dasharray:4}"
    "polyline.base{stroke:#b4552d}polyline.smooth{stroke:#1f6fb2}circle.base{fill:#b4552d}circle.smooth{fill:#1f6fb2}"
)


def markdown(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """A table under its title, notes below.

    Args:
        columns: key of a row to heading; a row that lacks one, or holds None there, shows "not measured".
    """
    lines = [f"## {title}", "", "| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join([*lines, "", *notes, ""])


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, list):
        return " to ".join(_cell(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def said_interval(between: tuple[float, float] | None, drawn: str) -> str:
    """What `metrics.ratio_interval` found over `drawn` ("prompts", "paths"), as a note says it."""
    if between is None:
        return f"too few {drawn} to say how far others may lie from that"
    return f"95 %, bootstrap over {drawn}: {between[0]:.3f} to {between[1]:.3f}"


def distances_plot(distances: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """The distance of each step along the paths, as SVG: the mean over paths, and what a tenth of them exceed.

    Args:
        distances: variant ("base", "smooth", …) to the distances between neighbours of each path.
    """
    curves = []
    for variant, found in distances.items():
        style, each = "smooth" if variant == "smooth" else "base", np.asarray(found)
        curves.append(Curve(style, f"{variant}, mean", f"{variant}, mean over paths", each.mean(0).tolist()))
        tenth = np.percentile(each, 90, axis=0).tolist()
        curves.append(Curve(style, f"{variant}, 90th", f"{variant}, 90th percentile", tenth))
    return _alone(line_plot(curves, lambda i: f"{i + 1}"))


def inversion_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """PSNR of each method against what it took, in evaluations of the UNet (a gradient is three), as SVG.

    Args:
        rows: of `evaluate inversion`; the VAE's bound, which takes no evaluations, is a line.
    """
    points, bound, styles = [], None, {}
    for row in rows:
        if row["evaluations"] == "":
            bound = row["psnr"]
            continue
        style = "smooth" if row["variant"] == "smooth" else "base"
        styles[style] = row["variant"]
        took = row["evaluations"] + 3 * row["gradient_evaluations"]
        points.append(Point(style, row["method"], f"{row['variant']}, {row['method']}", took, row["psnr"]))
    along = "evaluations of the UNet an image"
    return _alone(scatter_plot(points, along, "PSNR, dB", bound, "VAE's bound", styles))


def _alone(plot: str) -> str:
    """A plot as a file of its own."""
    named = plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace(">", f"><style>{STYLE}</style>", 1)
