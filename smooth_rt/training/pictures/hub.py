"""A Hugging Face dataset, by its hub name or from a folder that `datasets` has saved."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from engines.bundle import digest_json
from engines.paths import expanded
from smooth_rt.errors import InputError, reason
from smooth_rt.text_files import without_marks

__all__ = ["HubSource"]

CAPTIONS = ("text", "caption", "prompt", "description")


class HubSource:
    """The rows of a dataset that have an image and a caption column.

    Args:
        name: "owner/name" on the hub, a folder that `save_to_disk` wrote, or a .parquet file.
        split: of the dataset.
        image_column, caption_column: None: the column of images, and one that is named as captions usually are.

    Raises:
        InputError: `datasets` is not installed, the dataset cannot be reached or read, or a column is not there or not
            to be guessed.
    """

    def __init__(
        self, name: str, split: str = "train", image_column: str | None = None, caption_column: str | None = None
    ) -> None:
        self.where = name
        self._rows = _load(name, split)
        features = self._rows.features
        images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
        self.image = _column(name, "image", image_column, images, list(features))
        texts = [column for column in CAPTIONS if column in features]
        self.text = _column(name, "caption", caption_column, texts[:1], list(features))
        self._rows = self._rows.cast_column(self.image, _encoded())
        place = expanded(name)
        named = place.name if place.exists() else name  # the same from any folder
        self.identity = digest_json([named, split, self._rows.num_rows, self._fingerprint(), self.image, self.text])

    def _fingerprint(self) -> str:
        """Of the captions: the library's own fingerprint differs from one download to another."""
        return digest_json([without_marks(str(text)) for text in self._rows[self.text]])

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def name(self, item: int) -> str:
        return f"{self.where} row {item}"

    def caption(self, item: int) -> str:
        return without_marks(str(self._rows[item][self.text]))

    def open(self, item: int) -> Image.Image:
        held = self._rows[item][self.image]
        return Image.open(io.BytesIO(held["bytes"]) if held["bytes"] is not None else held["path"])


def _load(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name}: Hugging Face datasets need a package; pip install 'smooth-rt[train]'") from error
    path = expanded(name)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        if path.suffix == ".parquet" and path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # its loaders and the hub's client raise many kinds
        raise InputError(
            f"{name}: no folder of that name, and no dataset with a split {split!r} can be had ({reason(error)}); "
            "mend the name, --split or the network"
        ) from error


def _encoded() -> Any:
    import datasets

    return datasets.Image(decode=False)  # decoded one by one, since one broken image must not end a run


def _column(name: str, what: str, asked: str | None, guessed: list[str], there: list[str]) -> str:
    if asked is not None and asked in there:
        return asked
    if asked is None and len(guessed) == 1:
        return guessed[0]
    wrong = f"no column {asked!r}" if asked is not None else f"which column holds the {what} is not clear"
    raise InputError(f"{name}: {wrong}; name one with --{what}-column: {', '.join(there)}")
