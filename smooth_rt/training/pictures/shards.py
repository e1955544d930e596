"""WebDataset shards: tar files whose members of one stem are a sample, `0007.jpg` with `0007.txt` or `0007.json`.

They are indexed once and read by offset. The library of that name streams them in an order of its own; a run that is to
be the same on any number of processes, and after any stop, needs each sample by its number.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from engines.bundle import digest_json
from engines.paths import absolute
from smooth_rt.errors import InputError, reason
from smooth_rt.image_folders import IMAGE_SUFFIXES, is_hidden
from smooth_rt.text_files import decode, without_marks

__all__ = ["ShardSource", "expanded"]

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """Where a file lies in its shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class ShardSource:
    """The samples of tar shards, in their order.

    Raises:
        InputError: a shard is missing or not a whole tar, a caption cannot be read, or no sample has both an image and
            a caption.
    """

    def __init__(self, shards: list[Path], where: str) -> None:
        self.where = where
        self.samples = [sample for shard in shards for sample in _samples(absolute(shard))]
        if not self.samples:
            raise InputError(f"{where}: no sample with an image and a .txt or .json caption")
        listed = [[image.shard.name, image.name, image.size, text] for image, text in self.samples]
        self.identity = digest_json(listed)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, item: int) -> str:
        image = self.samples[item][0]
        return f"{image.shard}:{image.name}"

    def caption(self, item: int) -> str:
        return self.samples[item][1]

    def open(self, item: int) -> Image.Image:
        return Image.open(io.BytesIO(self.samples[item][0].read()))


def expanded(pattern: str) -> list[Path]:
    """The paths of a pattern such as `data-{0000..0012}.tar`; of another name, that path alone."""
    parts: list[list[str]] = []
    at = 0
    for match in BRACES.finditer(pattern):
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        parts += [[pattern[at : match.start()]], [f"{number:0{len(first)}d}" for number in numbers]]
        at = match.end()
    return [Path("".join(chosen)) for chosen in itertools.product(*parts, [pattern[at:]])]


def _samples(shard: Path) -> Iterator[tuple[Member, str]]:
    members: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isfile() and not is_hidden(PurePosixPath(info.name)):
                    folder, _, name = info.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    member = Member(shard, info.name, info.offset_data, info.size)
                    members.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
        # Each member lies within the file: of a shard that was cut off, the last one does not.
        held = shard.stat().st_size
        if any(m.offset + m.size > held for sample in members.values() for m in sample.values()):
            raise tarfile.ReadError("unexpected end of data")
    except FileNotFoundError as error:
        raise InputError(f"{shard}: no such shard; fetch it, or name only those that are there") from error
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{shard}: not a whole tar file ({reason(error)}); fetch it again") from error
    for sample in members.values():
        image = next((sample[suffix] for suffix in sample if suffix in IMAGE_SUFFIXES), None)
        if image is not None and (text := _caption(sample)) is not None:
            yield image, text


def _caption(sample: dict[str, Member]) -> str | None:
    if ".txt" in sample:
        member = sample[".txt"]
        return decode(member.read(), f"{member.shard}:{member.name}").strip()
    if ".json" in sample:
        member = sample[".json"]
        try:
            record = json.loads(member.read())
            text = record.get("caption", record.get("text"))
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{member.shard}:{member.name}: not JSON ({reason(error)})") from error
        return without_marks(text) if isinstance(text, str) else None
    return None
