"""A bundle: a folder of built graphs with a manifest.json that says what they are and proves that they are whole.

manifest.json             written last
config/                   what the pipeline needs to run without the model
onnx/<network>.onnx       with <network>.onnx.data beside it
openvino/<network>.xml    with <network>.bin beside it
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from engines.contract import NETWORKS, Dims, NetworkName, contract
from engines.errors import BundleError
from engines.manifest import (
    FORMAT,
    EngineRecord,
    FileRecord,
    LoraSource,
    Manifest,
    Parity,
    Source,
    build_command,
    digest_file,
    digest_json,
    engine_key,
)
from engines.select import architecture, backend_version, check_backend, open_engine
from engines.staging import staging

if TYPE_CHECKING:
    from engines.base import Engine

__all__ = [
    "MANIFEST",
    "Bundle",
    "EngineRecord",
    "FileRecord",
    "LoraSource",
    "Manifest",
    "Parity",
    "Source",
    "build_command",
    "digest_file",
    "digest_json",
    "engine_key",
    "staging",
]

MANIFEST = "manifest.json"


class Bundle:
    """An opened bundle. `open` has checked it; `engine` opens a network on a backend."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Open the bundle in the folder `path`.

        Args:
            path: the folder.
            verify: also compare every file's sha256; its presence and size are always checked.

        Raises:
            BundleError: the folder, its manifest or one of its files is missing, damaged, or of another format.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        mend = f"rebuild it with `{build_command(folder, manifest.source, _complete(manifest))}`"
        root = folder.resolve()
        for record in manifest.files:
            file = folder / record.path
            if not _resolved(file, mend).is_relative_to(root):
                raise BundleError(f"{file}: leads out of the bundle; {mend}")
            if not file.is_file():
                raise BundleError(f"{file}: missing; {mend}")
            try:
                size = file.stat().st_size
                if size != record.size:
                    raise BundleError(f"{file}: {size} bytes instead of {record.size}, so it is damaged; {mend}")
                if verify and digest_file(file) != record.sha256:
                    raise BundleError(f"{file}: its sha256 is not the manifest's, so it is damaged; {mend}")
            except OSError as error:
                raise BundleError(f"{file}: cannot be read ({error.strerror}); {mend}") from error
        return cls(folder, manifest)

    @property
    def dims(self) -> Dims:
        """The sizes of the model."""
        return self.manifest.dims

    @property
    def source(self) -> Source:
        """Where the weights came from."""
        return self.manifest.source

    @property
    def config(self) -> Path:
        """The folder that holds what the pipeline needs to run without the model."""
        return self.path / "config"

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that every network was built for."""
        return _complete(self.manifest)

    def record(self, network: NetworkName, backend: str) -> EngineRecord:
        """The manifest's record of a network on a backend.

        Raises:
            BundleError: it was not built. EngineError: the backend is unknown.
        """
        check_backend(backend)
        for record in self.manifest.engines:
            if (record.network, record.backend) == (network, backend):
                return record
        built = ", ".join(self.backends) or "no backend"
        raise BundleError(
            f"{self.path}: {network} is not built for {backend} (there is {built}); "
            f"run `{build_command(self.path, self.source, [*self.backends, backend])}`"
        )

    def stale(self, backend: str) -> str | None:
        """None if what was built for `backend` is valid here, else one line: what has changed and how to mend it.

        Raises:
            BundleError: the backend was not built. EngineError: it is unknown or not installed.
        """
        version, here = backend_version(backend), architecture()
        mend = f"rebuild it with `{build_command(self.path, self.source, self.backends)}`"
        for network in NETWORKS:
            record = self.record(network, backend)
            if record.backend_version != version:
                return f"{network} was built by {backend} {record.backend_version}, installed is {version}; {mend}"
            if record.architecture != here:
                return f"{network} was built and checked on {record.architecture}, this is {here}; {mend}"
        return None

    def misfit(self, source: Source, backends: Sequence[str], precision: str = "fp32") -> str | None:
        """None if the bundle can serve `source` on all of `backends`, else one line: what differs.

        Models and LoRAs are compared by digest, so a renamed folder still fits.
        """
        own = self.source
        for component in sorted({*own.digests, *source.digests}):
            if own.digests.get(component) != source.digests.get(component):
                return f"{self.path}: {component} is another one"
        loras = [None if s.lora is None else (s.lora.digest, s.lora.strength) for s in (own, source)]
        if loras[0] != loras[1]:
            return f"{self.path}: the LoRA or its strength is another one"
        if self.manifest.precision != precision:
            return f"{self.path}: built in {self.manifest.precision}, not {precision}"
        for backend in backends:
            if backend not in self.backends:
                return f"{self.path}: not built for {backend}"
            reason = self.stale(backend)
            if reason is not None:
                return f"{self.path}: {reason}"
        return None

    def engine(self, network: NetworkName, backend: str) -> Engine:
        """Open `network` on `backend`; the caller closes it.

        Raises:
            BundleError: it was not built, or by another version of the backend, or on another architecture.
            EngineError: the backend is unknown, cannot run here or cannot read the graph.
        """
        record = self.record(network, backend)
        reason = self.stale(backend)
        if reason is not None:
            raise BundleError(f"{self.path}: {reason}")
        return open_engine(backend, contract(network, self.dims), self.path / record.file, record.hint)


def _resolved(file: Path, mend: str) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise BundleError(f"{file}: a link that leads nowhere; {mend}") from error


def _complete(manifest: Manifest) -> tuple[str, ...]:
    built: dict[str, set[str]] = {}
    for record in manifest.engines:
        built.setdefault(record.backend, set()).add(record.network)
    return tuple(backend for backend, networks in built.items() if networks == set(NETWORKS))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    mend = f"rebuild it with `{build_command(folder)}`"
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; build it with `{build_command(folder)}`")
    if path.exists() and not path.is_file():  # a pipe would never end
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
