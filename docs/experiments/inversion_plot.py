"""The plot that `evaluate inversion` makes, from a table that it wrote: PSNR against evaluations of the UNet.

    python docs/experiments/inversion_plot.py docs/measurements/2026-11-25-inversions.md "Guidance 7.5" \\
        docs/experiments/inversion.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from smooth_rt.evaluation.tables import inversion_plot

COLUMNS = {"model": "variant", "method": "method"}
NUMBERS = {"PSNR": "psnr", "evaluations": "evaluations", "gradients": "gradient_evaluations"}


def rows(table: str) -> list[dict[str, Any]]:
    """Those of a Markdown table; of the VAE's bound the evaluations are empty."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    head, _, *body = cells
    found = []
    for line in body:
        row = dict(zip(head, line, strict=True))
        words = {key: row[column] for column, key in COLUMNS.items()}
        found.append({**words, **{key: float(row[of]) if row[of] else "" for of, key in NUMBERS.items()}})
    return found


if __name__ == "__main__":
    page, heading, output = sys.argv[1:]
    section = Path(page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    Path(output).write_text(inversion_plot(rows(section)), encoding="utf-8")
