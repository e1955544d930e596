"""The default model's pictures: one emoji on a coloured background, with a caption that says both.

Everything a picture holds follows from `(seed, stream, index)`: the object, the colour, the place and the size. A
training run that stops and resumes therefore sees the same pictures, and nobody stores a random state.

Source of the pictures: npm `@lobehub/fluent-emoji-3d` (MIT, Microsoft's Fluent emoji), 256x256 WebP with alpha.
Source of the names: npm `emoji-datasource-google` (MIT), narrowed to the concrete things listed in `objects.txt`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.bundle import digest_json
from smooth_rt.errors import InputError, reason

PACKAGES = {"fluent": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emoji-datasource-google@16.0.0"}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (140, 140, 145),
    "red": (214, 62, 58),
    "yellow": (248, 214, 84),
    "green": (96, 176, 92),
    "blue": (72, 132, 222),
    "purple": (142, 92, 196),
    "pink": (246, 160, 194),
}
COLOURS = tuple(BACKGROUNDS)

SCALE = (0.72, 0.95)  # the object's side over the picture's side
COLOUR_JITTER = 10.0  # per channel and picture, in 0..255: lets the noise decide the shade
UNNAMED_BACKGROUND = 0.2  # share of captions that leave the background to the noise
HOLD_OUT_EVERY = 16  # one (object, colour) pair in so many is never trained on


@dataclass(frozen=True)
class Sample:
    """One composited picture: `image` is uint8 [size, size, 3]; `mask` is the object's alpha, uint8 [size, size]."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    obj: int
    colour: int
    name: str = ""


def fetch(folder: Path) -> None:
    """Download both npm packages into `folder` with the npm client, which checks their integrity. Done once.

    Raises:
        InputError: npm is not there, or cannot download them.
        OSError: `folder` cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        target = folder / name
        if target.exists():
            continue
        # What an earlier download that was stopped left goes first.
        partial = folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with tarfile.open(_packed(package, partial)) as tar:
                wanted = [m for m in tar if m.name.endswith((".webp", "emoji.json", "LICENSE", "package/package.json"))]
                tar.extractall(partial / "unpacked", members=wanted, filter="data")
            (partial / "unpacked").rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _packed(package: str, folder: Path) -> Path:
    """The package's archive, downloaded into `folder`."""
    command = ["npm", "pack", package, "--loglevel", "error", "--pack-destination", str(folder)]
    try:
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError("npm: not found, and the training pictures come from npm; install Node.js") from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-200:] or f"exit code {error.returncode}"
        raise InputError(f"{package}: `npm pack` failed: {said}; see to the network and the disk") from error
    return folder / printed.stdout.split()[-1]


def is_held_out(obj: int, colour: int) -> bool:
    """Whether the pair of object and background colour is kept from training, for honest inversion and morphs."""
    return (obj * 5 + colour * 7) % HOLD_OUT_EVERY == 0


def as_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [H, W, 3] as networks take them: [N, 3, H, W] in -1..1, channels last."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class EmojiScenes:
    """Composites pictures from the emoji under `folder` (see `fetch`).

    Args:
        folder: where the two npm packages lie.
        size: side of a picture in pixels.
        seed: with the stream's name and the index it decides every picture.

    Attributes:
        identity: a digest of the objects' names, the sizes in bytes of their pictures, and `size`.

    Raises:
        InputError: a package is missing or damaged.
    """

    def __init__(self, folder: Path, size: int = 64, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.skipped: dict[str, str] = {}  # none: a damaged one is refused at once
        self.captions: list[str] = []
        self.sprites: list[Image.Image] = []
        listed = []
        for caption, path in _objects(folder):
            try:
                listed.append([caption, path.name, path.stat().st_size])
                with Image.open(path) as file:
                    sprite = file.convert("RGBA")
            except Exception as error:  # a decoder of a damaged file raises anything
                raise _refetch(folder, f"{path.name} cannot be read: {reason(error)}") from error
            self.captions.append(caption)
            # Twice the largest size drawn: later resizes stay sharp and cheap.
            self.sprites.append(sprite.resize((2 * size, 2 * size), Image.Resampling.LANCZOS))
        self.identity = digest_json([size, listed])

    def __len__(self) -> int:
        return len(self.sprites)

    def draw(self, stream: str, index: int, obj: int | None = None, colour: int | None = None) -> Sample:
        """Picture number `index` of `stream`; `obj` and `colour` fix what would be drawn at random.

        Held-out pairs appear only where they are asked for by `obj` and `colour`.
        """
        rng = np.random.default_rng([self.seed, *stream.encode(), index])
        picked = (int(rng.integers(len(self))), int(rng.integers(len(COLOURS))))
        while is_held_out(*picked):
            picked = (int(rng.integers(len(self))), int(rng.integers(len(COLOURS))))
        obj = picked[0] if obj is None else obj
        colour = picked[1] if colour is None else colour
        base = np.array(BACKGROUNDS[COLOURS[colour]], dtype=np.float64)
        shade = np.clip(base + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3), 0, 255)
        side = round(float(rng.uniform(*SCALE)) * self.size)
        left, top = (int(v) for v in rng.integers(0, self.size - side + 1, 2))
        named = rng.random() >= UNNAMED_BACKGROUND
        caption = f"{self.captions[obj]} on {COLOURS[colour]} background" if named else self.captions[obj]

        sprite = self.sprites[obj].resize((side, side), Image.Resampling.LANCZOS)
        canvas = Image.new("RGB", (self.size, self.size), tuple(round(v) for v in shade))
        canvas.paste(sprite, (left, top), sprite)
        mask = Image.new("L", canvas.size)
        mask.paste(sprite.getchannel("A"), (left, top))
        return Sample(np.asarray(canvas), np.asarray(mask), caption, obj, colour, f"emoji scene {stream} {index}")

    def all_captions(self) -> list[str]:
        """Every caption that training can show, held-out pairs included (their words are known)."""
        named = [f"{name} on {colour} background" for name in self.captions for colour in COLOURS]
        return [*self.captions, *named]


def _objects(folder: Path) -> Iterator[tuple[str, Path]]:
    try:
        records = json.loads((folder / "names" / "package" / "emoji.json").read_text(encoding="utf-8"))
        codes = {r["short_name"]: (r["unified"].lower(), (r["non_qualified"] or r["unified"]).lower()) for r in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refetch(folder, f"names/package/emoji.json cannot be read: {reason(error)}") from error
    pictures = folder / "fluent" / "package" / "assets"
    listed = (resources.files("smooth_rt.training") / "objects.txt").read_text(encoding="utf-8")
    for line in listed.splitlines():
        if not line or line.startswith("#"):
            continue
        short_name, _, caption = (part.strip() for part in line.partition("="))
        code, unqualified = codes.get(short_name, ("", ""))
        spellings = (code, code.replace("-fe0f", ""), unqualified)
        found = next((p for s in spellings if (p := pictures / f"{s}.webp").exists()), None)
        if found is None:
            raise _refetch(folder, f"{short_name} has no picture in fluent")
        yield caption or short_name.replace("_", " "), found


def _refetch(folder: Path, why: str) -> InputError:
    return InputError(
        f"{folder}: {why}; delete fluent and names there, and let `smooth-rt train tiny` fetch them again"
    )
