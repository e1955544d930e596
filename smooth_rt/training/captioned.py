"""Pictures with captions from a folder, for training on any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from smooth_rt.errors import InputError
from smooth_rt.training.data import EmojiScenes, Sample


class Captioned(Protocol):
    """One training picture: `image` is uint8 [size, size, 3]."""

    @property
    def image(self) -> np.ndarray: ...
    @property
    def caption(self) -> str: ...


class Pictures(Protocol):
    """Draws training pictures; the same `(stream, index)` gives the same picture."""

    def draw(self, stream: str, index: int) -> Captioned: ...


class CaptionedFolder:
    """Images of a folder with captions from `metadata.jsonl` (`file_name`, `text`) or from a .txt beside each image.

    Images are centre-cropped to a square of `size` pixels; an epoch is a permutation keyed by `seed`.

    Raises:
        InputError: no image with a caption is there, or metadata.jsonl is not valid.
    """

    def __init__(self, folder: Path, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.items = list(_captions(folder))
        if not self.items:
            raise InputError(f"{folder}: no captioned image; add metadata.jsonl (file_name, text) or a .txt an image")

    def draw(self, stream: str, index: int) -> Captioned:
        epoch, place = divmod(index, len(self.items))
        order = np.random.default_rng([self.seed, *stream.encode(), epoch]).permutation(len(self.items))
        path, caption = self.items[order[place]]
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{path}: not a readable image ({error}); remove or replace it") from error
        fitted = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)
        return Sample(np.asarray(fitted), np.full((self.size, self.size), 255, np.uint8), caption, -1, -1)


def open_pictures(data: Path, size: int, seed: int = 0) -> Pictures:
    """The emoji scenes where `data` holds the recipe's packages (see `data.fetch`), else a captioned folder."""
    if (data / "fluent" / "package").is_dir():
        return EmojiScenes(data, size, seed)
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give a folder of captioned images")
    return CaptionedFolder(data, size, seed)


def _captions(folder: Path) -> list[tuple[Path, str]]:
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        items = []
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                items.append((folder / record["file_name"], str(record["text"])))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(f"{metadata}:{number}: needs file_name and text ({error})") from error
        return items
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    beside = ((path, path.with_suffix(".txt")) for path in images)
    return [(path, text.read_text(encoding="utf-8").strip()) for path, text in beside if text.exists()]
