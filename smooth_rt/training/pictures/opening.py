"""From what a user named to pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

from engines.paths import absolute
from smooth_rt.errors import InputError
from smooth_rt.image_folders import is_hidden
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.pictures.base import Pictures
from smooth_rt.training.pictures.folder import FolderSource
from smooth_rt.training.pictures.hub import HubSource
from smooth_rt.training.pictures.listed import Listed, Source
from smooth_rt.training.pictures.shards import ShardSource, expanded

__all__ = ["CROPS", "Reading", "open_pictures"]

CROPS = ("centre", "buckets")


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    Args:
        size: side in pixels.
        seed: of their order, and of the emoji scenes.
        crop: "centre", or "buckets" of several aspects (see `Listed`); the emoji scenes are squares of their own.
        group, multiple: of the buckets.
        split, image_column, caption_column: of a Hugging Face dataset.

    Raises:
        InputError: an unknown crop.
    """

    size: int
    seed: int = 0
    crop: str = "centre"
    group: int = 1
    multiple: int = 8
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise InputError(f"crop={self.crop!r}: unknown; choose from {', '.join(CROPS)}")


def open_pictures(data: str | Path, reading: Reading) -> Pictures:
    """The emoji scenes where `data` holds the recipe's packages (see `data.fetch`), else a list with an end: tar shards
    (a folder of them, or a pattern such as `data-{000..012}.tar`), a captioned folder, or a Hugging Face dataset.

    Raises:
        InputError: there is nothing of that name, or nothing in it to train on.
    """
    path = absolute(data)
    if (path / "fluent" / "package").is_dir():
        return EmojiScenes(path, reading.size, reading.seed)
    return Listed(
        _source(str(data), path, reading), reading.size, reading.seed, reading.crop == "buckets", reading.group,
        reading.multiple,
    )  # fmt: skip


def _source(data: str, path: Path, reading: Reading) -> Source:
    if data.endswith(".tar"):
        return ShardSource(expanded(data), data)
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if path.is_dir() and not saved:
        shards = sorted(shard for shard in path.glob("*.tar") if not is_hidden(PurePath(shard.name)))
        return ShardSource(shards, data) if shards else FolderSource(Path(data))
    if not path.exists() and (data.count("/") != 1 or data.startswith((".", "/", "~"))):
        raise InputError(f"{data}: no such folder; give a folder of captioned images, tar shards or owner/name")
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(f"{data}: a file that is neither .tar nor .parquet; give a folder of captioned images instead")
    return HubSource(data, reading.split, reading.image_column, reading.caption_column)
