"""What TensorRT keeps in a file to save time at the next start: of a build its timings, of TensorRT for RTX the kernels
that it compiled on the GPU. None of it is needed, so no fault of the file is an error."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

__all__ = ["Kernels", "keep", "kept"]

LOG = logging.getLogger("smooth_rt")


def kept(path: Path) -> bytes:
    """What the file holds; nothing where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def keep(path: Path, content: bytes, what: str) -> None:
    """Write the file whole or not at all, unless it holds the same. Of processes that do so at the same time, the last
    one's stays.

    Args:
        what: what it is, for the log where the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        LOG.info("%s: %s not kept (%s)", path, what, error.strerror)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class Kernels:
    """The kernels of one engine of TensorRT for RTX, which compiles them at the first runs of a shape.

    Args:
        config: the engine's IRuntimeConfig; contexts that are made with it use them and add to them.
        path: of the file that they are kept in. One that is damaged, or of another version, GPU or driver, which
            TensorRT tells, is begun anew.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._cache = config.create_runtime_cache()
        content = kept(path)
        if content and not self._cache.deserialize(content):
            LOG.info("%s: damaged, or of another version or GPU; its kernels are compiled anew", path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep them for the next time that the engine is opened."""
        content = self._cache.serialize()
        if content is not None:
            keep(self._path, bytes(memoryview(content)), "the compiled kernels are")
