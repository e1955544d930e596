"""Find the images of a folder, without the files that systems and tools keep beside them."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

__all__ = ["IMAGE_SUFFIXES", "files_of", "images_of", "is_hidden"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# Beside names that begin with a dot (`._a.png` of macOS, `.ipynb_checkpoints`, `.DS_Store`): folders and files of
# macOS, Windows and Synology, some of which hold thumbnails.
SYSTEM_NAMES = frozenset(
    {"__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "@eaDir"}
)


def is_hidden(path: PurePath) -> bool:
    """Return whether a path, relative to a data set's folder, is hidden or of a folder that is."""
    return any(_hidden(part) for part in path.parts)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it, sorted, without hidden ones."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [Path(where, name) for name in names if not _hidden(name)]
    return sorted(found)


def images_of(folder: Path) -> list[Path]:
    """Return the images of a folder and of the folders in it, sorted, without hidden ones."""
    return [path for path in files_of(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def _hidden(name: str) -> bool:
    return name in SYSTEM_NAMES or (name.startswith(".") and name not in (".", ".."))
