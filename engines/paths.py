"""Paths that stay valid after the current folder has changed."""

from __future__ import annotations

import os
from pathlib import Path

from engines.errors import InputError

__all__ = ["absolute", "expanded", "recorded"]


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by the home folder.

    As in a shell, `~name` is a plain name if there is no such user.

    Raises:
        InputError: `path` begins with `~`, and the user has no home folder.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        return Path(text)
    found = os.path.expanduser(text)
    if found == text and text[1:2] in ("", "/", os.sep):
        raise InputError(f"{text}: HOME is not set, and this user has no home folder; give an absolute path")
    return Path(found)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return `path` as an absolute path, with `~` expanded.

    Symbolic links are not resolved, so that a link that is pointed elsewhere later is followed. Therefore `..` is
    removed only where no link precedes it.

    Raises:
        InputError: as `expanded`; or `path` is relative, and the current folder was removed.
    """
    found = expanded(path)
    try:
        found = found.absolute()
    except FileNotFoundError as error:
        raise InputError(f"{path}: the current folder was removed; give an absolute path") from error
    root, *names = found.parts
    parts = [root]
    for name in names:
        if name != ".." or parts[-1] == ".." or os.path.islink(os.path.join(*parts)):
            parts.append(name)
        elif len(parts) > 1:
            parts.pop()
    return Path(*parts)


def recorded(path: str | os.PathLike[str]) -> str | None:
    """Return the absolute path of a file or a folder as JSON can hold it; None if its name is not valid UTF-8."""
    text = str(absolute(path))
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
