"""Writes results: PNG, contact sheet, MP4, animated WebP, text. All files of one call appear, or none.

Everything is encoded in memory first; then every file goes to a temporary sibling; last, each is renamed into place,
and what stood there is kept aside until all of them are.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image

from engines.locks import ReadWriteLock
from engines.paths import expanded
from engines.staging import foreign
from smooth_rt.errors import InputError, SmoothRTError, reason

__all__ = [
    "check_output",
    "contact_sheet",
    "encode_json",
    "encode_mp4",
    "encode_png",
    "encode_webp",
    "there_and_back",
    "write_files",
]

SHOWN_SIDE = 256  # small frames are enlarged to about this many pixels in films, which players do not scale well
SHOWN_NAME = 60  # characters of a path that is too long, in a message
GAP = 2  # pixels between the images of a contact sheet
# x264's constant rate factor. Of photographs that fade into each other, 512 pixels wide, channels decode to within 2
# levels of the frames on average; 23, its default, gives 3.7 in a quarter of the bytes.
QUALITY = 10
BT709 = 1  # AVCOL_SPC_BT709 of FFmpeg, for which PyAV has no name
# The default rounds colours by up to 1.9 levels, and this by up to 1.6, near the least that 8 bits allow.
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


_WRITING = ReadWriteLock()  # threads that write the same file take turns


def check_output(folder: str | Path, names: Iterable[str] = (), inputs: Iterable[str | os.PathLike[str]] = ()) -> Path:
    """Whether files can be written under `folder`, asked before a long computation. Leaves nothing.

    Args:
        names: the files that `write_files` will be given. Others of the same names are replaced, as by any tool.
        inputs: what the computation reads: none of it may be replaced. What is no file (a hub id) is passed over.

    Raises:
        InputError: a part of the path is a file, the nearest folder that exists takes no file, the system refuses
            the path (a name in it is too long, say), it lies in a bundle, a file that would be written is one of
            the inputs, by whatever path it was named, or in its place is a folder, a device or a pipe.
    """
    folder, names = expanded(folder), tuple(names)
    try:
        _check_parts(folder)
        # A bundle may be added to by a build, which names no files.
        _check_bundles(folder, folder.absolute() if names else folder.absolute().parent)
        _check_places(folder, names)
        _check_inputs(folder, names, inputs)
    except OSError as error:
        named = str(folder)
        named = named if len(named) <= SHOWN_NAME else f"{named[:SHOWN_NAME]}..."
        raise InputError(f"{named}: {_advised(error)}") from error
    return folder


def _check_parts(folder: Path) -> None:
    for part in (folder, *folder.parents):
        if part.is_dir():
            try:
                # Rights alone do not tell: nobody writes into /proc or to a read-only disk, whatever they may.
                with tempfile.TemporaryFile(dir=part):
                    return
            except OSError as error:
                raise InputError(
                    f"{folder}: {part} is not writable ({reason(error)}); name another folder with --output"
                ) from error
        if part.exists() or part.is_symlink():
            raise InputError(f"{folder}: {part} is a file, not a folder; name another folder with --output")


def _check_bundles(folder: Path, first: Path) -> None:
    """A bundle holds what a build writes and nothing else: one with pictures in it is no bundle any more."""
    for part in (first, *first.parents):
        if (part / "manifest.json").is_file() and (part / "config").is_dir() and foreign(part) is None:
            raise InputError(f"{folder}: lies in the bundle {part}; name another folder with --output")


def _check_inputs(folder: Path, names: Iterable[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    read = {identity: path for path in inputs if (identity := _identity(path)) is not None}
    if not read or not folder.is_dir():
        return
    for name in names:
        identity = _identity(folder / name)
        if identity in read:
            raise InputError(
                f"{folder / name}: would replace the input {read[identity]}; name another folder with --output"
            )


def _check_places(folder: Path, names: Iterable[str]) -> None:
    """What is there already must be files: a device that were replaced would be gone."""
    for target in (folder / name for name in names):
        if target.exists() and not target.is_file():
            kind = "folder" if target.is_dir() else "device or a pipe"
            raise InputError(f"{target}: is a {kind} where a file should go; remove it or name another --output")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What a file is whichever way it is named: through links, or in another case where that does not count."""
    try:
        found = os.stat(expanded(path))
    except (OSError, ValueError):  # nothing is there; who reads it says so
        return None
    return found.st_dev, found.st_ino


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write `files` (name -> content) into `folder`, which is created if need be; returns their paths in order.

    Files of the same names are replaced. On any failure or interruption nothing of this call is left, not even the
    folder, and what was to be replaced stands as it did.

    Raises:
        InputError: the folder cannot be one (see `check_output`).
        SmoothRTError: the disk is full, read-only or refuses.
    """
    with _WRITING.write():
        return _write_files(folder, files)


def _write_files(folder: str | Path, files: Mapping[str, bytes]) -> list[Path]:
    folder = check_output(folder, files)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    partials: dict[Path, Path] = {}
    replaced: dict[Path, Path] = {}
    renaming, target = False, folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            target = folder / name
            if os.path.lexists(target):
                replaced[target] = folder / f".{name}.old-{os.getpid()}"
            partials[target] = folder / f".{name}.partial-{os.getpid()}"
            _write(partials[target], content)
        renaming = True
        for target, partial in partials.items():
            if target in replaced:
                target.replace(replaced[target])
            partial.replace(target)
    except BaseException as error:
        if renaming:
            _put_back(partials, replaced)
        _remove(partials.values())
        _remove_folders(made)
        if isinstance(error, OSError):
            raise SmoothRTError(f"{target}: cannot be written: {_advised(error)}") from error
        raise
    try:
        _remove(replaced.values())
    except BaseException:  # interrupted: all files are new by now, and the old ones go all the same
        _remove(replaced.values())
        raise
    return list(partials)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        # A full disk may show only here: the write itself lands in the page cache.
        os.fsync(file.fileno())


def _put_back(partials: Mapping[Path, Path], replaced: Mapping[Path, Path]) -> None:
    """Undo the renames of `write_files`, wherever they stopped. The files themselves tell how far they came: an
    interruption may have come between a rename and the line after it."""
    for target, partial in partials.items():
        with suppress(OSError):
            if target in replaced:
                if os.path.lexists(replaced[target]):
                    replaced[target].replace(target)
            elif not os.path.lexists(partial):
                target.unlink(missing_ok=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _remove_folders(made: Iterable[Path]) -> None:
    for part in made:
        try:
            part.rmdir()
        except OSError:
            return


def _advised(error: OSError) -> str:
    space = "free some space, or " if error.errno == errno.ENOSPC else ""
    return f"{reason(error)}; {space}name another folder with --output"


def encode_json(value: Any) -> bytes:
    """`value` as indented UTF-8 JSON with a newline at its end."""
    # Bytes of a path that are not UTF-8 are lone surrogates in Python, which JSON can hold as escapes alone.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def encode_png(image: Image.Image) -> bytes:
    """The image at its own size, lossless."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All images, in order, on one white page; `columns` defaults to about the square root of their number.

    Raises:
        InputError: no image.
    """
    if not images:
        raise InputError("contact sheet: no images; give at least one")
    columns = columns or max(1, round(len(images) ** 0.5))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (max(image.size[axis] for image in images) + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (GAP + (i % columns) * width, GAP + (i // columns) * height))
    return sheet


def there_and_back(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames forwards, then backwards without repeating either end: a film that loops without a jump."""
    return [*frames, *frames[-2:0:-1]]


