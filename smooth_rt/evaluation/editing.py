"""Editing real images by prompt: what stays outside the object, beside whether the edit happened. One without the other
says nothing: an edit that does nothing keeps all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from engines.paths import absolute
from smooth_rt.errors import InputError, reason
from smooth_rt.evaluation.rows import ASIDE, in_batches
from smooth_rt.images import read
from smooth_rt.metrics.attributes import Attributes
from smooth_rt.metrics.reconstruction import outside
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import check, seeds_from
from smooth_rt.text_files import read_lines, without_marks

__all__ = ["EditCase", "EditingTask", "edit_cases", "summarise_editing"]


@dataclass(frozen=True)
class EditCase:
    """An image, what it shows, what it shall show, and a mask that is white where it may change."""

    path: Path
    mask: Path
    caption: str
    target: str


def edit_cases(folder: Path | None = None) -> list[EditCase]:
    """Those of a folder's metadata.jsonl: `file_name`, `text`, `target`, `mask`; None: of the images that ship.

    Raises:
        InputError: there is none, or a line lacks something.
    """
    folder = absolute(folder or Path(str(resources.files("smooth_rt"))) / "assets" / "examples")
    listed = folder / "metadata.jsonl"
    found, number = [], 0
    try:
        lines = read_lines(listed)
    except OSError as error:
        raise InputError(f"{listed}: {reason(error)}; give a folder with metadata.jsonl") from error
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007 (the message names the line)
            if line:
                record = json.loads(line)
                name, mask, text, target = (record[key] for key in ("file_name", "mask", "text", "target"))
                if not all(isinstance(one, str) for one in (name, mask, text, target)):
                    raise TypeError("each a text")
                found.append(EditCase(folder / name, folder / mask, without_marks(text), without_marks(target)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{listed}:{number}: needs file_name, text, target and mask ({reason(error)})") from error
    if not found:
        raise InputError(f"{listed}: names no image")
    return found


@dataclass(frozen=True)
class EditingTask:
    """Item i is case i, edited from its caption to its target.

    Args:
        attributes: judges whether the edit happened; None: that is not judged.

    Raises:
        InputError: an option out of its range.
    """

    cases: tuple[EditCase, ...]
    attributes: Attributes | None = field(metadata=ASIDE)
    edit_method: str = "eq15"
    edit_strength: float = 0.8
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    images_per_batch: int = 16

    def __post_init__(self) -> None:
        check(batch=self.images_per_batch, edit_method=self.edit_method, edit_strength=self.edit_strength)
        seeds_from(self.seed, len(self.cases))

    def batches(self) -> list[list[int]]:
        return in_batches(len(self.cases), self.images_per_batch)

    def measure(self, pipe: SmoothPipeline, items: Sequence[int]) -> list[dict[str, Any]]:
        """PSNR and SSIM outside the mask, and whether the target's object and colour are seen."""
        cases = [self.cases[item] for item in items]
        pictures = [case.path for case in cases]
        targets = [case.target for case in cases]
        made = pipe.edit(
            pictures,
            targets,
            [case.caption for case in cases] if self.edit_method == "eq15" else None,
            edit_method=self.edit_method,
            edit_strength=self.edit_strength,
            height=self.height,
            width=self.width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(self.seed + item) for item in items],
            output_type="np",
        )
        edited = cast("NDArray[np.float32]", made.images)
        size = edited.shape[1:3]
        originals = read(pictures, *size).permute(0, 2, 3, 1).numpy()
        masks = read([case.mask for case in cases], *size)[:, 0].numpy() > 0
        judged = self.attributes.judge(edited, targets) if self.attributes is not None else None
        rows = []
        for k in range(len(items)):
            if masks[k].all():
                raise InputError(f"{cases[k].mask}: covers the whole picture; leave something outside it")
            psnr, ssim = outside(originals[k], edited[k], masks[k])
            seen = (judged.objects[k], judged.colours[k]) if judged else (None, None)
            rows.append({"psnr": psnr, "ssim": ssim, "object": seen[0], "colour": seen[1]})
        return rows


def summarise_editing(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means of `psnr` and `ssim` outside the mask; `happened`, the share that shows the target's object, and `kept`,
    the share whose background is the target's; None where nothing is judged."""

    def share(name: str) -> float | None:
        told = [row[name] for row in rows if row[name] is not None]
        return sum(told) / len(told) if told else None

    return {
        "psnr": float(np.mean([row["psnr"] for row in rows])),
        "ssim": float(np.mean([row["ssim"] for row in rows])),
        "happened": share("object"),
        "kept": share("colour"),
    }
