"""Publish a folder whole or not at all: it is made beside its place and renamed into it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engines.contract import DERIVED, NETWORKS
from engines.errors import BundleError
from engines.select import BACKENDS

__all__ = ["PARTIAL", "abandoned", "at_work", "discard", "foreign", "held", "said_size", "staging"]

# All that lies in a bundle: at its top, and in the folder of a variant.
_VARIANT = re.compile(rf"({'|'.join(BACKENDS)})-[a-z0-9_-]+")
_TOP = frozenset({"manifest.json", "config"})
_HALF = re.compile(r"\.manifest\.json\.partial-\d+")  # of a process that died as it put another in its place
_FORMER = {  # format 2 had one folder a backend, and in it the graphs alone
    part: re.compile(rf"({'|'.join(NETWORKS)})\.(onnx|onnx\.data|xml|bin)") for part in ("onnx", "openvino")
}
_PARTS = frozenset(
    {*NETWORKS, *DERIVED, "model_index.json", "scheduler", "tokenizer", "lora.safetensors"}
    | {"unet_features", "unet_features_vjp"}  # of format 3
)

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".npy", ".npz"})  # somebody's, wherever they lie

_OURS: set[Path] = set()  # partial folders that this process is working in
_PUBLISH_TRIES = 3
_LOOKS = 10  # at a folder that other processes change meanwhile
PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old|gone)-(?P<pid>\d+)(-[0-9a-f]{8})?")


@contextmanager
def staging(target: Path, needed: int | None = None) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends without an exception.

    The folder is `.<name>.partial-<pid>`. A bundle that stands at `target` stays until the moment of the swap. On any
    exception, KeyboardInterrupt included, the fresh folder is removed and the old bundle is left as it was. What
    processes that died left beside `target` is cleaned up first.

    Args:
        target: where the bundle goes.
        needed: bytes that the bundle will take, checked against the free space beforehand.

    Raises:
        BundleError: the path cannot be written, something else than a bundle stands there, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    if not target.name:
        raise BundleError(f"{target}: not a place to write to; name a new folder")
    made: list[Path] = []
    begun = done = False
    try:
        _check_replaceable(target)
        made = _make_parents(target.parent)
        for left in abandoned(target.parent, target.name):
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free
        if needed is not None and free < needed:
            raise BundleError(
                f"{target}: needs {said_size(needed)} of disk and {said_size(free)} are free; "
                "free some or name another folder"
            )
        partial = _beside(target, "partial")
        partial.mkdir()
        begun = True
        _OURS.add(partial)
        with held(partial):
            yield partial
            _open_to_readers(partial)
            _publish(partial, target)
        done = True
    except OSError as error:
        raise _refusal(target, error, needed) from error
    finally:
        if begun:
            shutil.rmtree(partial, ignore_errors=True)
            _OURS.discard(partial)
        if not done:
            for folder in made:
                _remove_empty(folder)


def _open_to_readers(folder: Path) -> None:
    """Give every file the rights that the user's umask gives: safetensors keeps those that it writes to the owner."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | rights)


def _check_replaceable(target: Path) -> None:
    for above in target.parents:
        if above.exists() and not above.is_dir():
            raise BundleError(f"{target}: lies under {above}, which is a file; name another folder")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise BundleError(f"{target}: is a file; name a folder")
    reason = foreign(target)
    if reason is not None:
        raise BundleError(
            f"{target}: is not a bundle ({reason}) and will not be replaced; name a new or an empty folder"
        )


def foreign(folder: Path) -> str | None:
    """Why `folder` is somebody's own and never replaced or removed; None: it is empty, or a bundle, even a damaged one.

    A bundle has a manifest.json, whatever is in it, and holds nothing that a build does not write. What another process
    removes meanwhile is nobody's.
    """
    for _ in range(_LOOKS):
        try:
            return _strange(folder)
        except FileNotFoundError:
            if not folder.exists():
                return None
    return "it changes all the time"


def _strange(folder: Path) -> str | None:
    with os.scandir(folder) as entries:
        folders = {entry.name: entry.is_dir() for entry in entries}
    names = sorted(folders)
    variants = [name for name in names if _VARIANT.fullmatch(name) and folders[name]]
    ours = {*_TOP, *_FORMER, *variants}
    strange = [name for name in names if name not in ours and not _HALF.fullmatch(name)]
    for part, graphs in _FORMER.items():
        if folders.get(part):
            strange += sorted(f"{part}/{e.name}" for e in (folder / part).iterdir() if not graphs.fullmatch(e.name))
    for variant in variants:
        parts = sorted(entry.name for entry in (folder / variant).iterdir())
        strange += [f"{variant}/{part}" for part in parts if part not in _PARTS]
    for kept in ("config", *variants):
        inside = sorted(path for path in (folder / kept).rglob("*") if path.suffix.lower() in _PICTURES)
        strange += [path.relative_to(folder).as_posix() for path in inside]
    if strange:
        return f"it holds {strange[0]}"
    return "it has no manifest.json" if names and "manifest.json" not in names else None


