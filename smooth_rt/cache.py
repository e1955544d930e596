"""The bundles of built engines in the cache: what is there, whether it can still be used, and removing what cannot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle
from engines.staging import abandoned, foreign
from smooth_rt.build import cache_root
from smooth_rt.errors import BundleError, EngineError, SmoothRTError

__all__ = ["Entry", "examine", "find", "list_bundles", "prune"]


@dataclass(frozen=True)
class Entry:
    """One folder of the cache. `bundle` is None where it cannot be opened; `fault` says why it cannot be used."""

    path: Path
    size: int
    bundle: Bundle | None
    fault: str | None

    @property
    def ours(self) -> bool:
        """Whether a build wrote this folder."""
        return self.path.name.startswith(".") or foreign(self.path) is None


def find(bundle: Path) -> Path:
    """The folder that is meant: `bundle` itself, or the one of that name in the cache."""
    cached = cache_root() / "bundles" / bundle
    return cached if not bundle.exists() and cached.is_dir() else bundle


def list_bundles(root: Path | None = None, verify: bool = False) -> list[Entry]:
    """Every folder under `root` (None: the cache); `verify` compares digests too. Builds under way are left out."""
    folder = cache_root() / "bundles" if root is None else root
    if not folder.is_dir():
        return []
    left = [Entry(path, _size(path), None, "left by a build that died") for path in abandoned(folder)]
    # Dotted names are builds, under way or dead.
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [examine(path, verify) for path in found] + left


def examine(path: Path, verify: bool = True) -> Entry:
    """The bundle at `path`, and what is wrong with it, if anything: damaged, or stale on one of its backends."""
    size = _size(path)
    try:
        bundle = Bundle.open(path, verify)
    except BundleError as error:
        return Entry(path, size, None, str(error))
    fault = None
    for built in bundle.variants:
        try:
            fault = fault or bundle.stale(built)
        except EngineError as error:
            fault = fault or str(error)
    return Entry(path, size, bundle, fault)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def prune(root: Path | None = None, every: bool = False) -> list[Entry]:
    """Remove the bundles that cannot be used, or `every` one, and what builds that died left; returns what was removed.

    A folder that no build has written is left alone, whatever its fault.

    Raises:
        SmoothRTError: a folder cannot be removed; the others have been.
    """
    removed, refused = [], []
    for entry in list_bundles(root):
        if entry.ours and (every or entry.fault is not None):
            try:
                # A link was put here by somebody; what it leads to is theirs.
                entry.path.unlink() if entry.path.is_symlink() else shutil.rmtree(entry.path)
                removed.append(entry)
            except OSError as error:
                refused.append(f"{entry.path}: cannot be removed ({error.strerror}); remove it by hand")
    if refused:
        raise SmoothRTError("; ".join(refused))
    return removed
