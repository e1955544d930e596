"""What is measured on: prompts, and real images with captions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from engines.paths import absolute, expanded
from smooth_rt.errors import InputError, reason
from smooth_rt.text_files import read_lines

__all__ = ["Example", "captioned", "examples", "read_prompts"]


@dataclass(frozen=True)
class Example:
    """A real image and what it shows."""

    path: Path
    caption: str

    def image(self) -> Image.Image:
        with Image.open(self.path) as file:
            return file.convert("RGB")


def examples() -> list[Example]:
    """The images that ship with the default model; it was not trained on these pairs of object and background."""
    return captioned(Path(str(resources.files("smooth_rt"))) / "assets" / "examples")


def captioned(folder: Path) -> list[Example]:
    """The captioned images of a folder: metadata.jsonl with `file_name` and `text`, or a .txt beside each image.

    Raises:
        InputError: no captioned image is there, or one that is named is missing.
    """
    from smooth_rt.training.pictures.folder import captions_of

    found = [Example(path, caption) for path, caption in captions_of(absolute(folder))]
    for example in found:
        try:
            example.path.stat()
        except OSError as error:
            raise InputError(f"{example.path}: {reason(error)}; mend or remove it") from error
    return found


def read_prompts(path: Path | None = None) -> list[str]:
    """One prompt a line, empty lines left out; None: the prompts that ship with the default model.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    path = Path(str(resources.files("smooth_rt"))) / "assets" / "prompts.txt" if path is None else path
    try:
        prompts = [line for line in read_lines(expanded(path)) if line]
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({reason(error)}); name a text file with one prompt per line"
        ) from error
    if not prompts:
        raise InputError(f"{path}: holds no prompt; give one a line")
    return prompts
