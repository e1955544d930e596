"""Compare the engines of a bundle with the torch modules again, and find where one parts from them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.bundle import Bundle
from engines.contract import Network, NetworkName
from engines.errors import ParityError
from engines.lora import LoraWeights
from engines.manifest import EngineRecord, Manifest, VariantRecord
from engines.ort import plain_graph
from engines.recipes import Recipe, native_hint
from engines.select import availability, runs_here
from engines.variant import Variant
from export.bisect import RUNNERS, Divergence, Run, first_divergence, on_openvino
from export.graphs import Case, cases, random_inputs
from export.reference import Reference
from export.to_onnx import to_onnx
from export.to_openvino import fewer_multiplications, native_kernels
from export.verify import TOLERANCES

__all__ = ["bisect", "prove"]

SHARE = 0.1  # of the tolerance of a whole network, for a single result in it


def prove(
    bundle: Bundle,
    networks: Mapping[NetworkName, nn.Module],
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
    lora: LoraWeights | None = None,
) -> dict[str, VariantRecord | str]:
    """Compare every output of every engine that can run here, and of the plain graphs that others open, as a build
    does; by variant, its record with the errors found, or why it cannot run here.

    A variant that was built where it could not run gets its errors written into the manifest: from then on it is used.

    Args:
        bundle: an open bundle.
        networks: the torch modules that it was made from, fused as it says.
        seed: of the inputs.
        progress: called before each engine and after each comparison of it with torch.
        lora: of a bundle whose LoRA is set as it runs; `networks` are then those of the base model.

    Raises:
        ParityError: an engine's output, or a plain graph's, is over its tolerance or not finite.
        BundleError: an engine cannot be opened, or the manifest cannot be written.
    """
    reference = Reference(networks, lora)
    found: dict[str, VariantRecord | str] = {}
    faults = {
        built.variant.name: availability(built.backend) or runs_here(built.variant.architecture)
        for built in bundle.variants
    }
    total = sum(
        (len(_tried(bundle, built, record)) + (plain_graph(bundle.path / record.file) is not None))
        * reference.rounds(built.variant, record.network)
        for built in bundle.variants
        if faults[built.variant.name] is None
        for record in built.engines
    )
    done = 0

    def tell(what: str, more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(what, done, total)

    for built in bundle.variants:
        name = built.variant.name
        fault = faults[name]
        if fault is not None:
            found[name] = fault
            continue
        records = []
        for record in built.engines:
            what = f"{name}: {record.network}"
            tell(what, 0)
            network, tried = built.variant.network(record.network, bundle.dims), _tried(bundle, built, record)
            compared = partial(tell, what, 1)
            notes = dict(record.notes)
            plain, recipe = plain_graph(bundle.path / record.file), Recipe(record.precision, record.hint)
            with _of(bundle, name):
                with bundle.open_network(record.network, built, proved=False) as engine:
                    parity = reference.verify(
                        engine, built.variant, network, bundle.dims, record.precision, seed, tried, compared
                    )
                if plain is not None:
                    notes["plain_graph"] = reference.verify_plain(
                        plain, built.variant, network, bundle.dims, recipe, record.places, seed, tried[0], compared
                    )
            records.append(record.model_copy(update={"parity": parity, "notes": notes}))
        found[name] = built.model_copy(update={"engines": records})
    _note(bundle, found)
    return found


@contextmanager
def _of(bundle: Bundle, variant: str) -> Iterator[None]:
    """Name the bundle and the engine in what is said of a graph that is not exact."""
    try:
        yield
    except ParityError as error:
        raise ParityError(f"{bundle.path}: {variant}: {error}") from error


def bisect(
    bundle: Bundle,
    networks: Mapping[NetworkName, nn.Module],
    name: NetworkName,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
    lora: LoraWeights | None = None,
) -> dict[str, Divergence | str | None]:
    """By variant, the first node at which network `name` parts from fp32; see `smooth_rt.build.bisect_engines`.

    Raises:
        EngineError: the network cannot be exported, or a backend cannot run a part of it.
    """
    reference = Reference(networks, lora)
    found: dict[str, Divergence | str | None] = {}
    with tempfile.TemporaryDirectory(prefix="smooth-rt-bisect-") as folder:
        for built in bundle.variants:
            network = built.variant.network(name, bundle.dims)
            record = built.engine(name)
            (case, *_) = _tried(bundle, built, record)
            inputs = random_inputs(network, bundle.dims, case, torch.Generator().manual_seed(seed))
            graph = Path(folder) / str(built.variant.takes_strength(name)) / "model.onnx"
            runner = _runner(built.variant, record, network)
            if runner is None:
                found[built.variant.name] = "not searched: it does not run the exported graph in fp32 or bf16 on a CPU"
                continue
            if not graph.exists():
                to_onnx(reference.module(built.variant, name), network, bundle.dims, graph)
            found[built.variant.name] = first_divergence(
                graph, inputs, runner, SHARE * TOLERANCES[record.precision], progress=progress
            )
    return found


def _runner(variant: Variant, record: EngineRecord, network: Network) -> Run | None:
    """What computes the exported fp32 graph as the engine does; None where the engine's graph is another one."""
    if record.precision not in ("fp32", "bf16"):
        return None
    native = native_hint(variant, record.network)
    if (variant.convolution == "winograd" or native is not None) and record.hint is not None:

        def change(model: Any) -> None:
            if variant.convolution == "winograd":
                fewer_multiplications(model, network, record.bounds, native is not None)
            native_kernels(model, native, whole=variant.lora_mode == "refit")

        return on_openvino(record.hint, change)
    return RUNNERS.get("-".join([variant.backend, *([record.hint] if record.hint else [])]))


def _tried(bundle: Bundle, built: VariantRecord, record: EngineRecord) -> tuple[Case, ...]:
    """What an engine is compared at."""
    return cases(built.variant.network(record.network, bundle.dims), bundle.dims, record.bounds)


def _note(bundle: Bundle, found: Mapping[str, VariantRecord | str]) -> None:
    """Write the errors of what was never compared before; what the build found of the others stays."""
    changed = False
    variants = []
    for built in bundle.variants:
        fresh = found[built.variant.name]
        proved_now = not built.proved and isinstance(fresh, VariantRecord)
        changed = changed or proved_now
        variants.append(fresh if proved_now and isinstance(fresh, VariantRecord) else built)
    if changed:
        manifest: Manifest = bundle.manifest.model_copy(update={"variants": variants})
        bundle.rewrite(manifest)
