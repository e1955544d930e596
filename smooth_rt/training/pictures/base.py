"""What training asks of its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

__all__ = ["Captioned", "Pictures"]


class Captioned(Protocol):
    """One training picture: `image` is uint8 [H, W, 3], `name` what a person finds it by."""

    @property
    def image(self) -> np.ndarray: ...
    @property
    def caption(self) -> str: ...
    @property
    def name(self) -> str: ...


class Pictures(Protocol):
    """Draws training pictures; the same `(stream, index)` gives the same picture, in every process."""

    @property
    def identity(self) -> str:
        """A digest that tells these pictures from others, without decoding them."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """The pictures met so far that could not be used: name and reason."""

    def draw(self, stream: str, index: int) -> Captioned: ...
