"""Is a bundle whole? Its manifest is read, and its files are held against it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from engines.command import build_command
from engines.errors import BundleError, EngineError
from engines.manifest import FORMAT, FileRecord, Manifest, digest_file
from engines.staging import PARTIAL

__all__ = ["MANIFEST", "Stamp", "check_files", "check_unchanged", "read_manifest", "stamps"]

MANIFEST = "manifest.json"
Stamp = tuple[int, int, int, int]  # a file: device, inode, time of its last change in ns, bytes
READ = frozenset({".json", ".txt", ".model"})  # of configurations and tokenizers


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`.

    Raises:
        BundleError: it is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    unfinished = PARTIAL.fullmatch(folder.name)
    if unfinished is not None:
        whole = folder.with_name(unfinished["name"])
        raise BundleError(f"{folder}: what a build leaves off or is at work in; open {whole}, the bundle, instead")
    mend = f"rebuild it with `{build_command(folder)}`"
    try:
        there = folder.is_dir()
    except PermissionError as error:
        raise BundleError(
            f"{folder}: cannot be read ({error.strerror}); name a folder that this user can read"
        ) from error
    if os.path.lexists(folder) and not there:
        raise BundleError(f"{folder}: not a folder, so it is no bundle; name the folder of one")
    if not there:
        raise BundleError(f"{folder}: no such bundle folder; build it with `{build_command(folder)}`")
    if os.path.exists(path) and not path.is_file():  # a pipe would never end
        raise BundleError(f"{path}: not a file; {mend}")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing, so this is no bundle or an unfinished one; {mend}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON; {mend}") from error
    number = content.get("format") if isinstance(content, dict) else None
    if type(number) is not int:
        raise BundleError(f"{path}: not a bundle's manifest; {mend}")
    if number != FORMAT:
        raise BundleError(f"{path}: bundle format {number}, this version reads format {FORMAT}; {mend}")
    try:
        return Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        said = " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
        raise BundleError(f"{path}: {said}; {mend}") from error


def check_files(folder: Path, files: Sequence[FileRecord], mend: str, digests: bool) -> None:
    """Hold the files of a bundle against their records: presence and size, and with `digests` the sha256.

    What the pipeline may read in config/ must be among them.

    Raises:
        BundleError: one is missing, damaged or leads out of the bundle; `mend` is said with it.
    """
    root = folder.resolve()
    listed = {record.path for record in files}
    # Not by rglob, which fails where another process removes the bundle meanwhile.
    walked = os.walk(folder / "config")
    for found in sorted(Path(where, name) for where, _, names in walked for name in names):
        if found.suffix in READ and found.relative_to(folder).as_posix() not in listed:
            raise BundleError(f"{found}: not among the manifest's files; {mend}")
    for record in files:
        file = folder / record.path
        if not _resolved(file, mend).is_relative_to(root):
            raise BundleError(f"{file}: leads out of the bundle; {mend}")
        if not file.is_file():
            raise BundleError(f"{file}: missing; {mend}")
        try:
            size = file.stat().st_size
            if size != record.size:
                raise BundleError(f"{file}: {size} bytes instead of {record.size}, so it is damaged; {mend}")
            if digests and digest_file(file) != record.sha256:
                raise BundleError(f"{file}: its sha256 is not the manifest's, so it is damaged; {mend}")
        except OSError as error:
            raise BundleError(f"{file}: cannot be read ({error.strerror}); {mend}") from error


def stamps(folder: Path, files: Sequence[FileRecord]) -> dict[str, Stamp | None]:
    """What tells each file from another that takes its place; None of one that is not there."""
    return {record.path: _stamp(folder / record.path) for record in files}


def check_unchanged(folder: Path, files: Sequence[FileRecord], seen: dict[str, Stamp | None], prefix: str) -> None:
    """Hold the files whose paths begin with `prefix` against their stamps in `seen`: an engine opens some of them only
    as a call needs them, and another build may have put others in their place meanwhile. The same content may.

    Raises:
        EngineError: one was replaced or removed.
    """
    for record in files:
        if not record.path.startswith(prefix):
            continue
        file = folder / record.path
        stamp = _stamp(file)
        if stamp == seen[record.path]:
            continue
        if stamp is None or digest_file(file) != record.sha256:
            raise EngineError(f"{file}: was replaced or removed since the bundle was opened; open it again")
        seen[record.path] = stamp


def _stamp(file: Path) -> Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _resolved(file: Path, mend: str) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise BundleError(f"{file}: a link that leads nowhere; {mend}") from error
