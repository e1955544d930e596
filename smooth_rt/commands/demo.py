"""demo: the page that shows what the project does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smooth_rt.commands.options import ModelOptions, listed
from smooth_rt.commands.progress import build_progress
from smooth_rt.commands.running import Stopwatch

__all__ = ["demo"]


def demo(
    options: ModelOptions,
    output: Annotated[Path, typer.Option(help="The folder to write. Files of the same names are replaced.")] = Path(
        "smooth-rt-demo"
    ),
    engine: Annotated[
        str, typer.Option(help="Comma-separated; the pictures are the first one's, the others are compared with it.")
    ] = "openvino,onnxruntime",
    small: Annotated[bool, typer.Option("--small", help="Fewer steps and frames, to see that all parts work.")] = False,
) -> dict[str, Any]:
    """Build engines, morph, invert and edit with and without the Smooth-LoRA, and write one page."""
    from smooth_rt.demo import run_demo
    from smooth_rt.demo_report import FEW_STEPS, table

    engines = listed(engine)
    watch = Stopwatch()
    with build_progress("") as progress:
        made = run_demo(
            output,
            options.model,
            options.chosen_lora,
            options.lora_strength,
            engines,
            small,
            progress,
            options.model_config,
        )
    found: dict[str, Any] = {"command": "demo", "page": str(made.page), "seconds": watch.seconds}
    if options.json:
        return {**found, "reused": made.reused, "files": [str(path) for path in made.files], "results": made.rows}
    told = ", ".join(f"{name} {'reused from the cache' if kept else 'built'}" for name, kept in made.reused.items())
    note = {"note": FEW_STEPS} if small else {}
    return {**found, "engines": told, "files": f"{len(made.files)} in {output}", **note, "results": table(made.rows)}
