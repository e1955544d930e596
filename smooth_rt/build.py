"""The one door to `export`: from a model, a LoRA and backends to a bundle of engines, built or reused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smooth_rt.errors import BundleError, EngineError, InputError
from smooth_rt.ranges import check

if TYPE_CHECKING:
    from engines.bundle import Bundle, Source
    from smooth_rt.lora import Lora
    from smooth_rt.model import Model

__all__ = ["Built", "build_engines", "cache_root", "ensure_engines"]

LOG = logging.getLogger("smooth_rt")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """A bundle, whether it was there already, and why it was reused or built."""

    bundle: Bundle
    reused: bool
    reason: str


def cache_root() -> Path:
    """Where built engines are kept: SMOOTH_RT_CACHE, or the user's cache folder.

    Raises:
        InputError: it cannot be a folder, or not one that can be written to.
    """
    from platformdirs import user_cache_path

    chosen = os.environ.get("SMOOTH_RT_CACHE")
    root = Path(chosen).expanduser() if chosen else user_cache_path("smooth-rt", appauthor=False)
    there = next(part for part in (root, *root.absolute().parents) if os.path.lexists(part))
    if not there.is_dir():
        raise InputError(f"SMOOTH_RT_CACHE={root}: {there} is not a folder; set SMOOTH_RT_CACHE to one")
    return root


def build_engines(
    model: str | Path | Model = "default",
    lora: str | Path | Lora | None = None,
    lora_strength: float = 1.0,
    backends: Sequence[str] = ("onnxruntime", "openvino"),
    output: Path | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
) -> Bundle:
    """The bundle of `ensure_engines`, whether built or reused."""
    return ensure_engines(model, lora, lora_strength, backends, output, progress, precision).bundle


def ensure_engines(
    model: str | Path | Model = "default",
    lora: str | Path | Lora | None = None,
    lora_strength: float = 1.0,
    backends: Sequence[str] = ("onnxruntime", "openvino"),
    output: Path | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
) -> Built:
    """A bundle of the model's engines with the LoRA fused in; reused where one stands that is whole and still fits.

    A bundle in the place that is damaged, made from other weights, another LoRA or strength, or by another version of
    a backend is built anew and replaced. One that lacks a backend is built anew with what it had and what it lacked,
    so that nobody's engines go. Which of it happened, and why, is logged on "smooth_rt".

    Args:
        model: as `load_model` takes it, or a model as it returned it (the LoRA is then fused into its UNet).
        lora: None, or as `read_lora` takes or returns it.
        lora_strength: the factor that the LoRA is fused at; 1.0 is as trained.
        backends: onnxruntime, openvino; eager needs no bundle.
        output: the bundle's folder. None: a folder of the cache that is named by what the bundle is made of.
        progress: called with stage, steps done and steps in all.
        precision: of the graphs.

    Raises:
        InputError: no backend, or a strength out of range. EngineError: a backend that cannot run here.
        ModelError: the model or the LoRA cannot be read or does not fit. ParityError: a graph is not exact enough.
        BundleError: `output` is in use by something else than a bundle, or cannot be written.
    """
    wanted = _checked(backends)
    (lora_strength,) = check(lora_strength=lora_strength)
    from engines.bundle import LoraSource, Source
    from engines.select import availability
    from smooth_rt.lora import Lora, fused_with, read_lora
    from smooth_rt.model import Model, load_model

    loaded = model if isinstance(model, Model) else load_model(model)
    if fused_with(loaded.unet) is not None:
        raise InputError(f"{loaded.source}: a LoRA is fused into this model, so its digests do not hold; load it again")
    adapter = lora if lora is None or isinstance(lora, Lora) else read_lora(lora)
    record = None
    if adapter is not None:
        record = LoraSource(source=adapter.source, digest=adapter.digest, strength=lora_strength)
    source = Source(model=loaded.source, revision=loaded.revision, digests=loaded.digests, lora=record)
    target = cache_root() / "bundles" / _cache_key(source, precision) if output is None else output

    there = _open(target)
    fault = there if isinstance(there, str) else there.misfit(source, wanted, precision)
    if isinstance(there, str) or fault is not None:
        if not isinstance(there, str) and there.misfit(source, (), precision) is None:
            wanted += [name for name in there.backends if name not in wanted and availability(name) is None]
        LOG.info("building engines for %s: %s", ", ".join(wanted), fault)
        return Built(_build(loaded, adapter, source, wanted, target, progress, precision), False, str(fault))
    reason = f"{target}: verified; made from the same weights by the installed versions"
    LOG.info("reusing engines: %s", reason)
    return Built(there, True, reason)


def _build(
    model: Model,
    lora: Lora | None,
    source: Source,
    backends: Sequence[str],
    target: Path,
    progress: Progress | None,
    precision: str,
) -> Bundle:
    from engines.eager import torch_networks
    from export.build import build_bundle
    from smooth_rt.lora import fuse

    if lora is not None and source.lora is not None:
        fuse(model.unet, lora, source.lora.strength)
    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    return build_bundle(
        networks, model.dims, source, backends, target, model.write_config, precision=precision, progress=progress
    )


def _checked(backends: Sequence[str]) -> list[str]:
    from engines.select import availability

    if not backends:
        raise InputError("backends: none named; name onnxruntime, openvino or both")
    for name in backends:
        reason = availability(name)
        if reason is not None:
            raise EngineError(f"engine {name!r}: {reason}")
        if name == "eager":
            raise InputError(
                "backend 'eager': runs the torch modules and has nothing to build; name onnxruntime or openvino"
            )
    return list(dict.fromkeys(backends))


def _cache_key(source: Source, precision: str) -> str:
    """What decides the graphs. Backends and their versions are not in it: a bundle holds engines of several backends,
    and a new version's take the place of the old one's."""
    from engines.bundle import digest_json

    lora = None if source.lora is None else [source.lora.digest, source.lora.strength]
    return digest_json([source.digests, lora, precision])[:32]


def _open(target: Path) -> Bundle | str:
    """The bundle at `target`, else why there is none that can be used."""
    from engines.bundle import Bundle

    if not target.exists():
        return f"{target}: not built yet"
    try:
        return Bundle.open(target)
    except BundleError as error:
        return str(error)
