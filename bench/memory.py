"""Peak memory of the whole morph, by engine: each in a fresh process, so that engines do not share a peak.

`python -m bench.memory` is that process: it reads a `Morph` as JSON on stdin and writes the peaks as JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bench.apart import apart
from export.versions import peak_memory

__all__ = ["Morph", "peaks_of_morph"]

# The peak is that of one call of one network, so it does not grow with the steps.
STEPS = 2


class Morph(BaseModel):
    """A morph on one engine. `bundle` is None for eager, which takes model and LoRA; other engines take it alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    bundle: Path | None
    model: str
    config: str | None = None
    lora: str | None
    lora_strength: float
    batch_sizes: tuple[int, ...]
    prompt: str
    frames: int
    height: int
    width: int
    guidance_scale: float
    seed: int


def peaks_of_morph(morph: Morph) -> dict[int, int]:
    """Peak resident bytes by batch size, from a process of its own. Batch sizes run in rising order, since a peak
    never falls again.

    Raises:
        EngineError: the process failed; its last line is passed on.
    """
    peaks = apart(
        "bench.memory",
        [],
        lambda said: f"{morph.engine}: the process that measures memory failed ({said}); try a smaller --batch-sizes",
        morph.model_dump_json(),
    )
    return {int(size): int(peak) for size, peak in peaks.items()}


def _run(morph: Morph) -> dict[int, int]:
    import torch

    from smooth_rt.pipeline import SmoothPipeline

    if morph.bundle is None:
        pipe = SmoothPipeline.from_pretrained(
            morph.model, morph.lora, morph.lora_strength, engine=morph.engine, config=morph.config
        )
    else:
        pipe = SmoothPipeline.from_engines(morph.bundle, engine=morph.engine)
    peaks = {}
    with pipe:
        for size in sorted(morph.batch_sizes):
            pipe.batch_size = size
            pipe.interpolate(
                morph.prompt,
                frames=morph.frames,
                generator=[torch.Generator().manual_seed(morph.seed + i) for i in range(2)],
                height=morph.height,
                width=morph.width,
                num_inference_steps=STEPS,
                guidance_scale=morph.guidance_scale,
            )
            peaks[size] = peak_memory()
    return peaks


if __name__ == "__main__":
    print(json.dumps(_run(Morph.model_validate_json(sys.stdin.read()))))
