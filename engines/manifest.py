"""What a bundle's manifest.json holds: records of files, graphs and their origin, and the key that binds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeInt, model_validator

from engines.contract import DERIVED, NETWORKS, Dims, NetworkName
from engines.variant import Bounds, Place, Precision, Profile, Record, Variant

__all__ = [
    "CALIBRATED_ON",
    "FORMAT",
    "LARGEST_TOLERANCE",
    "EngineRecord",
    "FileRecord",
    "LoraSource",
    "Manifest",
    "Parity",
    "Source",
    "VariantRecord",
    "digest_file",
    "digest_json",
    "key_parts",
]

LARGEST_TOLERANCE = 0.5  # beyond it an error tells nothing: zeros are 1 off
CALIBRATED_ON = "calibrated_on"  # in an int8 engine's notes: the prompts, one an image
FORMAT = 4  # 3 knew the features of one block alone, 2 had one precision and one set of sizes a bundle


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    plain = pure.as_posix() == path and "\\" not in path and ":" not in path and "\0" not in path
    if not plain or pure.is_absolute() or not pure.parts or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a plain path inside the bundle")
    return path


def _named(model: str) -> str:
    if not model.strip() or "\0" in model:
        raise ValueError(f"{model!r} names no model")
    return model


InsidePath = Annotated[str, AfterValidator(_inside)]
Named = Annotated[str, AfterValidator(_named)]


class FileRecord(Record):
    """One file of the bundle: its path from the bundle's root, bytes and sha256."""

    path: InsidePath
    size: NonNegativeInt
    sha256: str


class LoraSource(Record):
    """A LoRA: where it came from and the digest of its tensors; `strength` where it is fused, else None: a bundle whose
    engines take the strength as they run is the same at every strength.

    `source` is what the user typed. `path` is its absolute path if it is a file or a folder; manifests of earlier
    versions have none.
    """

    source: str
    digest: str
    strength: FiniteFloat | None
    path: Named | None = None

    @property
    def location(self) -> str:
        """The name under which the LoRA is found from any folder: the path, or a name such as a hub id."""
        return self.path or self.source

    def __str__(self) -> str:
        return f"{self.source} at " + ("any strength" if self.strength is None else f"{self.strength:g}")


class Source(Record):
    """Where the weights came from: the model as the user named it, with the configs that were named for a single-file
    checkpoint, and what it was, by digest.

    `digests` has one entry for each of text_encoder, unet, vae, tokenizer and scheduler, of the pristine model: the
    LoRA stands apart.

    `model` and `config` are what the user typed. `model_path` and `config_path` are absolute paths if these are files
    or folders; manifests of earlier versions have none.
    """

    model: Named
    revision: str | None = None
    config: str | None = None
    digests: dict[str, str]
    lora: LoraSource | None = None
    model_path: Named | None = None
    config_path: Named | None = None

    @property
    def model_location(self) -> str:
        """The name under which the model is found from any folder: the path, or a name such as a hub id."""
        return self.model_path or self.model

    @property
    def config_location(self) -> str | None:
        """The name under which the configs are found from any folder, if any were named."""
        return self.config_path or self.config


class Parity(Record):
    """How far one output of an engine was from the torch module in fp32, at worst, over `cases` fresh random inputs.

    `relative` is the L2 norm of the difference over that of the reference, for each item of the batch alone;
    `max_abs` the largest difference of one element; `worst` the sizes at which `relative` was found. `unjudged` items
    of a gradient are left out: rounding in the engine's precision leaves next to nothing of them, whatever computes it.
    """

    output: str
    relative: FiniteFloat
    max_abs: FiniteFloat
    tolerance: FiniteFloat
    cases: int
    worst: dict[str, int]
    unjudged: int = 0

    def check(self, named: str) -> None:
        """Raise ValueError, which begins with `named`, unless these are errors that a build lets pass."""
        if not 0 <= self.relative <= self.tolerance <= LARGEST_TOLERANCE:
            raise ValueError(
                f"{named}: {self.output} differs from torch's by {self.relative:g}, tolerance {self.tolerance:g} (of "
                f"{LARGEST_TOLERANCE:g} at most)"
            )
        if self.cases < 1 or self.unjudged < 0 or self.max_abs < 0:
            raise ValueError(f"{named}: {self.output} was compared with torch's in {self.cases} cases")