def _shown_size(frames: Sequence[Image.Image], even: bool) -> tuple[int, int]:
    """Return the width and height of a film, in pixels: the first frame's, times a whole number where that is small.

    Args:
        even: make both sides even, as a codec with subsampled colours asks.

    Raises:
        InputError: no frames.
    """
    if not frames:
        raise InputError("film: no frames; give at least one")
    width, height = frames[0].size
    factor = max(1, round(SHOWN_SIDE / max(width, height)))
    width, height = width * factor, height * factor
    return (width + width % 2, height + height % 2) if even else (width, height)


def _enlarged(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the frame in RGB at `size`; a frame of that size keeps its pixels."""
    return frame.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def encode_mp4(frames: Sequence[Image.Image], fps: int = 12) -> bytes:
    """Encode frames as H.264 in MP4: one video frame per frame, in BT.709 colours that are tagged, with fast start.

    Args:
        frames: Images in sRGB. Small ones are enlarged by a whole number, an odd side by one pixel. All take the size
            of the first.
        fps: Frames per second.

    Returns:
        The file. Its index comes before the frames, so that a browser plays it while it loads.

    Raises:
        InputError: no frames.
    """
    size = _shown_size(frames, even=True)
    buffer = io.BytesIO()

    def reopened(url: str, flags: int, options: dict[str, str]) -> io.BytesIO:  # noqa: ARG001
        return io.BytesIO(buffer.getvalue())

    # Fast start: the muxer opens its own output again, to read the frames that it moves behind the index.
    with av.open(buffer, "w", format="mp4", options={"movflags": "+faststart"}, io_open=reopened) as film:
        stream = film.add_stream("libx264", rate=fps, options={"crf": str(QUALITY)})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        # Without tags, players take the matrix by the height: BT.601 below 720 lines, BT.709 from there.
        codec = stream.codec_context
        codec.colorspace, codec.color_range = BT709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        converter = VideoReformatter()
        for number, frame in enumerate(frames):
            picture = converter.reformat(
                av.VideoFrame.from_ndarray(np.asarray(_enlarged(frame, size)), format="rgb24"),
                format="yuv420p",
                src_colorspace=Colorspace.ITU709,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=SCALING,
            )
            picture.pts, picture.time_base = number, Fraction(1, fps)
            film.mux(stream.encode(picture))
        film.mux(stream.encode())
    return buffer.getvalue()


def encode_webp(frames: Sequence[Image.Image], fps: int = 12) -> bytes:
    """The frames as an animated WebP that repeats for ever; small frames are enlarged by a whole number.

    Raises:
        InputError: no frames.
    """
    size = _shown_size(frames, even=False)
    first, *rest = (_enlarged(frame, size) for frame in frames)
    buffer = io.BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=90, method=4
    )
    return buffer.getvalue()
