"""The images that the commands read and write, with what goes beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from smooth_rt.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from smooth_rt.images import Images

__all__ = ["as_pictures", "as_seen", "check_readable", "file_names", "write_pictures"]


def check_readable(images: Sequence[Path]) -> None:
    """Raise InputError unless each is an image's file, before an engine is built or opened."""
    from smooth_rt.images import read

    for path in images:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; name an image")
        read(path, 8, 8)


def as_pictures(images: Images) -> list[Image]:
    """The images of a result, of which the commands ask as PIL images."""
    return cast("list[Image]", images)


def as_seen(paths: Sequence[Path], like: Image) -> list[Image]:
    """The images as the networks saw them: scaled and cropped to the size of the results."""
    from smooth_rt.images import read, to_images

    return as_pictures(to_images(read(list(paths), like.height, like.width), "pil"))


def file_names(groups: dict[str, int], film: str | None = None) -> list[str]:
    """The files that a command writes: so many images of each group, the sheet, the film; known beforehand."""
    numbered = [f"{name}-{i:03d}.png" for name, count in groups.items() for i in range(1, count + 1)]
    return [*numbered, "sheet.png", *([] if film is None else [f"{film}.mp4", f"{film}.webp"])]


def write_pictures(
    folder: Path, names: Sequence[str], groups: Sequence[Sequence[Image]], more: Sequence[bytes] = ()
) -> list[str]:
    """Each image as PNG, all of them on one sheet (a group a row where there are several), and what else there is."""
    from smooth_rt.writers import contact_sheet, encode_png, write_files

    pictures = [image for images in groups for image in images]
    sheet = contact_sheet(pictures, len(groups[0]) if len(groups) > 1 else None)
    files = dict(zip(names, [*map(encode_png, [*pictures, sheet]), *more], strict=True))
    return [str(path) for path in write_files(folder, files)]
