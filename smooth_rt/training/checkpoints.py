"""The checkpoints of a run: safetensors files of one folder, each whole or absent, the newest few kept.

A checkpoint's metadata hold its `step`, the run's `settings` as JSON and a `digest` of its tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt.digests import digest_tensors
from smooth_rt.errors import InputError, ModelError, SmoothRTError, reason
from smooth_rt.training.settings import differences

__all__ = ["Checkpoints", "NotFiniteError", "StateError"]

PREFIX = "checkpoint-"


class StateError(SmoothRTError):
    """The state cannot be written, or must not be."""


class NotFiniteError(StateError):
    """A loss, a gradient or a weight is NaN or infinite: the state leads nowhere."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints under `folder`, which is made with the first of them; the newest `keep` stay."""

    folder: Path
    keep: int = 2

    def paths(self) -> list[Path]:
        """Oldest first."""
        found = self.folder.glob(f"{PREFIX}*.safetensors")
        return sorted(path for path in found if path.is_file() and path.stem.removeprefix(PREFIX).isdecimal())

    @staticmethod
    def step(path: Path) -> int:
        """How many steps were done when it was written."""
        return int(path.stem.removeprefix(PREFIX))

    def write(self, step: int, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the state after `step` steps, and remove all but the newest few.

        Raises:
            NotFiniteError: a tensor holds NaN or an infinite value; nothing is written over a state that was good.
            StateError: the file cannot be written.
        """
        self._put(PREFIX, step, settings, tensors)
        self.prune()

    def prune(self) -> None:
        """Remove all but the newest few, which a run that was killed may not have come to.

        Raises:
            StateError: one cannot be removed.
        """
        for old in self.paths()[: -self.keep]:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                raise StateError(f"{old}: cannot be removed ({reason(error)}); remove it") from error

    def write_failed(self, step: int, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        """Write a state that leads nowhere beside the checkpoints, of which it is none; its path.

        Raises:
            NotFiniteError, StateError: as `write`.
        """
        return self._put("failed-", step, settings, tensors)

    def _put(self, prefix: str, step: int, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        if bad := _not_finite(tensors):
            raise NotFiniteError(f"step {step}: {bad} is not finite")
        target = self.folder / f"{prefix}{step:08d}.safetensors"
        partial = target.with_suffix(".partial")
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                metadata = {"step": str(step), "settings": json.dumps(settings), "digest": digest_tensors(contiguous)}
                save_file(contiguous, partial, metadata)
                _sync(partial)
                partial.replace(target)
            finally:
                # Whatever stopped it, and what a run that was killed may have left: ours, and what safetensors writes
                # beside the file that it is told, under a name of its own, before it renames it.
                for left in (*self.folder.glob("*-*.partial"), *self.folder.glob(".tmp??????")):
                    left.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{target}: cannot be written ({reason(error)}); make room") from error
        return target

    def read(
        self,
        path: Path,
        settings: Mapping[str, Any],
        shapes: Mapping[str, torch.Size],
        together: Iterable[Mapping[str, torch.Size]] = (),
    ) -> dict[str, Tensor]:
        """The tensors of a checkpoint: those of `shapes`, and of each of `together` all or none.

        Raises:
            InputError: it was made with other settings (see `settings.differences`).
            ModelError: it is not a whole checkpoint.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            found = json.loads(metadata["settings"])
            if not isinstance(found, dict) or int(metadata["step"]) != self.step(path):
                raise ValueError("its metadata are not those of a run")
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise self._damaged(path, reason(error)) from error
        except KeyError as error:
            raise self._damaged(path, f"no {error.args[0]} in its metadata") from error
        if changed := differences(settings, found):
            names = ", ".join(changed)
            said = " (the folder may be the same: a picture or a caption is not)" if "data" in changed else ""
            raise InputError(f"{path}: made with another {names}; give the same, or name another --output{said}")
        wanted = dict(shapes)
        for group in together:
            if any(key in tensors for key in group):
                wanted.update(group)
        for key, shape in wanted.items():
            if key not in tensors:
                raise self._damaged(path, f"{key} is missing")
            if tensors[key].shape != shape:
                raise self._damaged(path, f"{key} is {list(tensors[key].shape)} and should be {list(shape)}")
        if bad := _not_finite(tensors):
            raise self._damaged(path, f"{bad} is not finite")
        if metadata.get("digest", "") not in ("", digest_tensors(tensors)):
            raise self._damaged(path, "its tensors are not those that were written")
        return tensors

    def set_aside(self, path: Path) -> None:
        """Take a damaged checkpoint out of the row, under another name."""
        try:
            path.replace(path.with_suffix(".damaged"))
        except OSError as error:
            raise StateError(f"{path}: cannot be renamed ({reason(error)}); delete it") from error

    @staticmethod
    def _damaged(path: Path, why: str) -> ModelError:
        return ModelError(f"{path}: not a whole checkpoint ({why}); delete it to begin anew")


def _sync(path: Path) -> None:
    """On the disk before it takes its name: else a power cut may leave the name with nothing behind it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or an infinite value."""
    return next((key for key, value in tensors.items() if not bool(torch.isfinite(value).all())), None)
