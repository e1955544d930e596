"""The folder of everything that is kept between runs: built engines, compiled kernels, inversions."""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from engines.errors import InputError, reason
from engines.paths import absolute

__all__ = ["VARIABLE", "cache_root", "ensure_home", "pin_cache_root"]

LOG = logging.getLogger("smooth_rt")
VARIABLE = "SMOOTH_RT_CACHE"


def cache_root() -> Path:
    """Return the cache folder: SMOOTH_RT_CACHE, or `smooth-rt` in the user's cache folder.

    If SMOOTH_RT_CACHE is not set and the user's cache folder neither exists nor can be created, as in a container that
    runs under a user id without a home, it is in a folder of the temporary folder that belongs to the user alone.

    Raises:
        InputError: SMOOTH_RT_CACHE is a file or is below one, or there is no place for the cache.
    """
    pin_cache_root()
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        return _default()
    there = _nearest(Path(chosen))
    if not os.path.isdir(there):
        raise InputError(f"{VARIABLE}={chosen}: {there} is not a folder; set {VARIABLE} to one")
    return Path(chosen)


def pin_cache_root() -> None:
    """Make a relative SMOOTH_RT_CACHE absolute in the environment.

    The packages do so as they are imported: a program that changes its folder later, and the processes that it starts,
    go on with the same cache.

    Raises:
        InputError: as `absolute`.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen and not os.path.isabs(chosen):
        os.environ[VARIABLE] = str(absolute(chosen))


def ensure_home() -> None:
    """Set HOME for a user without a home folder: libraries look for one as they are imported, and some of them fail.

    It is the private folder that holds the cache of such a user, or, if that cannot be used, one that does not exist.
    """
    if os.path.isabs(os.path.expanduser("~")):
        return
    try:
        os.environ["HOME"] = str(_private())
    except OSError:
        os.environ["HOME"] = "/nonexistent"


def _nearest(path: Path) -> Path:
    """Return the nearest part of an absolute path that exists."""
    return next(part for part in (path, *path.parents) if os.path.lexists(part))


def _default() -> Path:
    from platformdirs import user_cache_path

    try:
        root = user_cache_path("smooth-rt", appauthor=False)
    except RuntimeError:
        root = Path()
    fault = _homeless(root) or _fault(root)
    if fault is None:
        return root
    try:
        root = _private() / ".cache" / "smooth-rt"
    except OSError as error:
        raise InputError(
            f"cache: {fault}, and {error.filename or 'the temporary folder'} cannot be used instead "
            f"({reason(error)}); set {VARIABLE} to a folder that can be written to"
        ) from error
    _log(f"cache: {fault}; using {root} instead, unless {VARIABLE} names another folder")
    return root


def _homeless(root: Path) -> str | None:
    """Return that the user has no home folder, or None, by the user's cache folder."""
    fault = "this user has no home folder"
    if not root.is_absolute():  # in older versions of platformdirs, a path that begins with `~`
        return fault
    with suppress(OSError):
        return fault if root.is_relative_to(_private_path()) else None  # where `ensure_home` put it
    return None


def _fault(root: Path) -> str | None:
    """Return why the user's cache folder cannot be used, or None if it can be read or created."""
    there = _nearest(root)
    if not os.path.isdir(there):
        return f"{root}: {there} is not a folder"
    if there == root:
        return None if os.access(root, os.R_OK | os.X_OK) else f"{root}: cannot be read (Permission denied)"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{root}: cannot be created in {there}"


def _private_path() -> Path:
    """Return the path of `_private`.

    Raises:
        OSError: there is no temporary folder, or the system has no user ids.
    """
    if not hasattr(os, "getuid"):
        raise OSError(errno.ENOSYS, "this system has no user ids")
    return Path(tempfile.gettempdir()).absolute() / f"smooth-rt-{os.getuid()}"


def _private() -> Path:
    """Return the user's own folder in the temporary folder, which is created.

    Raises:
        OSError: it cannot be created, or others can write there: what is in the cache is executed.
    """
    root = _private_path()
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "not a folder that this user alone can write to", str(root))
    return root


@cache
def _log(line: str) -> None:
    """Log a line once per process."""
    LOG.warning(line)
