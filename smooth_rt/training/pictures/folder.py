"""A folder of images with captions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from engines.bundle import digest_json
from engines.paths import absolute
from smooth_rt.errors import InputError, reason
from smooth_rt.image_folders import IMAGE_SUFFIXES, files_of
from smooth_rt.ranges import shown
from smooth_rt.text_files import read_lines, read_text, without_marks

__all__ = ["FolderSource", "captions_of"]

log = logging.getLogger("smooth_rt")


class FolderSource:
    """Images of a folder with captions from `metadata.jsonl` (`file_name`, `text`) or from a .txt beside each image.

    Attributes:
        identity: a digest of the names, sizes in bytes and captions of the images.

    Raises:
        InputError: no image with a caption is there, or a caption cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        folder = absolute(folder)
        self.items = captions_of(folder)
        # ascii: a name that is not UTF-8 has no JSON.
        listed = [[ascii(os.path.relpath(path, folder)), _bytes(path), text] for path, text in self.items]
        self.identity = digest_json(listed)

    def __len__(self) -> int:
        return len(self.items)

    def name(self, item: int) -> str:
        return str(self.items[item][0])

    def caption(self, item: int) -> str:
        return self.items[item][1]

    def open(self, item: int) -> Image.Image:
        return Image.open(self.items[item][0])


def captions_of(folder: Path) -> list[tuple[Path, str]]:
    """Path and caption of each image; those without a caption are counted in a warning.

    Hidden files are left out, as `smooth_rt.image_folders` finds them, unless metadata.jsonl names them.

    Raises:
        InputError: no image with a caption is there, or a caption cannot be read.
    """
    try:
        found = list(_captions(folder))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {reason(error)}; mend or remove it") from error
    if not found:
        raise InputError(f"{folder}: no captioned image; add metadata.jsonl (file_name, text) or a .txt an image")
    return found


def _captions(folder: Path) -> Iterator[tuple[Path, str]]:
    metadata = folder / "metadata.jsonl"
    files = files_of(folder)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    named: set[Path] = set()
    if metadata.exists():
        for number, line in enumerate(read_lines(metadata), 1):
            if line:
                name, text, mask = _record(line, f"{metadata}:{number}")
                named |= {folder / name, folder / mask}
                yield folder / name, text
    else:
        texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
        for path in images:
            beside = texts.get(path.with_suffix(""))
            if beside is not None:
                named.add(path)
                yield path, read_text(beside).strip()
    if named and (bare := [path for path in images if path not in named]):
        log.warning("%s: no caption for %d of %d images, as %s", folder, len(bare), len(images), bare[0].name)


def _record(line: str, where: str) -> tuple[str, str, str]:
    """The image's name, its caption, and the name of its mask, which editing asks for, if there is one."""
    try:
        record = json.loads(line)
        name, text = record["file_name"], record["text"]
        mask = str(record.get("mask", name))
        f"{name}{text}".encode()  # a lone surrogate is valid JSON, and no tokenizer takes it
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: needs file_name and text ({reason(error)})") from error
    for field, value in (("file_name", name), ("text", text)):
        if not isinstance(value, str):
            raise InputError(f"{where}: needs file_name and text as strings, but {field} is {shown(value)}")
    if "\0" in name:
        raise InputError(f"{where}: file_name contains a NUL character; remove it")
    return name, without_marks(text), mask


def _bytes(path: Path) -> int:
    """-1 where nothing is there: a picture that is missing is passed over like a broken one."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
