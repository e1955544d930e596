"""What a bundle's manifest.json holds: records of files, graphs and their origin, and the key that binds them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    model_validator,
)

from engines.contract import Dims, NetworkName

__all__ = [
    "FORMAT",
    "EngineRecord",
    "FileRecord",
    "LoraSource",
    "Manifest",
    "Parity",
    "Profile",
    "Source",
    "build_command",
    "digest_file",
    "digest_json",
    "engine_key",
]

FORMAT = 2  # 1 had keys without the model's sizes

# Per symbol, the least and the greatest size that a graph takes (None: no bound), in units of the contract's symbol.
Profile = dict[str, tuple[int, int | None]]


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    plain = pure.as_posix() == path and "\\" not in path and ":" not in path and "\0" not in path
    if not plain or pure.is_absolute() or not pure.parts or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a plain path inside the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file of the bundle: its path from the bundle's root, bytes and sha256."""

    path: InsidePath
    size: NonNegativeInt
    sha256: str


class LoraSource(_Record):
    """The LoRA that was fused: where it came from, the digest of its tensors, and the strength."""

    source: str
    digest: str
    strength: FiniteFloat


class Source(_Record):
    """Where the weights came from: the model as the user named it, and what it was, by digest.

    `digests` has one entry for each of text_encoder, unet, vae, tokenizer and scheduler, of the pristine model: the
    LoRA stands apart.
    """

    model: str
    revision: str | None = None
    digests: dict[str, str]
    lora: LoraSource | None = None


class Parity(_Record):
    """How far one output of an engine was from the torch module in fp32, at worst, over `cases` fresh random inputs.

    `relative` is the L2 norm of the difference over that of the reference, for each item of the batch alone;
    `max_abs` the largest difference of one element; `worst` the sizes at which `relative` was found.
    """

    output: str
    relative: FiniteFloat
    max_abs: FiniteFloat
    tolerance: FiniteFloat
    cases: int
    worst: dict[str, int]


class EngineRecord(_Record):
    """One graph on one backend: all that can change its numbers or its validity, summed up in `key`."""

    network: NetworkName
    backend: str
    backend_version: str
    architecture: str
    precision: str
    hint: str | None
    profile: Profile
    file: InsidePath
    graph: str
    weights: dict[InsidePath, str]
    key: str
    parity: list[Parity]

    def expected_key(self, source: Source, dims: Dims) -> str:
        """The key that this record has if its fields, `source` and `dims` are what the graph was built from."""
        return engine_key(
            dims=dims,
            graph=self.graph,
            weights=self.weights,
            source=source,
            precision=self.precision,
            hint=self.hint,
            profile=self.profile,
            backend=self.backend,
            backend_version=self.backend_version,
            architecture=self.architecture,
        )


class Manifest(_Record):
    """What manifest.json holds. `made_with`: versions of the libraries that took part, for the record."""

    format: int = FORMAT
    dims: Dims
    source: Source
    precision: str
    engines: list[EngineRecord]
    files: list[FileRecord]
    made_with: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.engines:
            raise ValueError("no engine is listed")
        digests = {file.path: file.sha256 for file in self.files}
        if len(digests) != len(self.files):
            raise ValueError("a file is listed twice")
        seen = set()
        for record in self.engines:
            name = f"{record.network} on {record.backend}"
            if (record.network, record.backend) in seen:
                raise ValueError(f"{name} is listed twice")
            seen.add((record.network, record.backend))
            for path, digest in {record.file: record.graph, **record.weights}.items():
                if digests.get(path) != digest:
                    raise ValueError(f"{name}: {path} is not among the files with the same digest")
            if record.key != record.expected_key(self.source, self.dims):
                raise ValueError(f"{name}: the key does not follow from the record")
        return self


def digest_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """The sha256, in hex, of a value's JSON with sorted keys; NaN and what JSON lacks raise ValueError or TypeError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def engine_key(
    *,
    dims: Dims,
    graph: str,
    weights: Mapping[str, str],
    source: Source,
    precision: str,
    hint: str | None,
    profile: Mapping[str, tuple[int, int | None]],
    backend: str,
    backend_version: str,
    architecture: str,
) -> str:
    """The key of a built graph: two that share it compute the same numbers and are valid in the same places.

    Args:
        dims: the sizes of the model.
        graph: digest of the graph's file.
        weights: digests of its weight files; where they lie does not matter.
        source: digests of the model's components, and the LoRA's digest and strength; names do not matter.
        precision: of the graph, such as "fp32".
        hint: the precision hint given to the backend.
        profile: bounds of each symbol.
        backend: its name; `backend_version`: its library's version; `architecture`: see `select.architecture`.
    """
    return digest_json(
        {
            "dims": asdict(dims),
            "graph": graph,
            "weights": sorted(weights.values()),
            "model": source.digests,
            "lora": None if source.lora is None else [source.lora.digest, source.lora.strength],
            "precision": precision,
            "hint": hint,
            "profile": {symbol: list(bounds) for symbol, bounds in profile.items()},
            "backend": [backend, backend_version],
            "architecture": architecture,
        }
    )


def build_command(path: Path | None = None, source: Source | None = None, backends: Sequence[str] = ()) -> str:
    """The command that builds a bundle like this one again."""
    words = ["smooth-rt", "build-engine"]
    if source is not None:
        words += ["--model", source.model]
        # Left out, --lora is the shipped one where the model is the default.
        words += ["--lora", "none" if source.lora is None else source.lora.source]
        if source.lora is not None:
            words += ["--lora-strength", f"{source.lora.strength:g}"]
    if backends:
        words += ["--backend", ",".join(backends)]
    if path is not None:
        words += ["--output", str(path)]
    return shlex.join(words)
