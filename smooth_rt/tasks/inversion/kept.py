"""Inversions that take long, on the disk: what was found so far, in a safetensors file that says of what.

A file is named by all that decides its numbers: the pixels and the prompt, the digests of the weights, the engine,
the schedule and the method's settings. It is replaced whole, so one that is there is complete, and a run that was
stopped goes on from it to the same result bit for bit.

One thing that may decide the numbers has no name: a callback that changes the latents (`Watched`). What it changed is
not kept, and where the latents that are kept are not those that it leaves, they are not taken.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smooth_rt.digests import digest_tensors
from smooth_rt.errors import EngineError, InputError, SmoothRTError, reason
from smooth_rt.tasks import checks

if TYPE_CHECKING:
    from smooth_rt.loop import Move, StepCallback
    from smooth_rt.pipeline import SmoothPipeline
    from smooth_rt.schedule import Step
    from smooth_rt.tasks.inversion.base import Job

__all__ = ["Fit", "Kept", "Watched", "cohorts", "image_names", "not_finite", "opened", "walk_on"]

LOG = logging.getLogger("smooth_rt")
FORMAT = 3
EVERY = 5.0  # seconds between two writes of a run
MOST_BYTES = 2 * 2**30  # of all files; those not used for longest go first


class Watched:
    """A caller's callback, or None, and whether it ever `changed` the latents: by what it returned, or in place."""

    def __init__(self, callback: StepCallback | None = None) -> None:
        self.callback = callback
        self.changed = False

    def __call__(
        self, pipe: SmoothPipeline, i: int, timestep: int, tensors: dict[str, Tensor]
    ) -> Mapping[str, Tensor] | None:
        if self.callback is None:
            return None
        before = tensors["latents"].clone()
        value = self.callback(pipe, i, timestep, tensors)
        self.changed = self.changed or not torch.equal(checks.answer(value, tensors["latents"]), before)
        return value


@dataclass(frozen=True)
class Kept:
    """An inversion of g images that are fitted together, as far as it has come.

    Args:
        levels: the latents from the image's on, each [g, C, h, w]: T + 1 where the way there is done.
        latents: those that the last step left [g, C, h, w].
        embeds: what was fitted to each step back so far [L, D]; a method that fits none has none.
    """

    levels: list[Tensor]
    latents: Tensor
    embeds: list[Tensor]


class _Store:
    """The file of one inversion; without a path nothing is kept.

    Args:
        method: as a message names it.
        latents: the shape of one level, `embed`: of what a step back is fitted.
        steps: T.
        same: whether the weights are those that the path was made for.

    Attributes: `taken` is whether what it holds was read.
    """

    def __init__(
        self,
        path: Path | None,
        method: str,
        latents: Sequence[int],
        embed: Sequence[int],
        steps: int,
        same: Callable[[], bool] = lambda: True,
    ) -> None:
        self.path = path
        self.taken = False
        self._method = method
        self._latents = tuple(latents)
        self._embed = tuple(embed)
        self._steps = steps
        self._same = same
        self._said = time.monotonic()

    def read(self) -> Kept | None:
        """What is kept, or None. A file that cannot be read is passed over with a warning."""
        if self.path is None or not self.path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in ("levels", "latents", "embeds")}
            if metadata.get("digest") != digest_tensors(held, self.path.stem):
                raise ValueError("its tensors are not those that were written")
            found = Kept(list(held["levels"]), held["latents"], list(held["embeds"]))
            shapes = {one.shape for one in (*found.levels, found.latents)}, {one.shape for one in found.embeds}
            fits = shapes[0] == {self._latents} and shapes[1] <= {self._embed}
            if not fits or len(found.levels) > self._steps + 1 or len(found.embeds) > self._steps:
                raise ValueError("of other sizes")
        except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
            LOG.warning("%s: cannot be read (%s); inverted anew", self.path, reason(error))
            return None
        with suppress(OSError):  # of a cache that may only be read
            os.utime(self.path)
        there, back = len(found.levels) - 1, len(found.embeds)
        LOG.info("%s: goes on from %d steps there and %d back, kept in %s", self._method, there, back, self.path)
        self.taken = True
        return found

    def write(self, kept: Kept, last: bool) -> None:
        """Keep it, if it is the `last` of this run or some time has passed. A disk that refuses is warned of."""
        if self.path is None or not (last or time.monotonic() - self._said >= EVERY):
            return
        if not self._same():
            LOG.warning("%s: not kept: the LoRA's strength was changed meanwhile", self._method)
            self.path = None
            return
        from safetensors.torch import save

        from smooth_rt.writers import write_files

        self._said = time.monotonic()
        embeds = torch.stack(kept.embeds) if kept.embeds else kept.latents.new_zeros((0, *self._embed))
        held = {"levels": torch.stack(kept.levels), "latents": kept.latents.contiguous(), "embeds": embeds}
        content = save(held, {"digest": digest_tensors(held, self.path.stem)})
        try:
            write_files(self.path.parent, {self.path.name: content})
            _make_room(self.path.parent, self.path)
        except SmoothRTError as error:
            LOG.warning("%s: not kept: %s", self._method, error)


@dataclass
class Fit:
    """Images that are fitted together, by their places in the job, what is known of them so far, and its file."""

    images: tuple[int, ...]
    store: _Store
    kept: Kept


