"""Inversions that take long, on the disk: what was found so far, in a safetensors file that says of what.

A file is named by all that decides its numbers: the pixels and the prompt, the digests of the weights, the engine,
the schedule and the method's settings. It is replaced whole, so one that is there is complete, and a run that was
stopped goes on from it to the same result bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smooth_rt.errors import SmoothRTError, reason

if TYPE_CHECKING:
    from smooth_rt.tasks.inversion.base import Job

__all__ = ["Kept", "Store", "image_names", "keep_of"]

LOG = logging.getLogger("smooth_rt")
FORMAT = 1
EVERY = 5.0  # seconds between two writes of a run
MOST_BYTES = 2 * 2**30  # of all files; those not used for longest go first


@dataclass(frozen=True)
class Kept:
    """An inversion of g images that share their embeddings, as far as it has come.

    Args:
        path: the latents of every level of DDIM inversion, from the image's on [T + 1, g, C, h, w].
        latents: those of the last step that was fitted [g, C, h, w].
        embed: what the next step begins from [L, D].
        embeds: what was found for each step so far [L, D].
    """

    path: Tensor
    latents: Tensor
    embed: Tensor
    embeds: list[Tensor]

    def after(self, latents: Tensor, embed: Tensor) -> Kept:
        """One step on."""
        return Kept(self.path, latents, embed, [*self.embeds, embed])


class Store:
    """The file of one inversion; without a path nothing is kept.

    Args:
        shapes: of `path` and `latents` as they must be, and the number of steps.
    """

    def __init__(self, path: Path | None, sizes: Sequence[int], steps: int) -> None:
        self.path = path
        self._sizes = tuple(sizes)
        self._steps = steps
        self._said = time.monotonic()

    def read(self) -> Kept | None:
        """What is kept, or None. A file that cannot be read is passed over with a warning."""
        if self.path is None or not self.path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            held = load_file(self.path)
            found = Kept(held["path"], held["latents"], held["embed"], list(held["embeds"]))
            fits = found.path.shape == (self._steps + 1, *self._sizes) and found.latents.shape == self._sizes
            if not fits or len(found.embeds) > self._steps:
                raise ValueError("of other sizes")
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            LOG.warning("%s: cannot be read (%s); inverted anew", self.path, reason(error))
            return None
        os.utime(self.path)
        done = len(found.embeds)
        LOG.info("null-text: %s", f"{done} of {self._steps} steps are kept in {self.path}")
        return found

    def write(self, kept: Kept, last: bool) -> None:
        """Keep it, if it is the `last` of this run or some time has passed. A disk that refuses is warned of."""
        if self.path is None or not (last or time.monotonic() - self._said >= EVERY):
            return
        from safetensors.torch import save

        from smooth_rt.writers import write_files

        self._said = time.monotonic()
        embeds = torch.stack(kept.embeds) if kept.embeds else kept.embed.new_zeros((0, *kept.embed.shape))
        held = {"path": kept.path, "latents": kept.latents, "embed": kept.embed, "embeds": embeds}
        content = save({name: tensor.contiguous() for name, tensor in held.items()})
        try:
            write_files(self.path.parent, {self.path.name: content})
            _make_room(self.path.parent, self.path)
        except SmoothRTError as error:
            LOG.warning("null-text: not kept: %s", error)


def image_names(pixels: Tensor, texts: Sequence[str]) -> tuple[str, ...]:
    """What tells each image, with its prompt, from others.

    Args:
        pixels: [N, 3, H, W].
    """
    shape = repr(tuple(pixels.shape[1:])).encode()
    return tuple(
        hashlib.sha256(b"\0".join((shape, one.contiguous().numpy().tobytes(), text.encode()))).hexdigest()
        for one, text in zip(pixels, texts, strict=True)
    )


def keep_of(job: Job, method: str, images: Sequence[int]) -> Store:
    """Where the inversion of some of a job's images is kept."""
    sizes = (len(images), *job.latents.shape[1:])
    steps = len(job.schedule.steps)
    if not job.names:
        return Store(None, sizes, steps)
    from engines.bundle import digest_json
    from smooth_rt.build import cache_root

    pipe = job.pipe
    decides: dict[str, Any] = {
        "format": FORMAT, "method": method, "images": [job.names[i] for i in images], "digests": dict(pipe.digests),
        "engine": pipe.engine, "precision": pipe.precision, "guidance_scale": job.guidance_scale,
        "prediction_type": job.schedule.prediction_type, "steps": [list(step) for step in job.schedule.steps],
    }  # fmt: skip
    if not job.early_stop:
        decides["early_stop"] = False
    return Store(cache_root() / "inversions" / f"{digest_json(decides)[:32]}.safetensors", sizes, steps)


def _make_room(folder: Path, newest: Path) -> None:
    files = [(file.stat(), file) for file in folder.glob("*.safetensors") if file != newest]
    total = sum(stat.st_size for stat, _ in files) + newest.stat().st_size
    for stat, file in sorted(files, key=lambda one: one[0].st_mtime):
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size
