"""The stages in order: graphs, verification, manifest. A bundle appears whole and verified, or not at all."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.bundle import MANIFEST, Bundle
from engines.contract import DERIVED, NETWORKS, Dims, Network, NetworkName
from engines.errors import EngineError, InputError
from engines.lora import LORA_FILE, LoraWeights
from engines.manifest import EngineRecord, FileRecord, Manifest, Parity, Source, VariantRecord, digest_file
from engines.recipes import (
    RECIPES,
    Recipe,
    build_revision,
    check_convolution,
    check_gradients,
    check_kernels,
    check_lora_mode,
    check_precision,
)
from engines.select import availability, backend_version, buildable, open_engine, runs_here
from engines.staging import staging
from engines.variant import Bounds, Order, Place
from export.graphs import cases
from export.layout import KINDS, write_layout
from export.needs import check_memory, disk_needed
from export.places import find_places
from export.reference import Reference
from export.stages import Graph, Stages, cannot_build
from export.steps import Progress, Steps
from export.to_int8 import Calibration, check_installed
from export.versions import peak_memory, versions

__all__ = ["Configs", "Progress", "build_bundle"]

VERIFY_SEED = 20231207  # of the inputs of verification, unlike the example inputs' seed
_WORK = "config/.work"  # of graphs on the way to others; gone before the bundle is published


def build_bundle(
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    source: Source,
    orders: Sequence[Order],
    target: Path,
    write_config: Callable[[Path], None],
    *,
    configs: Configs | None = None,
    keep: Bundle | None = None,
    calibration: Calibration | None = None,
    lora: LoraWeights | None = None,
    timing_caches: Path | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Build every network of every variant, verify every output of each, and publish the bundle at `target`.

    Args:
        networks: `engines.eager.torch_networks` of the model, fused, fp32, on the CPU.
        dims: the model's sizes.
        source: where the weights came from, for the manifest and the key.
        orders: the variants and the sizes that they are for; at least one.
        target: the bundle's folder; a bundle that stands there is replaced at the end, and kept if the build fails.
        write_config: writes what the pipeline needs into the folder it is given.
        configs: of the networks and the scheduler; with them the variants that others can open get a layout of theirs,
            see `layout`. `write_config` must then write the tokenizer, into `tokenizer`.
        keep: a bundle of the same source; its variants that are not built anew go into this one as they are, and so do
            the networks of a variant to which another is added.
        calibration: real runs of the model, for int8.
        lora: for variants whose LoRA is set at run time; `networks` are then those of the base model.
        timing_caches: a folder for what TensorRT remembers from build to build.
        memory: bytes that may be taken beside the model, see `machine.available_memory`; None: it is built in any case.
        progress: called before each step, and within long ones.

    Raises:
        InputError: no order, a precision that a backend is not built in, int8 without calibration, or networks that are
            not the contract's, or not fp32.
        EngineError: a backend is unknown or cannot run here, a network cannot be exported or converted, or the memory
            is too small for it.
        ParityError: a graph differs from its torch module; nothing is published.
        ModelError: a torch module gives numbers that are not finite.
        BundleError: `target` cannot be written, is somebody's folder, or the disk is full.
    """
    _check(networks, dims, orders, calibration, lora)
    check_memory(networks, dims, orders, memory)
    kept = [] if keep is None else [b for b in keep.variants if b.variant not in [o.variant for o in orders]]
    prompts = None if calibration is None else calibration.prompts
    before = [_before(keep, order, prompts) for order in orders]
    planned = {}
    for name in (*NETWORKS, *DERIVED):
        lacking = [one for one, has in zip(orders, before, strict=True) if name in one.networks and name not in has]
        planned[name] = [*Stages.plan(lacking, name), *["verify"] * len(lacking)]
    steps = Steps(progress, networks, planned)
    with staging(target, needed=disk_needed(networks, dims, orders)) as folder:
        ready = None if keep is None else keep.path
        stages = Stages(folder / _WORK, dims, calibration, steps.begin, ready, steps.detail, timing_caches)
        build = _Build(dims, source, folder, stages, steps, Reference(networks, lora))
        steps.begin("configuration", "configuration")
        (folder / "config").mkdir()
        write_config(folder / "config")
        for built in kept:
            _link_tree(keep, built.variant.name, folder)
        records: list[list[EngineRecord]] = [[] for _ in orders]
        seconds = [0.0 for _ in orders]
        for name in (*NETWORKS, *DERIVED):
            for index, order in enumerate(orders):
                started = time.perf_counter()
                if name in before[index] and keep is not None:
                    records[index].append(_link_files(keep, before[index][name], folder))
                elif name in order.networks:
                    records[index].append(build.engine(name, order))
                seconds[index] += time.perf_counter() - started
            build.stages.forget()
        if configs is not None:
            for order in orders:
                variant = order.variant
                kind = KINDS.get(variant.backend)
                # Nobody else feeds a strength, keeps to one size, or has this project's kernels.
                plain = (variant.convolution, variant.kernels) == ("direct", "backend")
                if kind is not None and variant.lora_mode != "runtime" and plain:
                    tokenizer = folder / "config" / "tokenizer"
                    write_layout(folder / variant.name, kind, configs.networks, tokenizer, configs.scheduler)
        steps.begin("manifest", "manifest")
        shutil.rmtree(folder / _WORK, ignore_errors=True)
        made = [build.variant(o, r, s) for o, r, s in zip(orders, records, seconds, strict=True)]
        files = [build.file(path) for path in sorted(folder.rglob("*")) if path.is_file()]
        _store_once(folder, files)
        manifest = Manifest(dims=dims, source=source, variants=[*kept, *made], files=files)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    steps.end()
    return Bundle.open(target, verify=False)


