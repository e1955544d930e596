"""The first draws of pictures without an end, as a list that has one."""

from __future__ import annotations

from PIL import Image

from engines.bundle import digest_json
from smooth_rt.training.pictures.base import Captioned, Pictures

__all__ = ["FirstDraws"]


class FirstDraws:
    """Pictures 0 to `count` - 1 of the stream "cache"."""

    def __init__(self, pictures: Pictures, count: int) -> None:
        self.pictures, self.count = pictures, count
        self.where = f"the first {count} pictures"
        self.identity = digest_json([pictures.identity, "first", count])
        self._last: tuple[int, Captioned] | None = None

    def __len__(self) -> int:
        return self.count

    def name(self, item: int) -> str:
        return self._drawn(item).name

    def caption(self, item: int) -> str:
        return self._drawn(item).caption

    def open(self, item: int) -> Image.Image:
        return Image.fromarray(self._drawn(item).image)

    def _drawn(self, item: int) -> Captioned:
        if self._last is None or self._last[0] != item:
            self._last = (item, self.pictures.draw("cache", item))
        return self._last[1]
