"""Whether a picture shows what its caption says, on the default model's data: a small classifier of object and colour.

Captions there read "OBJECT on COLOUR background", so there is a truth to compare with. The classifier is trained by the
recipe (`train tiny`, stage `attributes`) and ships with the accuracy that it has on real pictures. It judges pictures
of this kind alone; it is not a CLIP score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smooth_rt.errors import InputError, ModelError, reason

__all__ = ["AttributeNetwork", "Attributes", "Judged", "load_attributes"]

CHANNELS = (32, 56, 88, 120, 152)


class AttributeNetwork(nn.Module):
    """Pictures [N, 3, 64, 64] in -1..1 to logits of objects [N, O] and of background colours [N, C]."""

    def __init__(self, objects: int, colours: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in CHANNELS:
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.SiLU()]
            before = channels
        self.body = nn.Sequential(*layers)
        self.heads = nn.Linear(before * 2, objects + colours)
        self.objects = objects

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(images).flatten(2)
        logits = self.heads(torch.cat([found.mean(2), found.amax(2)], dim=1))
        return logits[:, : self.objects], logits[:, self.objects :]


@dataclass(frozen=True)
class Judged:
    """Of N pictures: whether the object and the background are those of the caption; None where it names none."""

    objects: tuple[bool | None, ...]
    colours: tuple[bool | None, ...]


@dataclass(frozen=True)
class Attributes:
    """The classifier and its classes. `accuracy` is its share of right answers on real pictures of pairs that neither
    it nor the model was trained on, after the VAE: "object" and "colour"."""

    network: AttributeNetwork
    objects: tuple[str, ...]
    colours: tuple[str, ...]
    accuracy: dict[str, float]

    def classes(self, caption: str) -> tuple[int | None, int | None]:
        """The classes that a caption names: object and background."""
        name, _, rest = caption.partition(" on ")
        colour = rest.removesuffix(" background")
        return (
            self.objects.index(name) if name in self.objects else None,
            self.colours.index(colour) if colour in self.colours else None,
        )

    def predict(self, images: NDArray[np.float32]) -> tuple[list[int], list[int]]:
        """The classes seen on pictures [N, H, W, 3] in 0..1: objects and backgrounds."""
        objects, colours = self._logits(images)
        return objects.argmax(1).tolist(), colours.argmax(1).tolist()

    def certainty(self, images: NDArray[np.float32]) -> list[float]:
        """How probable the likeliest object is on pictures [N, H, W, 3] in 0..1, 0 to 1: low where none is clear."""
        found: list[float] = self._logits(images)[0].softmax(1).amax(1).tolist()
        return found

    def _logits(self, images: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() * 2 - 1
        if pixels.shape[2:] != (64, 64):
            pixels = nn.functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = self.network(pixels)
        return found

    def judge(self, images: NDArray[np.float32], captions: Sequence[str]) -> Judged:
        """Compare pictures [N, H, W, 3] in 0..1 with their captions.

        Raises:
            InputError: the numbers differ.
        """
        if len(images) != len(captions):
            raise InputError(f"captions: {len(captions)} for {len(images)} images; give one each")
        named = [self.classes(caption) for caption in captions]
        objects, colours = self.predict(images)
        return Judged(
            tuple(None if n[0] is None else n[0] == seen for n, seen in zip(named, objects, strict=True)),
            tuple(None if n[1] is None else n[1] == seen for n, seen in zip(named, colours, strict=True)),
        )


def load_attributes(path: Path | None = None) -> Attributes:
    """The classifier in a file that the recipe wrote; None: the one that ships with the default model.

    Raises:
        ModelError: it is not one.
    """
    path = path or Path(str(resources.files("smooth_rt"))) / "assets" / "attributes.safetensors"
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
        objects, colours = (tuple(json.loads(metadata[name])) for name in ("objects", "colours"))
        network = AttributeNetwork(len(objects), len(colours))
        network.load_state_dict(tensors)
        accuracy = {name: float(value) for name, value in json.loads(metadata["accuracy"]).items()}
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: not a classifier of attributes ({reason(error)})") from error
    return Attributes(network.eval(), objects, colours, accuracy)
