"""The bundles of built engines in the cache: what is there, whether it can still be used, and removing what cannot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle
from engines.staging import abandoned
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


def find(bundle: Path) -> Path:
    """The folder that is meant: `bundle` itself, or the one of that name in the cache."""
    cached = cache_root() / "bundles" / bundle
    return cached if not bundle.exists() and cached.is_dir() else bundle


def list_bundles(root: Path | None = None, verify: bool = False) -> list[Entry]:
    """Every bundle under `root` (None: the cache), by path; `verify` compares digests too."""
    folder = cache_root() / "bundles" if root is None else root
    if not folder.is_dir():
        return []
    # Dotted names are builds under way.
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [examine(path, verify) for path in found]


def examine(path: Path, verify: bool = True) -> Entry:
    """The bundle at `path`, and what is wrong with it, if anything: damaged, or stale on one of its backends."""
    size = _size(path)
    try:
        bundle = Bundle.open(path, verify)
    except BundleError as error:
        return Entry(path, size, None, str(error))
    fault = None
    for backend in bundle.backends:
        try:
            fault = fault or bundle.stale(backend)
        except EngineError as error:
            fault = fault or str(error)
    return Entry(path, size, bundle, fault)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def prune(root: Path | None = None, every: bool = False) -> list[Entry]:
    """Remove the bundles that cannot be used, or `every` one, and what builds that died left; returns what was removed.

    Raises:
        SmoothRTError: a folder cannot be removed.
    """
    folder = cache_root() / "bundles" if root is None else root
    left = abandoned(folder) if folder.is_dir() else []
    removed = [entry for entry in list_bundles(root) if every or entry.fault is not None]
    removed += [Entry(path, _size(path), None, "left by a build that died") for path in left]
    for entry in removed:
        try:
            shutil.rmtree(entry.path)
        except OSError as error:
            raise SmoothRTError(f"{entry.path}: cannot be removed ({error.strerror}); remove it by hand") from error
    return removed
