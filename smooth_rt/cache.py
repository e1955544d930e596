"""The cache of built engines: where it is, what is there, whether it can still be used, and removing what cannot."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle, Source, digest_json
from engines.cache_dir import cache_root
from engines.paths import absolute
from engines.staging import abandoned, discard, foreign, said_size
from smooth_rt.errors import BundleError, EngineError, InputError, SmoothRTError

__all__ = [
    "Entry",
    "bundle_of",
    "cache_root",
    "compiled",
    "examine",
    "find",
    "limit",
    "list_bundles",
    "make_room",
    "parse_size",
    "prune",
    "timings",
    "used",
]

LOG = logging.getLogger("smooth_rt")
LIMIT = "SMOOTH_RT_CACHE_LIMIT"
DEFAULT_LIMIT = "40G"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_KEY = 64  # characters of an engine's key, which what is compiled for it is named by
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(?:I?B)?", re.IGNORECASE)


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


def compiled() -> Path:
    """The folder of the cache for what providers of ONNX Runtime compile as an engine opens."""
    return cache_root() / "compiled"


def timings() -> Path:
    """The folder of the cache for what TensorRT timed in builds, a file for each version and architecture."""
    return cache_root() / "timing"


def bundle_of(source: Source) -> Path:
    """The folder of what is built from these weights. Backends, precisions and sizes do not decide it: a bundle holds
    engines of several."""
    lora = None if source.lora is None else [source.lora.digest, source.lora.strength]
    return cache_root() / "bundles" / digest_json([source.digests, lora])[:32]


def find(bundle: Path) -> Path:
    """Return the absolute path of a bundle: `bundle` itself, or the folder of that name in the cache.

    The cache is asked only for a plain name that does not exist in the current folder.

    Raises:
        InputError: as `absolute` and `cache_root`.
    """
    named = absolute(bundle)
    if os.path.lexists(named) or bundle.name != str(bundle):
        return named
    cached = cache_root() / "bundles" / bundle
    return cached if cached.is_dir() else named


def list_bundles(root: Path | None = None, verify: bool = False) -> list[Entry]:
    """Every folder under `root` (None: the cache); `verify` compares digests too. Builds under way are left out."""
    folder = cache_root() / "bundles" if root is None else root
    if not folder.is_dir():
        return []
    left = [Entry(path, _size(path), None, "left by a build that died") for path in abandoned(folder)]
    # Dotted names are builds, under way or dead.
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [entry for entry in [*(examine(path, verify) for path in found), *left] if os.path.lexists(entry.path)]


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
            fault = fault or bundle.stale(built, elsewhere=not built.variant.architecture.startswith("cpu-"))
        except EngineError as error:
            fault = fault or str(error)
    return Entry(path, size, bundle, fault)


def _size(path: Path) -> int:
    """Bytes on the disk; a file that several variants share counts once, what goes meanwhile not at all."""
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                file = Path(folder, name).stat()
                sizes[file.st_dev, file.st_ino] = file.st_size
    return sum(sizes.values())


def _last_used(entry: Entry) -> float:
    """Seconds since the epoch; what is gone meanwhile comes first."""
    try:
        return entry.path.stat().st_mtime
    except OSError:
        return 0.0


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
                discard(entry.path)
                removed.append(entry)
            except FileNotFoundError:  # another process was faster
                continue
            except OSError as error:
                refused.append(f"{entry.path}: cannot be removed ({error.strerror}); remove it by hand")
    if refused:
        raise SmoothRTError("; ".join(refused))
    if root is None:
        _forget_compiled(list_bundles())
        if every:
            shutil.rmtree(timings(), ignore_errors=True)
    return removed


def _forget_compiled(entries: Sequence[Entry]) -> None:
    """Remove what was compiled for engines of no bundle in the cache. A bundle elsewhere has it compiled again."""
    keys = {key for entry in entries for key in _keys(entry)}
    for part in _compiled():
        if part.path.name[:_KEY] not in keys:
            shutil.rmtree(part.path, ignore_errors=True)


def _keys(entry: Entry) -> set[str]:
    """Of a bundle's engines."""
    variants = () if entry.bundle is None else entry.bundle.variants
    return {record.key for built in variants for record in built.engines}


def _compiled() -> list[Entry]:
    """What providers and TensorRT for RTX compiled as engines opened: a folder for each engine and GPU."""
    folder = compiled()
    return [Entry(path, _size(path), None, None) for path in (folder.iterdir() if folder.is_dir() else ())]


def _timings() -> list[Entry]:
    """All that TensorRT timed, in one; a build writes its file anew, so the folder tells when it was used last."""
    return [Entry(timings(), _size(timings()), None, None)] if timings().is_dir() else []


def parse_size(text: str, name: str) -> int:
    """Bytes of "20G", "500 MB" or "1.5TiB", in powers of 1024.

    Raises:
        InputError: it is no size; `name` is what it is said of.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InputError(f"{name}={text}: no size; give for example 20G or 500M (0 is no limit)")
    size = float(found[1]) * _UNITS[found[2].upper()]
    if size == math.inf:
        raise InputError(f"{name}={text[:40]}...: too large for a size; give for example 20G or 500M (0 is no limit)")
    if size < 1 and found[1].strip("0."):  # as 0 it would be no limit
        raise InputError(f"{name}={text}: less than one byte; give for example 20G or 500M (0 is no limit)")
    return int(size)


def limit() -> int | None:
    """The bytes that the cache may hold: SMOOTH_RT_CACHE_LIMIT, or 40 GiB; None where that is 0."""
    return parse_size(os.environ.get(LIMIT) or DEFAULT_LIMIT, LIMIT) or None


def used(bundle: Path) -> None:
    """Note that a bundle of the cache is used now: the one that was not for longest goes first."""
    with suppress(OSError):  # a cache that can only be read is used all the same
        os.utime(bundle)


def make_room(most: int, keep: Path | None = None, root: Path | None = None) -> list[Entry]:
    """Remove bundles of the cache, what was compiled for engines and what TensorRT timed, the one not used for longest
    first, until it holds at most `most` bytes. What was compiled for a bundle goes with it, at the latest.

    Args:
        most: bytes.
        keep: a bundle that stays whatever its age, with what was compiled for it.
        root: the folder of bundles; None is the cache's, with what was compiled.

    Returns:
        what was removed. What no build wrote, and what cannot be removed, is left.
    """
    bundles = [entry for entry in list_bundles(root) if entry.ours]
    parts = [*_compiled(), *_timings()] if root is None else []
    total = sum(entry.size for entry in [*bundles, *parts])
    kept = {entry.path for entry in bundles if keep is not None and entry.path.resolve() == keep.resolve()}
    for entry in [one for one in bundles if one.path in kept]:
        own = _keys(entry)
        kept |= {part.path for part in parts if part.path.name[:_KEY] in own}
    removed: list[Entry] = []
    for entry in sorted([*parts, *bundles], key=_last_used):
        if total <= most:
            break
        own = _keys(entry)
        for one in (entry, *(part for part in parts if part.path.name[:_KEY] in own)):
            if one.path in kept or one in removed:
                continue
            try:
                shutil.rmtree(one.path) if one in parts else discard(one.path)
            except FileNotFoundError:  # another process was faster
                total -= one.size
                continue
            except OSError as error:
                LOG.warning("%s: cannot be removed (%s)", one.path, error.strerror)
                break
            total -= one.size
            removed.append(one)
            LOG.info("cache over %s: removed %s, not used for longest", said_size(most), one.path.name)
    return removed
