"""fuse, build-engine, engines: what becomes of weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smooth_rt.commands.options import ModelOptions, OutputOptions, listed
from smooth_rt.commands.running import Stopwatch, build_progress, opened_model
from smooth_rt.errors import InputError

if TYPE_CHECKING:
    from smooth_rt.cache import Entry

__all__ = ["build_engine", "fuse", "inspect_engines", "list_engines", "prune_engines", "verify_engines"]

Output = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]
SHORT_KEY = 12  # digits of a key that tell it from others at a glance

Bundles = Annotated[
    list[Path],
    typer.Argument(metavar="BUNDLE...", help="Folders of built engines, or names that `engines list` shows."),
]


def fuse(options: ModelOptions, output: Output) -> dict[str, Any]:
    """Fuse a LoRA into a model and write a complete diffusers folder."""
    if options.chosen_lora is None:
        raise InputError("--lora: missing; name the LoRA to fuse")
    from smooth_rt.lora import fuse_to_folder, read_lora

    lora = read_lora(options.chosen_lora)
    written = fuse_to_folder(opened_model(options), lora, options.lora_strength, output)
    named = {"model": options.model, "lora": options.chosen_lora, "lora_strength": options.lora_strength}
    return {"command": "fuse", **named, "layers": len(lora.layers), "output": str(written)}


def build_engine(
    options: ModelOptions,
    backend: Annotated[str, typer.Option(help="Comma-separated: onnxruntime, openvino.")] = "onnxruntime,openvino",
    output: Annotated[
        Path | None, typer.Option(help="The bundle's folder. Left out: a folder of the cache.", show_default=False)
    ] = None,
) -> dict[str, Any]:
    """Export every network, compare it with PyTorch and write a bundle of engines."""
    backends = listed(backend)
    from smooth_rt.build import ensure_engines

    watch = Stopwatch()
    with build_progress() as progress:
        model = options.model if options.model_config is None else opened_model(options)
        built = ensure_engines(model, options.chosen_lora, options.lora_strength, backends, output, progress)
    parity = [
        {
            "network": record.network,
            "backend": record.backend,
            "output": error.output,
            "relative error": error.relative,
            "tolerance": error.tolerance,
        }
        for record in built.bundle.manifest.engines
        for error in record.parity
    ]
    return {
        "command": "build-engine",
        "output": str(built.bundle.path),
        "reused": built.reused,
        "reason": built.reason,
        "seconds": watch.seconds,
        "parity": parity,
    }


def list_engines(options: OutputOptions) -> dict[str, Any]:
    """The bundles of the cache, and whether they can be used."""
    from smooth_rt.build import cache_root
    from smooth_rt.cache import list_bundles

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
        "lora": f"{lora.source} at {lora.strength:g}" if lora is not None else "none",
        "dims": asdict(manifest.dims),
        "made_with": manifest.made_with,
        "engines": [
            {
                "network": record.network,
                "backend": f"{record.backend} {record.backend_version}",
                "precision": record.hint or record.precision,
                "key": record.key[:SHORT_KEY],
                "worst_error": max((parity.relative for parity in record.parity), default=None),
                "tolerance": min((parity.tolerance for parity in record.parity), default=None),
                "bytes": sum(file.size for file in manifest.files if file.path in (record.file, *record.weights)),
            }
            for record in manifest.engines
        ],
    }


def verify_engines(bundles: Bundles) -> dict[str, Any]:
    """Compare every file with the manifest's digests, and the backends' versions with the installed ones."""
    from engines.bundle import Bundle
    from smooth_rt.cache import examine, find
    from smooth_rt.errors import BundleError

    for path in map(find, bundles):
        Bundle.open(path, verify=True)
        fault = examine(path, verify=False).fault
        if fault is not None:
            raise BundleError(f"{path}: {fault}")
    return {"verified": [str(find(path)) for path in bundles]}


def prune_engines(
    every: Annotated[bool, typer.Option("--all", help="Remove the usable ones too.")] = False,
) -> dict[str, Any]:
    """Remove the cache's bundles that are damaged or stale."""
    from smooth_rt.cache import prune

    removed = prune(every=every)
    return {"removed": [_row(entry) for entry in removed], "bytes": sum(entry.size for entry in removed)}


def _row(entry: Entry) -> dict[str, Any]:
    source = entry.bundle.source if entry.bundle is not None else None
    lora = source.lora if source is not None else None
    return {
        "name": entry.path.name,
        "path": str(entry.path),
        "model": source.model if source is not None else None,
        "lora": f"{lora.source} at {lora.strength:g}" if lora is not None else None,
        "backends": list(entry.bundle.backends) if entry.bundle is not None else [],
        "bytes": entry.size,
        "fault": entry.fault,
    }
