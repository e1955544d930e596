"""Text files that users bring: captions, prompts, JSON configs.

They are UTF-8, with or without the byte order mark that Windows tools write, and with the line ends of any system.
"""

from __future__ import annotations

import codecs
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smooth_rt.errors import InputError

__all__ = ["decode", "read_json", "read_lines", "read_text", "readable_folder", "without_marks"]

MARK = "\ufeff"  # a tokenizer makes three tokens of it
OTHER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
TEXT_SUFFIXES = {".json", ".txt"}  # of files that libraries read from a model's folder


def without_marks(text: str) -> str:
    """Return `text` without byte order marks, which stand inside it where files were joined."""
    return text.replace(MARK, "")


def decode(content: bytes, name: str) -> str:
    r"""Return UTF-8 text without byte order marks, with "\n" as line ends.

    Args:
        content: the bytes of a file.
        name: the file's name for messages.

    Raises:
        InputError: the text is in another encoding.
    """
    for mark, encoding in OTHER_MARKS.items():
        if content.startswith(mark):
            raise InputError(f"{name}: is {encoding}, not UTF-8; save it as UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{name}: holds NUL characters, so it is binary or UTF-16, not UTF-8; save it as UTF-8")
    return without_marks(text).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """Return the text of a file; see `decode`.

    Raises:
        InputError: the text is in another encoding.
        OSError: the file cannot be read.
    """
    return decode(path.read_bytes(), str(path))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, stripped, empty ones included.

    Only line feeds and carriage returns end a line. Python's `splitlines` also splits at form feeds and at Unicode's
    separators (U+0085, U+2028), which stand inside prompts.

    Raises:
        InputError, OSError: as `read_text`.
    """
    return [line.strip() for line in read_text(path).split("\n")]


def read_json(path: Path) -> Any:
    """Return the value of a JSON file in any encoding of Unicode.

    Raises:
        OSError, ValueError, RecursionError: the file cannot be read, or is not JSON.
    """
    return json.loads(path.read_bytes())  # of bytes, json finds the encoding and passes over the mark


@contextmanager
def readable_folder(folder: Path) -> Iterator[Path]:
    """Yield `folder` for a library that refuses byte order marks in JSON and text files.

    If a file has one, it is a temporary folder in which such files are rewritten as UTF-8 and all others are links.
    """
    files = [Path(where, name) for where, _, names in os.walk(folder) for name in names]
    marked = {path for path in files if path.suffix in TEXT_SUFFIXES and _marked(path)}
    if not marked:
        yield folder
        return
    with TemporaryDirectory(prefix="smooth-rt-", ignore_cleanup_errors=True) as temporary:
        for path in files:
            copy = Path(temporary) / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path in marked:
                content = path.read_bytes()
                text = content.decode(json.detect_encoding(content), "replace")
                copy.write_text(without_marks(text), encoding="utf-8", newline="")
            else:
                _link(path, copy)
        yield Path(temporary)


def _marked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError:  # reported by the library that reads it
        return False
    return begin.startswith((codecs.BOM_UTF8, *OTHER_MARKS))


def _link(path: Path, copy: Path) -> None:
    try:
        copy.symlink_to(path.absolute())
    except OSError:  # Windows may refuse links
        shutil.copyfile(path, copy)
