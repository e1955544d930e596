"""Pictures and captions as the UNet sees them: what the VAE and the text encoder make of them, kept on disk if asked.

Each picture and each caption is encoded alone, so that it is the same to the last bit in every batch, from the cache or
without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.bundle import digest_json
from engines.paths import absolute
from smooth_rt.digests import digest_tensors
from smooth_rt.errors import InputError, SmoothRTError, reason
from smooth_rt.model import Model
from smooth_rt.training.pictures import Captioned, Listed, Pictures
from smooth_rt.training.pictures.draws import FirstDraws
from smooth_rt.training.world import World
from smooth_rt.writers import encode_json, write_files

__all__ = ["ENDLESS", "Encoded", "Encoder", "cached"]

OPEN = 64  # files of the cache at a time
SHARD = 256  # pictures a file: what an interruption loses at most
ENDLESS = 8192  # of pictures without an end, so many are cached

log = logging.getLogger("smooth_rt")
Encode = Callable[[str, int], "Encoded"]


@dataclass(frozen=True)
class Encoded:
    """One picture: mean and deviation of the VAE's posterior [C, h, w], unscaled; the text [L, D]; on the CPU."""

    mean: Tensor
    std: Tensor
    context: Tensor
    name: str


class Encoder:
    """Encodes pictures and captions one by one, on the device where the networks are; each caption once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._texts: dict[str, Tensor] = {}

    def text(self, caption: str) -> Tensor:
        """[L, D]."""
        if caption not in self._texts:
            network = self.model.text_encoder
            tokens = self.model.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
            with torch.no_grad():
                encoded = network(tokens.input_ids.to(next(network.parameters()).device)).last_hidden_state
            self._texts[caption] = encoded[0].cpu()
        return self._texts[caption]

    def __call__(self, picture: Captioned) -> Encoded:
        vae = self.model.vae
        image = torch.from_numpy(picture.image.copy()).permute(2, 0, 1)[None].to(vae.device, vae.dtype)
        with torch.no_grad():
            posterior = vae.encode(image.div(127.5).sub(1)).latent_dist
        mean, std = posterior.mean[0].cpu(), posterior.std[0].cpu()
        return Encoded(mean, std, self.text(picture.caption), picture.name)


def cached(
    folder: Path, model: Model, pictures: Pictures, world: World, progress: Callable[[int, int], None] | None = None
) -> tuple[str, Encode]:
    """The identity of pictures that are encoded once, and what reads picture number `index` of a stream.

    The main process encodes what `folder` lacks while the others wait; what an interruption left is gone on with. Of
    pictures without an end the first ENDLESS are taken, which then are all there is.

    Raises:
        InputError: the folder belongs to other pictures or another model, or no picture can be used.
        SmoothRTError: a file cannot be written.
    """
    listed = pictures if isinstance(pictures, Listed) else _first(pictures)
    shards = _Shards(folder, listed, {"vae": model.digests["vae"], "text_encoder": model.digests["text_encoder"]})
    if world.main:
        shards.fill(Encoder(model), progress)
    world.wait()
    shards.open()

    def encode(stream: str, index: int) -> Encoded:
        for item in listed.candidates(stream, index):
            if (found := shards.read(item)) is not None:
                return found
        raise InputError(f"{folder}: none of its pictures can be used")

    return listed.identity, encode


def _first(pictures: Pictures) -> Listed:
    source = FirstDraws(pictures, ENDLESS)
    height, width, _ = pictures.draw("cache", 0).image.shape
    assert height == width
    return Listed(source, height)


class _Shards:
    """The files of a cache: `latents-{number}.safetensors`, SHARD pictures each, and `cache.json`: of what."""

    def __init__(self, folder: Path, listed: Listed, networks: dict[str, str]) -> None:
        self.folder, self.listed = absolute(folder), listed
        self.made_of = {"pictures": listed.identity, **networks}
        self.key = digest_json(self.made_of)
        self._where: dict[int, tuple[Path, str, str]] = {}
        # Mapped into memory: of a large cache only what is read is loaded. Some stay open, since their header is long.
        self._open: Callable[[Path], Any] = lru_cache(OPEN)(lambda path: safe_open(path, "pt"))

    def paths(self) -> list[Path]:
        count = -(-len(self.listed.source) // SHARD)
        return [self.folder / f"latents-{number:06d}.safetensors" for number in range(count)]

    def fill(self, encode: Encoder, progress: Callable[[int, int], None] | None) -> None:
        """Make the files that are missing or damaged."""
        self._claim()
        total = len(self.listed.source)
        for number, path in enumerate(self.paths()):
            items = range(number * SHARD, min(total, (number + 1) * SHARD))
            if not self._whole(path):
                self._make(path, items, encode)
            if progress is not None:
                progress(items.stop, total)

    def _claim(self) -> None:
        index = self.folder / "cache.json"
        if index.exists():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{index}: not a cache's ({reason(error)}); name another --cache") from error
            if found != self.made_of:
                differ = [name for name, value in self.made_of.items() if dict(found).get(name) != value]
                raise InputError(f"{self.folder}: a cache of another {', '.join(differ)}; name another --cache")
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder}: holds files that are not a cache's; name another --cache")
        write_files(self.folder, {index.name: encode_json(self.made_of)})

    def _whole(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            log.warning("%s: damaged (%s); made anew", path, reason(error))
            return False
        if metadata.get("key") != self.key or metadata.get("digest") != digest_tensors(tensors):
            log.warning("%s: damaged (not what was written); made anew", path)
            return False
        return True

    def _make(self, path: Path, items: Iterable[int], encode: Encoder) -> None:
        tensors: dict[str, Tensor] = {}
        rows: dict[int, tuple[str, str]] = {}
        for item in items:
            if (picture := self.listed.load(item)) is None:
                continue
            found = encode(picture)
            text = hashlib.sha256(picture.caption.encode()).hexdigest()[:32]
            tensors |= {f"mean/{item}": found.mean, f"std/{item}": found.std, f"text/{text}": found.context}
            rows[item] = (text, found.name)
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"key": self.key, "rows": json.dumps(rows), "digest": digest_tensors(kept)}
        partial = path.with_suffix(".partial")
        try:
            save_file(kept, partial, metadata)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise SmoothRTError(f"{path}: cannot be written ({reason(error)}); make room") from error
        finally:
            partial.unlink(missing_ok=True)

    def open(self) -> None:
        """Learn where each picture lies."""
        for path in self.paths():
            with safe_open(path, "pt") as file:
                for item, (text, name) in json.loads(file.metadata()["rows"]).items():
                    self._where[int(item)] = (path, text, name)

    def read(self, item: int) -> Encoded | None:
        if item not in self._where:
            return None
        path, text, name = self._where[item]
        file = self._open(path)
        return Encoded(
            file.get_tensor(f"mean/{item}"), file.get_tensor(f"std/{item}"), file.get_tensor(f"text/{text}"), name
        )