def discard(folder: Path) -> None:
    """Remove a bundle; whoever looks meanwhile sees all of it or none, as of `staging`.

    Raises:
        OSError: it cannot be removed. FileNotFoundError: another process has done so.
    """
    if folder.is_symlink():
        folder.unlink()  # put here by somebody: what it leads to is theirs
        return
    gone = _beside(folder, "gone")
    folder.rename(gone)
    try:
        shutil.rmtree(gone)
    except OSError:
        with suppress(OSError):
            gone.rename(folder)
        raise


def _beside(folder: Path, kind: str) -> Path:
    """A free name of a folder that this process works in; a process of another container may have the same number."""
    path = folder.with_name(f".{folder.name}.{kind}-{os.getpid()}")
    return path.with_name(f"{path.name}-{secrets.token_hex(4)}") if os.path.lexists(path) else path


def _make_parents(parent: Path) -> list[Path]:
    """Create `parent`; the folders that were missing, deepest first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # somebody has put something there meanwhile


def abandoned(folder: Path, name: str | None = None) -> list[Path]:
    """What builds that died left in `folder`: of the target `name` alone, or of every one.

    A bundle whose swap was cut off half-way is brought back first. What a living process works in is left alone.
    """
    left = []
    for sibling in sorted(folder.iterdir()):
        found = PARTIAL.fullmatch(sibling.name)
        if not found or (name is not None and found["name"] != name):
            continue
        if sibling in _OURS or at_work(sibling, int(found["pid"])):
            continue
        target = sibling.with_name(found["name"])
        if found["kind"] == "old" and not target.exists():
            with suppress(FileNotFoundError):  # another process does the same
                sibling.rename(target)
        else:
            left.append(sibling)
    return left


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock `folder` as one that this process is at work in, for as long as the block runs and the process lives.

    The lock is seen from other containers, too, in which the process has another number. Where a disk has no locks, the
    number in the folder's name is all that tells.
    """
    # Waits for who asks `at_work` at this moment, which is over at once.
    descriptor = _locked(folder, probe=False)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def at_work(folder: Path, pid: int) -> bool:
    """Whether another process is at work in `folder`, which is named by its number."""
    try:
        descriptor = _locked(folder, probe=True)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return _alive(pid)


def _locked(folder: Path, probe: bool) -> int | None:
    """A descriptor that holds the lock of `folder`, of a `probe` one that others may share; None where there are none.

    Raises:
        BlockingIOError: of a probe: somebody holds the lock.
    """
    if os.name == "nt":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB if probe else fcntl.LOCK_EX)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _alive(pid: int) -> bool:
    """Whether there is another process of that number."""
    if pid == os.getpid():
        return False  # not among ours, so an earlier process had the same number
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _publish(partial: Path, target: Path) -> None:
    old = _beside(target, "old")
    for attempt in range(_PUBLISH_TRIES):
        try:
            if target.exists():
                target.rename(old)
            partial.rename(target)
            break
        except BaseException as error:
            if old.exists() and not target.exists():
                old.rename(target)
            # Another process published the same bundle between our two renames: take its place.
            taken = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
            if not taken or attempt == _PUBLISH_TRIES - 1 or not partial.exists():
                raise
    shutil.rmtree(old, ignore_errors=True)


def said_size(count: int) -> str:
    """Bytes as a message gives them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _refusal(target: Path, error: OSError, needed: int | None) -> BundleError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{said_size(shutil.disk_usage(target.parent).free)} free"
        except OSError:
            free = "free space unknown"
        wanted = "more space" if needed is None else f"{said_size(needed)} in all"
        return BundleError(f"{target}: the disk is full ({free}); this needs {wanted}: free some and try again")
    if error.errno is None:  # numpy's, where a write stops short
        return BundleError(f"{target}: cannot be written ({error}); the disk may be full: free some and try again")
    what = error.strerror or str(error)
    where = f" at {error.filename}" if error.filename and str(error.filename) != str(target) else ""
    mend = "name another folder (SMOOTH_RT_CACHE moves the cache)"
    return BundleError(f"{target}: cannot be written ({what}{where}); {mend}")
