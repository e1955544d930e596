"""A look at the LoRA while it is trained: ISTD on a fixed set of prompts, and a morph strip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from engines.paths import absolute
from smooth_rt.evaluation import Smoothness, measure_istd
from smooth_rt.model import Model
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.training.world import World
from smooth_rt.writers import encode_png, write_files

__all__ = ["Watch"]


@dataclass(frozen=True)
class Watch:
    """Measures `model`, whose UNet is being trained, on prompts, always from the same noises.

    Args:
        folder: where `istd.jsonl` and `morphs/{step}.png` go: a row of frames a prompt.
        prompts: few; each costs `frames` samplings.
        world: whose trackers are told.
    """

    model: Model
    folder: Path
    prompts: Sequence[str]
    world: World
    frames: int = 11
    num_inference_steps: int = 25
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", absolute(self.folder))

    def __call__(self, step: int) -> Smoothness:
        """Measure, and write what was found.

        Raises:
            InputError: the files cannot be written.
        """
        pipe = SmoothPipeline.from_pretrained(self.model, engine="eager")
        pipe.size = self.model.dims.supported_image_size
        strips: list[np.ndarray] = []
        found = measure_istd(
            pipe,
            self.prompts,
            frames=self.frames,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            look=lambda frames: strips.append(np.concatenate(list(frames), axis=1)),
        )
        line = {
            "step": step,
            "istd": found.istd.istd,
            "mean_step": found.istd.mean_step,
            "istd_over_mean_step": found.istd.istd_over_mean_step,
            "diversity": found.diversity,
        }
        sheet = Image.fromarray((np.concatenate(strips) * 255).round().astype(np.uint8))
        log = self.folder / "istd.jsonl"
        before = log.read_bytes() if log.exists() else b""
        write_files(self.folder, {f"morph-{step:08d}.png": encode_png(sheet)})
        write_files(self.folder, {log.name: before + json.dumps(line).encode() + b"\n"})
        numbers = {f"watch/{name}": value for name, value in line.items() if name != "step"}
        self.world.report(numbers, step)
        return found
