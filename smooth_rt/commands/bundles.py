"""engines list, inspect, verify, prune, export-key: the bundles that were built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from engines.contract import NETWORKS, said_gradients
from smooth_rt.commands.options import OutputOptions
from smooth_rt.commands.progress import build_progress
from smooth_rt.errors import InputError
from smooth_rt.ranges import MOST_IMAGES, check, choice

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.contract import NetworkName
    from engines.manifest import EngineRecord
    from smooth_rt.build import Progress
    from smooth_rt.cache import Entry
    from smooth_rt.model import Model

__all__ = ["export_key", "inspect_engines", "list_engines", "prune_engines", "verify_engines"]

PLAIN = "the plain graph, which others open"
SHORT_KEY = 12  # digits of a key that tell it from others at a glance
# Parts of a key that an engine's own name holds, as in openvino-fp32-refit.
TOLD_BY_NAME = tuple(f"variant.{part}" for part in ("backend", "precision", "lora_mode", "convolution", "kernels"))
_DIGEST = re.compile(r"[0-9a-f]{64}")

Bundles = Annotated[
    list[Path],
    typer.Argument(metavar="BUNDLE...", help="Folders of built engines, or names that `engines list` shows."),
]


def list_engines(options: OutputOptions) -> dict[str, Any]:
    """The bundles of the cache, and whether they can be used."""
    from smooth_rt.cache import cache_root, list_bundles

    rows = [_row(entry) for entry in list_bundles()]
    if not options.json:
        rows = [{key: value for key, value in row.items() if key != "path"} for row in rows]
    return {"cache": str(cache_root()), "bundles": rows}


def inspect_engines(bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")]) -> dict[str, Any]:
    """What a bundle holds: its source, and each graph with its key, version and worst error. All of it is in its
    manifest.json."""
    from engines.bundle import MANIFEST, Bundle
    from smooth_rt.cache import find

    folder = find(bundle)
    manifest = Bundle.open(folder, verify=False).manifest
    lora = manifest.source.lora
    return {
        "manifest": str(folder / MANIFEST),
        "format": manifest.format,
        "model": manifest.source.model,
        "revision": manifest.source.revision,
        "lora": str(lora) if lora is not None else "none",
        "dims": asdict(manifest.dims),
        "profiles": {built.variant.name: [str(profile) for profile in built.profiles] for built in manifest.variants},
        "made_with": {built.variant.name: built.made_with for built in manifest.variants},
        "engines": [
            {
                "engine": built.variant.name,
                "version": built.backend_version,
                "network": record.network,
                "precision": record.precision if record.hint is None else f"{record.precision}, hint {record.hint}",
                "key": record.key[:SHORT_KEY],
                **_worst(record),
                "bytes": sum(file.size for file in manifest.files if file.path in (record.file, *record.weights)),
            }
            for built in manifest.variants
            for record in built.engines
        ],
    }


def _worst(record: EngineRecord) -> dict[str, float | None]:
    """The output that comes nearest to its tolerance; outputs of one graph may have different ones."""
    worst = max(record.parity, key=lambda one: one.relative / one.tolerance, default=None)
    if worst is None:
        return {"worst_error": None, "tolerance": None}
    return {"worst_error": worst.relative, "tolerance": worst.tolerance}


def verify_engines(
    bundles: Bundles,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also compare each output with PyTorch again, on fresh inputs.")
    ] = False,
    images: Annotated[
        int, typer.Option(metavar="N", help="Also sample N images on each engine and on PyTorch: dB and seconds.")
    ] = 0,
    bisect: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="Also find the first node of unet, … that parts from fp32 (fp32 and bf16).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs of --parity and --bisect.")] = 1,
) -> dict[str, Any]:
    """Compare every file with the manifest's digests, and the backends' versions with the installed ones."""
    from engines.bundle import Bundle
    from smooth_rt.cache import examine, find
    from smooth_rt.errors import BundleError

    if not 0 <= images <= MOST_IMAGES:
        raise InputError(f"--images={images}: give a whole number from 0 to {MOST_IMAGES}")
    check(seed=seed)
    if bisect is not None:
        bisect = choice("bisect", bisect, NETWORKS)
    result: dict[str, Any] = {"verified": [str(find(path)) for path in bundles]}
    for path in map(find, bundles):
        bundle = Bundle.open(path, verify=True)
        fault = examine(path, verify=False).fault
        if fault is not None:
            raise BundleError(f"{path}: {fault}")
        if parity or images or bisect:
            from smooth_rt.opening import reopen_model

            model = reopen_model(bundle)
            with build_progress("verifying: ") as progress:
                if parity:
                    result.setdefault("parity", []).extend(_parity(bundle, model, seed, progress))
                if bisect:
                    result.setdefault("bisect", []).extend(_bisect(bundle, model, bisect, seed, progress))
                if images:
                    result.setdefault("images", []).extend(_images(bundle, model, images, progress))
    return result


def _parity(bundle: Bundle, model: Model, seed: int, progress: Progress) -> list[dict[str, Any]]:
    from smooth_rt.build import prove_engines

    rows: list[dict[str, Any]] = []
    for name, found in prove_engines(bundle, model, seed, progress).items():
        if isinstance(found, str):
            rows.append({"engine": name, "network": None, "output": None, "relative error": None, "note": found})
            continue
        for record in found.engines:
            for error in record.parity:
                numbers = {"output": error.output, "relative error": error.relative, "note": None}
                rows.append({"engine": name, "network": record.network, **numbers})
            for said in cast("list[str]", record.notes.get("plain_graph", [])):
                output, relative = said.split()
                numbers = {"output": output, "relative error": float(relative), "note": PLAIN}
                rows.append({"engine": name, "network": record.network, **numbers})
    return rows


def _bisect(bundle: Bundle, model: Model, network: str, seed: int, progress: Progress) -> list[dict[str, Any]]:
    from smooth_rt.build import bisect_engines

    rows = []
    for name, found in bisect_engines(bundle, model, cast("NetworkName", network), seed, progress).items():
        row: dict[str, Any] = {
            "engine": name,
            "network": network,
            "node": None,
            "operator": None,
            "relative error": None,
        }
        if found is not None and not isinstance(found, str):
            row |= {"node": found.node, "operator": found.operator, "relative error": found.error}
        said = found if isinstance(found, str) else "exported anew, it parts nowhere" if found is None else None
        rows.append({**row, "note": said})
    return rows


def _images(bundle: Bundle, model: Model, count: int, progress: Progress) -> list[dict[str, Any]]:
    from engines.select import availability, runs_here
    from smooth_rt.evaluation.fidelity import fidelity
    from smooth_rt.evaluation.inputs import read_prompts
    from smooth_rt.pipeline import SmoothPipeline

    prompts = read_prompts()
    chosen = [prompts[index * len(prompts) // count % len(prompts)] for index in range(count)]
    runnable = [
        built
        for built in bundle.variants
        if availability(built.backend) is None and runs_here(built.variant.architecture) is None
    ]
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(
                SmoothPipeline.from_engines(
                    bundle,
                    built.backend,
                    precision=built.variant.precision,
                    lora_mode=built.variant.lora_mode,
                    convolution=built.variant.convolution,
                    kernels=built.variant.kernels,
                )
            )
            for built in runnable
        ]
        reference = stack.enter_context(SmoothPipeline.from_pretrained(model, engine="eager"))
        found = fidelity(pipes, reference, chosen, progress=progress)
    return [
        {
            "engine": built.variant.name,
            "images": count,
            "median dB": one.median,
            "worst dB": one.worst,
            "s an image": one.seconds_an_image,
            "x PyTorch": one.speedup,
        }
        for built, one in zip(runnable, found, strict=True)
    ]


def prune_engines(
    every: Annotated[bool, typer.Option("--all", help="Remove the usable ones too.")] = False,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="20G", help="Also remove the ones not used for longest, down to this size.", show_default=False
        ),
    ] = None,
) -> dict[str, Any]:
    """Remove the cache's bundles that are damaged or stale. Builds do it by size: SMOOTH_RT_CACHE_LIMIT, 40G.

    Kept inversions (2 GiB at most) and compiled kernels stay in the cache's folder; delete it to be rid of them.
    """
    from smooth_rt.cache import make_room, parse_size, prune

    most = None if max_size is None else parse_size(max_size, "max_size")
    removed = prune(every=every)
    if most is not None:
        removed += make_room(most)
    return {"removed": [_row(entry) for entry in removed], "bytes": sum(entry.size for entry in removed)}


def export_key(bundles: Bundles, options: OutputOptions) -> dict[str, Any]:
    """The key of every engine and what it is made of: with several bundles, why they differ.

    With --json an engine's key is the sha256 of its made_of, written with sorted keys and no spaces.
    """
    from engines.bundle import Bundle
    from smooth_rt.cache import find

    rows: list[dict[str, Any]] = []
    for path in dict.fromkeys(map(find, bundles)):
        manifest = Bundle.open(path, verify=False).manifest
        for built in manifest.variants:
            for record in built.engines:
                named = {"bundle": str(path), "engine": built.variant.name, "network": record.network}
                made_of = built.made_of(record, manifest.source, manifest.dims)
                rows.append({**named, "key": record.key, "made_of": made_of})
    if options.json:
        return {"engines": rows}
    # For people once what all share, and beside each engine the rest that its name does not tell, as narrow as can be.
    bundles = list(dict.fromkeys(row["bundle"] for row in rows))
    parts = [dict(_leaves({**row["made_of"], "bounds": _sizes(row["made_of"]["bounds"])})) for row in rows]
    names = list(dict.fromkeys(name for part in parts for name in part))
    told = {name: [part.get(name) for part in parts] for name in names}
    alike = {name: values[0] for name, values in told.items() if all(value == values[0] for value in values)}
    different = [name for name in names if name not in alike and name not in TOLD_BY_NAME]
    return {
        "bundles": [f"{number}: {path}" for number, path in enumerate(bundles, 1)],
        "alike": [{"part": name, "value": value} for name, value in alike.items()],
        "engines": [
            {
                **({"bundle": bundles.index(row["bundle"]) + 1} if len(bundles) > 1 else {}),
                **{column: row[column] for column in ("engine", "network")},
                "key": row["key"][:SHORT_KEY],
                **{name: part.get(name) for name in different},
            }
            for row, part in zip(rows, parts, strict=True)
        ],
    }


def _sizes(bounds: list[Mapping[str, list[int | None]]]) -> str:
    said = [
        ", ".join(f"{name} {':'.join(str(n or '*') for n in ends)}" for name, ends in one.items()) for one in bounds
    ]
    return "; ".join(said)


def _leaves(parts: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted name; digests as short as people compare them."""
    for name, value in parts.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", _short(value)


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value[:SHORT_KEY] if isinstance(value, str) and _DIGEST.fullmatch(value) else value


def _row(entry: Entry) -> dict[str, Any]:
    source = entry.bundle.source if entry.bundle is not None else None
    variants = entry.bundle.variants if entry.bundle is not None else ()
    lora = source.lora if source is not None else None
    return {
        "name": entry.path.name,
        "path": str(entry.path),
        "model": source.model if source is not None else None,
        "lora": str(lora) if lora is not None else None,
        "engines": [built.variant.name for built in variants],
        "gradients": {built.variant.name: said_gradients(built.gradients) for built in variants if built.gradients},
        "bytes": entry.size,
        "fault": entry.fault,
    }