def opened(job: Job, method: str, groups: Sequence[tuple[int, ...]]) -> list[Fit]:
    """Each group of a job's images as far as it is kept; one that is not begins with the image's own level.

    The callback is shown the levels that are kept, as if they were walked. If it changes one, all begins anew.
    """
    fits = []
    for group in groups:
        store = _store(job, method, group)
        begins = job.latents[list(group)]
        fits.append(Fit(group, store, store.read() or Kept([begins], begins, [])))
    watched = job.callback_on_step_end
    for cohort in cohorts(fits, lambda kept: len(kept.levels)):
        levels = zip(*(fit.kept.levels[1:] for fit in cohort), strict=True)
        for i, (step, level) in enumerate(zip(job.schedule.inverse_steps, levels, strict=False)):
            watched(job.pipe, i, step.timestep, {"latents": torch.cat(level)})
            if watched.changed:
                LOG.info("%s: what is kept is not taken: callback_on_step_end changes the latents", method)
                return [_anew(job, fit) for fit in fits]
    return fits


def _anew(job: Job, fit: Fit) -> Fit:
    begins = job.latents[list(fit.images)]
    fit.store.taken = False
    return Fit(fit.images, fit.store, Kept([begins], begins, []))


def cohorts(fits: Sequence[Fit], done: Callable[[Kept], int]) -> Iterator[list[Fit]]:
    """Those that have come equally far, together."""
    ordered = sorted(fits, key=lambda fit: done(fit.kept))
    for _, some in itertools.groupby(ordered, lambda fit: done(fit.kept)):
        yield list(some)


def walk_on(
    job: Job,
    fits: Sequence[Fit],
    steps: Sequence[Step],
    move: Move,
    after: Callable[[int, Tensor], Kept],
) -> None:
    """Take steps for `fits`, which have come equally far. What each step leaves is kept, also if the next one fails.

    Args:
        steps: those that are left.
        move: takes one step for the images of all of them, in their order.
        after: from the number of a fit and its latents after a step to what is then known of it.

    Raises:
        InputError: the callback changed latents, and the steps before, which it was not shown, were kept.
        EngineError: as `SmoothPipeline.walk`.
    """
    watched = job.callback_on_step_end

    def settle(pipe: SmoothPipeline, i: int, timestep: int, tensors: dict[str, Tensor]) -> Mapping[str, Tensor] | None:
        value = watched(pipe, i, timestep, tensors)
        left = torch.split(checks.answer(value, tensors["latents"]), [len(fit.images) for fit in fits])
        if watched.changed and any(fit.store.taken for fit in fits):
            raise InputError(
                f"callback_on_step_end: changed the latents of timestep {timestep}, but the steps before it were taken "
                "from what is kept, and not shown to it; give keep=False"
            )
        for number, fit in enumerate(fits):
            fit.kept = after(number, left[number])
            if not watched.changed:
                fit.store.write(fit.kept, last=i + 1 == len(steps))
        return value

    try:
        job.pipe.walk(torch.cat([fit.kept.latents for fit in fits]), steps, move, settle)
    except BaseException:  # interrupted, or no longer finite: what is done is kept
        if not watched.changed:
            for fit in fits:
                fit.store.write(fit.kept, last=True)
            if any(fit.store.path is not None for fit in fits):
                LOG.info("inversion: the steps that are done are kept; the same again goes on from them")
        raise


def not_finite(job: Job, method: str, index: int, timestep: int, image: int, mend: str) -> EngineError:
    """The error of a loss, in step `index` of the method's, that is not finite."""
    keeps = job.names and index and not job.callback_on_step_end.changed
    kept = f"the {index} steps before it are kept" if keeps else "nothing is kept"
    return EngineError(
        f"{method}: step {index + 1} of {len(job.schedule.steps)} (timestep {timestep}): the loss of image {image + 1} "
        f"is not finite on {job.pipe.runs_on} ({kept}); {mend}"
    )


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


def _store(job: Job, method: str, images: Sequence[int]) -> _Store:
    """Where the inversion of some of a job's images is kept."""
    steps = len(job.schedule.steps)
    latents, embed = (len(images), *job.latents.shape[1:]), job.prompt_embeds.shape[1:]
    if not job.names:
        return _Store(None, method, latents, embed, steps)
    from engines.bundle import digest_json
    from smooth_rt.cache import cache_root

    pipe = job.pipe
    digests = pipe.digests
    decides: dict[str, Any] = {
        "format": FORMAT, "method": method, "images": [job.names[i] for i in images], "digests": dict(digests),
        "engine": pipe.engine, "precision": pipe.precision, "guidance_scale": job.guidance_scale,
        "prediction_type": job.schedule.prediction_type, "steps": [list(step) for step in job.schedule.steps],
    }  # fmt: skip
    if not job.early_stop:
        decides["early_stop"] = False
    path = cache_root() / "inversions" / f"{digest_json(decides)[:32]}.safetensors"
    # Each setting of a strength makes them anew, so one that was set back is noticed, too.
    return _Store(path, method, latents, embed, steps, same=lambda: pipe.digests is digests)


def _make_room(folder: Path, newest: Path) -> None:
    files = []
    with suppress(OSError):  # other processes make room as well
        for entry in os.scandir(folder):
            if entry.name.endswith(".safetensors"):
                with suppress(OSError):
                    files.append((entry.stat(), Path(entry.path)))
    total = sum(stat.st_size for stat, _ in files)
    for stat, file in sorted(files, key=lambda one: one[0].st_mtime):
        if total <= MOST_BYTES:
            return
        if file != newest:
            with suppress(OSError):
                file.unlink(missing_ok=True)
            total -= stat.st_size