@dataclass(frozen=True)
class Configs:
    """What readers of other layouts want to know: each network's configuration, and the scheduler's."""

    networks: Mapping[NetworkName, Mapping[str, Any]]
    scheduler: Mapping[str, Any]


def _check(
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    orders: Sequence[Order],
    calibration: Calibration | None,
    lora: LoraWeights | None,
) -> None:
    if not orders:
        raise InputError("backends: none given; name one or more of " + ", ".join(n for n in RECIPES if n != "eager"))
    for order in orders:
        backend, precision = order.variant.backend, order.variant.precision
        reason = buildable(backend)
        if reason is not None:
            raise EngineError(f"engine {backend!r}: {reason}")
        if backend == "eager":
            raise InputError("backends: eager runs the torch modules and is not built; name another")
        check_precision(backend, precision)
        check_kernels(backend, order.variant.kernels)
        fault = cannot_build(order.variant)
        if fault is not None:
            raise EngineError(f"engine {backend!r}: {fault}")
        check_lora_mode(backend, precision, order.variant.lora_mode)
        check_convolution(order.variant, order.profiles)
        if order.variant.lora_mode != "fused" and lora is None:
            raise InputError(f"lora_mode={order.variant.lora_mode}: needs a LoRA whose strength can be set; name one")
        if precision == "int8":
            check_installed()
            if calibration is None:
                raise InputError("precision 'int8': needs real runs of the model to be calibrated on; none were given")
        for profile in order.profiles:
            profile.check(dims)
        if not order.profiles:
            raise InputError(f"{order.variant.name}: no profile is given; `every_size` is one")
        check_gradients(backend, precision, order.variant.lora_mode, order.gradients)
    if len({order.variant for order in orders}) != len(orders):
        raise InputError("orders: a variant is named twice; give it all of its profiles at once")
    if set(networks) != set(NETWORKS):
        raise InputError(f"networks: {', '.join(networks)} given; a bundle holds {', '.join(NETWORKS)}")
    for name, module in networks.items():
        for key, parameter in module.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_cpu:
                raise InputError(
                    f"{name}: {key} is {parameter.dtype} on {parameter.device}; load it in float32 on the CPU"
                )


