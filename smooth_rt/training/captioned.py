"""Pictures with captions from a folder, for training on any model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.bundle import digest_json
from smooth_rt.errors import InputError, reason
from smooth_rt.images import read
from smooth_rt.training.data import EmojiScenes, Sample

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class Captioned(Protocol):
    """One training picture: `image` is uint8 [size, size, 3]."""

    @property
    def image(self) -> np.ndarray: ...
    @property
    def caption(self) -> str: ...
    @property
    def name(self) -> str:
        """What a person finds it by."""


class Pictures(Protocol):
    """Draws training pictures; the same `(stream, index)` gives the same picture."""

    @property
    def identity(self) -> str:
        """A digest that tells these pictures from others, without decoding them."""

    def draw(self, stream: str, index: int) -> Captioned: ...


class CaptionedFolder:
    """Images of a folder with captions from `metadata.jsonl` (`file_name`, `text`) or from a .txt beside each image.

    Images are scaled to cover a square of `size` pixels and centre-cropped; an epoch is a permutation keyed by `seed`.

    Attributes:
        items: path and caption of each.
        identity: a digest of the names, sizes in bytes and captions of the images, and of `size`.

    Raises:
        InputError: no image with a caption is there, an image that metadata.jsonl names is not, or a caption cannot be
            read.
    """

    def __init__(self, folder: Path, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        try:
            self.items = list(_captions(folder))
            # ascii: a name that is not UTF-8 has no JSON.
            listed = [[ascii(os.path.relpath(path, folder)), path.stat().st_size, text] for path, text in self.items]
        except OSError as error:
            raise InputError(f"{error.filename or folder}: {reason(error)}; mend or remove it") from error
        if not self.items:
            raise InputError(f"{folder}: no captioned image; add metadata.jsonl (file_name, text) or a .txt an image")
        self.identity = digest_json([size, listed])

    def draw(self, stream: str, index: int) -> Captioned:
        """Picture number `index` of `stream`.

        Raises:
            InputError: the file is not an image that can be read, or too large (see `smooth_rt.images.read`).
        """
        epoch, place = divmod(index, len(self.items))
        order = np.random.default_rng([self.seed, *stream.encode(), epoch]).permutation(len(self.items))
        path, caption = self.items[order[place]]
        pixels = read(path, self.size, self.size)[0].permute(1, 2, 0)
        image = (pixels * 255).round().byte().numpy()
        return Sample(image, np.full((self.size, self.size), 255, np.uint8), caption, -1, -1, str(path))


def open_pictures(data: Path, size: int, seed: int = 0) -> Pictures:
    """The emoji scenes where `data` holds the recipe's packages (see `data.fetch`), else a captioned folder.

    Raises:
        InputError: there is no such folder, or nothing in it to train on.
    """
    if (data / "fluent" / "package").is_dir():
        return EmojiScenes(data, size, seed)
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give a folder of captioned images")
    return CaptionedFolder(data, size, seed)


def _captions(folder: Path) -> Iterator[tuple[Path, str]]:
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        for number, line in enumerate(_text(metadata).split("\n"), 1):
            if line.strip():
                name, text = _record(line, f"{metadata}:{number}")
                yield folder / name, text
        return
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        if beside.exists():
            yield path, _text(beside).strip()


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        name, text = record["file_name"], record["text"]
        text.encode(), name.encode()  # a lone surrogate is valid JSON, and no tokenizer takes it
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: needs file_name and text ({reason(error)})") from error
    if "\0" in name:
        raise InputError(f"{where}: file_name holds a NUL character; mend it")
    return name, text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from error