class EngineRecord(Record):
    """One network's graph: its files, the sizes it was built for, and how exact it is.

    `key` sums up, with the variant and the source, all that can change its numbers or its validity. `precision` and
    `hint` are what `recipes.RECIPES` has for the network in a variant. `places` are the weights that can be replaced,
    by the torch parameter's name. `notes` are counts and choices of the build, such as the layers that were left in
    fp32.
    """

    network: NetworkName
    precision: Precision
    hint: str | None
    file: InsidePath
    graph: str
    weights: dict[InsidePath, str]
    bounds: list[Bounds]
    key: str
    parity: list[Parity]
    places: dict[str, Place] = Field(default_factory=dict)
    notes: dict[str, int | str | list[str]] = Field(default_factory=dict)

    def calibrated_on(self, prompts: Sequence[str] | None) -> bool:
        """Whether it is of these prompts, as far as prompts count: in int8. None stands for any."""
        return prompts is None or self.precision != "int8" or self.notes.get(CALIBRATED_ON) == [*prompts]


class VariantRecord(Record):
    """One variant that was built, its engines in the contract's order.

    Args:
        variant: what was asked for.
        profiles: the requests that it was built and verified for.
        backend_version: of the backend's library.
        build_revision: `recipes.build_revision` of the variant as it was built.
        engines: a record a network.
        made_with: versions of the libraries that took part, for the record.
        seconds: that the build took; `peak_memory_bytes`: the largest resident set, up to then, of one process: the one
            that built, with the model and the variants before in it, or one that it started to compile in.
    """

    variant: Variant
    profiles: list[Profile]
    backend_version: str
    build_revision: NonNegativeInt = 0
    engines: list[EngineRecord]
    made_with: dict[str, str] = Field(default_factory=dict)
    seconds: FiniteFloat = 0.0
    peak_memory_bytes: NonNegativeInt = 0

    @property
    def backend(self) -> str:
        """The variant's backend."""
        return self.variant.backend

    @property
    def proved(self) -> bool:
        """Whether every engine was compared with its torch module: not where it was built ahead of time."""
        return all(record.parity for record in self.engines)

    @property
    def gradients(self) -> tuple[NetworkName, ...]:
        """The networks of gradients that it has."""
        return tuple(record.network for record in self.engines if record.network in DERIVED)

    def calibrated_on(self, prompts: Sequence[str] | None) -> bool:
        """Whether its engines are of these prompts; see `EngineRecord`."""
        return all(record.calibrated_on(prompts) for record in self.engines)

    @property
    def prompts(self) -> list[str]:
        """That its engines were calibrated on; none where they were not, or an earlier version did not tell."""
        found = (record.notes.get(CALIBRATED_ON) for record in self.engines)
        return next((said for said in found if isinstance(said, list)), [])

    def engine(self, network: NetworkName) -> EngineRecord:
        """The record of a network: every variant of a manifest has those of `NETWORKS`, and its `gradients`."""
        return next(record for record in self.engines if record.network == network)

    def expected_key(self, record: EngineRecord, source: Source, dims: Dims) -> str:
        """The key that `record` has if its fields and those of the variant are what the graph was built from."""
        return digest_json(self.made_of(record, source, dims))

    def made_of(self, record: EngineRecord, source: Source, dims: Dims) -> dict[str, Any]:
        """What the key of `record` is the digest of: see `key_parts`."""
        return key_parts(
            dims=dims,
            graph=record.graph,
            weights=record.weights,
            source=source,
            variant=self.variant,
            bounds=record.bounds,
            precision=record.precision,
            hint=record.hint,
            backend_version=self.backend_version,
            build_revision=self.build_revision,
            places=record.places,
        )