@dataclass
class _Build:
    """What the stages of one build share."""

    dims: Dims
    source: Source
    folder: Path
    stages: Stages
    steps: Steps
    reference: Reference
    files: dict[Path, FileRecord] = field(default_factory=dict)

    def engine(self, name: NetworkName, order: Order) -> EngineRecord:
        """Build and verify one network of one variant; its record.

        Of a graph that is rewritten, the plain one that others open is compared with torch, too, at one case; what was
        found is noted as `plain_graph`: of each output the relative error, as in `Parity`.
        """
        variant = order.variant
        network, module = variant.network(name, self.dims), self.reference.module(variant, name)
        folder = self.folder / variant.name / network.name
        folder.mkdir(parents=True)
        bounds = [one for profile in order.profiles for one in profile.bounds(network, self.dims)]
        recipe = RECIPES[variant.backend][variant.precision][network.name]
        lora = self.reference.lora if variant.lora_mode == "refit" and name in ("unet", *DERIVED) else None
        replaceable = {} if lora is None else lora.base
        graph = self.stages.build(network, module, variant, recipe.precision, bounds, folder, replaceable)
        gc.collect()  # the exporter's reference cycles hold a copy of the weights
        here = availability(variant.backend) is None and runs_here(variant.architecture) is None
        what = f"{network.name}: {'verify' if here else 'not run here:'} {variant.name}"
        self.steps.begin(what, "verify", network.name)
        places: dict[str, Place] = {}
        if lora is not None:
            exported = self.stages.exported(network, recipe.precision)
            places = find_places(graph.path, exported, variant.backend, lora.base)
            lora.save(folder / LORA_FILE)
        parity: list[Parity] = []
        # What cannot run here is published without, and proved where it runs before it is used.
        if here:
            tried = cases(network, self.dims, bounds)
            with open_engine(variant.backend, network, graph.path, recipe.hint, bounds) as engine:
                engine.places = places
                parity = self.reference.verify(
                    engine, variant, network, self.dims, recipe.precision, VERIFY_SEED, tried
                )
            if graph.plain is not None:
                graph.notes["plain_graph"] = self.reference.verify_plain(
                    graph.plain, variant, network, self.dims, recipe, places, VERIFY_SEED, tried[0]
                )
        record = self.record(network, recipe, graph, bounds, parity)
        return record.model_copy(update={"places": places})

    def record(
        self, network: Network, recipe: Recipe, graph: Graph, bounds: list[Bounds], parity: list[Parity]
    ) -> EngineRecord:
        """The manifest's record of one verified graph; its key follows with the variant's."""
        weights = [self.file(path) for path in sorted(graph.path.parent.iterdir()) if path != graph.path]
        return EngineRecord(
            network=network.name,
            precision=recipe.precision,
            hint=recipe.hint,
            file=self.file(graph.path).path,
            graph=self.file(graph.path).sha256,
            weights={file.path: file.sha256 for file in weights if not file.path.endswith("/config.json")},
            bounds=bounds,
            key="",
            parity=parity,
            notes=graph.notes,
        )

    def variant(self, order: Order, engines: list[EngineRecord], seconds: float) -> VariantRecord:
        """The record of a variant whose engines are all there."""
        variant = order.variant
        record = VariantRecord(
            variant=variant,
            profiles=list(order.profiles),
            backend_version=backend_version(variant.backend),
            build_revision=build_revision(variant),
            engines=engines,
            made_with=versions(),
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory(),
        )
        keyed = [e.model_copy(update={"key": record.expected_key(e, self.source, self.dims)}) for e in engines]
        return record.model_copy(update={"engines": keyed})

    def file(self, path: Path) -> FileRecord:
        """The record of a finished file; each is read once."""
        if path not in self.files:
            name = path.relative_to(self.folder).as_posix()
            self.files[path] = FileRecord(path=name, size=path.stat().st_size, sha256=digest_file(path))
        return self.files[path]


def _before(keep: Bundle | None, order: Order, prompts: Sequence[str] | None) -> dict[NetworkName, EngineRecord]:
    """What a bundle has of an order already, by network: for the same sizes, by the installed version and, of int8,
    calibrated on these prompts."""
    if keep is None:
        return {}
    same = [built for built in keep.variants if built.variant == order.variant and built.profiles == [*order.profiles]]
    valid = [built for built in same if keep.stale(built, elsewhere=True) is None]
    return {record.network: record for built in valid for record in built.engines if record.calibrated_on(prompts)}


def _link_files(bundle: Bundle, record: EngineRecord, folder: Path) -> EngineRecord:
    """Take a network's files over from a bundle, as `_link_tree` does with a variant's; its record."""
    for path in (record.file, *record.weights):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _link(str(bundle.path / path), str(folder / path))
    return record


def _link_tree(bundle: Bundle | None, variant: str, folder: Path) -> None:
    """Take a variant's files over from a bundle, by links where the disk has them: they are not written any more."""
    if bundle is not None:
        shutil.copytree(bundle.path / variant, folder / variant, copy_function=_link)


def _link(old: str, new: str) -> None:
    try:
        os.link(os.path.realpath(old), new)
    except OSError:  # another disk, or one without links
        shutil.copyfile(old, new)


def _store_once(folder: Path, files: Sequence[FileRecord]) -> None:
    """Let files of the same content share one place on the disk: variants of one graph, tokenizers, configurations."""
    first: dict[str, Path] = {}
    for record in files:
        path = folder / record.path
        if path.suffix == ".data":  # onnx refuses weights of several links: they may have come from elsewhere
            continue
        same = first.setdefault(record.sha256, path)
        if same == path or os.path.samefile(same, path):
            continue
        link = path.with_name(f".{path.name}.link")
        try:
            os.link(same, link)
        except OSError:
            return  # a disk without links
        link.replace(path)
