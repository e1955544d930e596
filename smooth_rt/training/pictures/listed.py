"""Pictures of a list that has an end: each epoch shows every one, scaled and cropped, and passes over broken ones."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from engines.bundle import digest_json
from smooth_rt.errors import InputError, reason
from smooth_rt.images import read
from smooth_rt.training.pictures.order import Order, bucket_sizes, nearest_bucket

__all__ = ["Listed", "Picture", "Source"]

log = logging.getLogger("smooth_rt")


class Source(Protocol):
    """A list of captioned pictures, read one by one.

    `identity` digests what tells the list from others; `where` names it for messages.
    """

    identity: str
    where: str

    def __len__(self) -> int: ...
    def name(self, item: int) -> str: ...
    def caption(self, item: int) -> str: ...
    def open(self, item: int) -> Image.Image:
        """The picture, perhaps not decoded yet; raises anything where it is broken."""


@dataclass(frozen=True)
class Picture:
    """A picture as training sees it: uint8 [H, W, 3], its caption, what a person finds it by."""

    image: np.ndarray
    caption: str
    name: str


class Listed:
    """The pictures of a source, scaled to cover a size and centre-cropped to it.

    Args:
        size: side of the square in pixels; with `buckets`, of a square of the same area.
        seed: of the order.
        buckets: give each picture the size whose aspect is nearest to its own; every `group` consecutive ones, a
            training step or a part of it, are of one size.
        multiple: of which the sides of buckets are.

    Attributes:
        identity: a digest of the source, the sizes and the order's groups.
        skipped: name and reason of pictures that were passed over: broken, or smaller than what is trained on.

    Raises:
        InputError: the source is empty; with `buckets`, no picture of it can be used.
    """

    def __init__(
        self, source: Source, size: int, seed: int = 0, buckets: bool = False, group: int = 1, multiple: int = 8
    ) -> None:
        self.source, self.size = source, size
        self.skipped: dict[str, str] = {}
        self._largest = 0
        self._bad: set[int] = set()
        self.sizes = bucket_sizes(size, multiple) if buckets else [(size, size)]
        items: list[list[int]] = [[] for _ in self.sizes]
        if buckets:
            for item in range(len(source)):
                try:
                    with _opened(source, item) as image:
                        items[nearest_bucket(self.sizes, *_upright(image))].append(item)
                except Exception as error:  # a decoder of a damaged file raises anything
                    self._skip(item, error)
        else:
            items[0] = list(range(len(source)))
        if not any(items):
            raise self._none_left()
        self._size_of = {item: size for size, bucket in zip(self.sizes, items, strict=True) for item in bucket}
        self._order = Order([bucket for bucket in items if bucket], group if buckets else 1, seed)
        self.identity = digest_json([source.identity, self.sizes, self._order.group])

    def candidates(self, stream: str, index: int) -> Iterator[int]:
        """The item at an index, and those that take its place if it cannot be used."""
        return self._order.candidates(stream, index)

    def load(self, item: int) -> Picture | None:
        """An item as it is trained on; None, and named in `skipped`, if it cannot be used."""
        if item in self._bad:
            return None
        height, width = self._size_of[item]
        try:
            with _opened(self.source, item) as image:
                across, high = _upright(image)
                self._largest = max(self._largest, min(across, high))
                if across < width or high < height:
                    raise InputError(f"{across}x{high} is smaller than {width}x{height}")
                pixels = read(image, height, width)[0].permute(1, 2, 0)
        except Exception as error:  # a decoder of a damaged file raises anything
            self._skip(item, error)
            return None
        return Picture((pixels * 255).round().byte().numpy(), self.source.caption(item), self.source.name(item))

    def draw(self, stream: str, index: int) -> Picture:
        """Picture number `index` of `stream`; in place of one that cannot be used, the next of its epoch.

        Raises:
            InputError: none can be used.
        """
        for item in self.candidates(stream, index):
            if (found := self.load(item)) is not None:
                return found
        raise self._none_left()

    def _skip(self, item: int, error: Exception) -> None:
        self._bad.add(item)
        name, why = self.source.name(item), _why(error)
        self.skipped[name] = why
        log.warning("%s: skipped, %s (%d so far)", name, why, len(self.skipped))

    def _none_left(self) -> InputError:
        if 0 < self._largest < self.size:
            return InputError(
                f"{self.source.where}: the largest picture is {self._largest} pixels at its shorter side, and training "
                f"is at {self.size}; lower --resolution, or give larger ones"
            )
        first = next(iter(self.skipped.items()), None)
        why = f" ({first[0]}: {first[1]})" if first else ""
        return InputError(f"{self.source.where}: none of its {len(self.source)} pictures can be used{why}")


def _opened(source: Source, item: int) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns below its own limit; ours is lower, and `read` refuses what is beyond it before decoding.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return source.open(item)


def _upright(image: Image.Image) -> tuple[int, int]:
    """Width and height as the camera held it."""
    turned = image.getexif().get(0x0112, 1) >= 5
    return (image.height, image.width) if turned else image.size


def _why(error: Exception) -> str:
    said = str(error) if isinstance(error, InputError) else reason(error)
    return said.removeprefix("image 1 of 1: ")