class Manifest(Record):
    """What manifest.json holds."""

    format: int = FORMAT
    dims: Dims
    source: Source
    variants: list[VariantRecord]
    files: list[FileRecord]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.variants:
            raise ValueError("no variant is listed")
        digests = {file.path: file.sha256 for file in self.files}
        if len(digests) != len(self.files):
            raise ValueError("a file is listed twice")
        if len({built.variant for built in self.variants}) != len(self.variants):
            raise ValueError("a variant is listed twice")
        for built in self.variants:
            self._check(built, digests)
        return self

    def _check(self, built: VariantRecord, digests: Mapping[str, str]) -> None:
        name = built.variant.name
        wanted = [*NETWORKS, *(network for network in DERIVED if network in built.gradients)]
        if [record.network for record in built.engines] != wanted:
            raise ValueError(f"{name}: its engines are not {', '.join(NETWORKS)}")
        fused = self.source.lora is not None and self.source.lora.strength is not None
        if (built.variant.lora_mode != "fused") and (fused or self.source.lora is None):
            raise ValueError(f"{name}: the manifest's LoRA is not one of a strength that is set at run time")
        if not built.profiles:
            raise ValueError(f"{name}: no profile is listed")
        for record in built.engines:
            named = f"{name}: {record.network}"
            for path, digest in {record.file: record.graph, **record.weights}.items():
                if digests.get(path) != digest:
                    raise ValueError(f"{named}: {path} is not among the files with the same digest")
            network = built.variant.network(record.network, self.dims)
            bounds = [one for profile in built.profiles for one in profile.bounds(network, self.dims)]
            if record.bounds != bounds:
                raise ValueError(f"{named}: its bounds do not follow from the profiles")
            if record.parity and sorted(one.output for one in record.parity) != sorted(s.name for s in network.outputs):
                raise ValueError(f"{named}: its parity is not of its outputs")
            for one in record.parity:
                one.check(named)
            if record.key != built.expected_key(record, self.source, self.dims):
                raise ValueError(f"{named}: the key does not follow from the record")


def digest_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """The sha256, in hex, of a value's JSON with sorted keys; NaN and what JSON lacks raise ValueError or TypeError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def key_parts(
    *,
    dims: Dims,
    graph: str,
    weights: Mapping[str, str],
    source: Source,
    variant: Variant,
    bounds: Sequence[Bounds],
    precision: Precision,
    hint: str | None,
    backend_version: str,
    build_revision: int = 0,
    places: Mapping[str, Place | Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a graph's key is the `digest_json` of: two that share it compute the same numbers, valid in the same places.

    Args:
        dims: the sizes of the model.
        graph: digest of the graph's file.
        weights: digests of its weight files; where they lie does not matter.
        source: digests of the model's components, and the LoRA's digest, with its strength where it is fused; names do
            not matter.
        variant: backend, precision, how the LoRA is held, architecture.
        bounds: of each symbol, one for each size that it was built for.
        precision: of the graph; `hint`: the precision hint given to the backend.
        backend_version: of the backend's library.
        build_revision: of how the backend is told to compute: `recipes.build_revision`.
        places: of the weights that are replaced as the engine is opened; None or empty without.
    """
    kept = {name: dict(place) for name, place in (places or {}).items()}
    return {
        # Sizes that are not known are left out, as they were before there was such a size.
        "dims": {name: size for name, size in asdict(dims).items() if size is not None},
        "graph": graph,
        "weights": sorted(weights.values()),
        "model": source.digests,
        "lora": None if source.lora is None else [source.lora.digest, source.lora.strength],
        "variant": variant.model_dump(),
        "bounds": [{symbol: list(sizes) for symbol, sizes in one.items()} for one in bounds],
        "precision": [precision, hint],
        "backend_version": backend_version,
        # As sizes above: the keys of what was never built in another way are as they were.
        **({"build_revision": build_revision} if build_revision else {}),
        **({"places": digest_json(kept)} if kept else {}),
    }
