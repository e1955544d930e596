"""The torch modules of a pipeline: a model with its Smooth-LoRA fused, by name or as a bundle remembers them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from smooth_rt.checkpoint import HUB_ID
from smooth_rt.errors import BundleError, InputError
from smooth_rt.lora import Lora, fuse, read_lora
from smooth_rt.model import Model, load_model

if TYPE_CHECKING:
    from engines.bundle import Bundle, Source

__all__ = ["check_strength", "open_model", "refresh_source", "reopen_model"]


def open_model(
    model: str | Path | Model,
    lora: str | Path | None,
    lora_strength: float | None,
    config: str | Path | None = None,
) -> Model:
    """Load a model, unless it is one already, and fuse a LoRA into its UNet, unless that is None.

    Args:
        lora_strength: None leaves the UNet as it is and the LoRA beside it, for whoever sets its strength later.
        config: as in `load_model`.

    Raises:
        ModelError: the model or the LoRA cannot be read or does not fit.
    """
    adapter = None if lora is None else read_lora(lora)  # first: it is small, and a model takes minutes
    loaded = model if isinstance(model, Model) else load_model(model, config=config)
    return loaded if adapter is None else _with_lora(loaded, adapter, lora_strength)


def reopen_model(bundle: Bundle, config: str | Path | None = None) -> Model:
    """The model that a bundle was made from, with its LoRA, proved to be the same by digest; fused if it is there.

    Args:
        config: as in `load_model`, where the bundle was made from a single-file checkpoint; None stands for the one
            that it was made with.

    Raises:
        BundleError: the model or the LoRA has changed since.
        ModelError: it is gone.
    """
    source = bundle.source
    fused = source.lora
    if fused is not None:  # first, as in `open_model`
        adapter = read_lora(fused.location)
        if adapter.digest != fused.digest:
            raise BundleError(
                f"{bundle.path}: the LoRA {fused.location} is not what the bundle was made from; "
                "run smooth-rt build-engine again, or use another engine"
            )
    named = source.config_location if config is None else config
    loaded = replace(load_model(source.model_location, revision=source.revision, config=named), source=source.model)
    changed = [name for name, digest in source.digests.items() if loaded.digests.get(name) != digest]
    if changed:
        raise BundleError(
            f"{bundle.path}: {source.model_location} is not what the bundle was made from "
            f"({', '.join(changed)} changed); run smooth-rt build-engine again, or use another engine"
        )
    return loaded if fused is None else _with_lora(loaded, adapter, fused.strength)


def refresh_source(bundle: Bundle, source: Source) -> None:
    """Record in a bundle's manifest where its weights are now, if they are no longer where it says.

    They were moved or renamed, or the manifest is of a version that recorded relative paths.

    Args:
        bundle: an open bundle. One that cannot be written to stays as it is.
        source: the same weights by digest, as they were just named.
    """
    own = bundle.source
    loras = [] if own.lora is None else [(own.lora.source, own.lora.path)]
    if not all(_found(name, path) for name, path in [(own.model, own.model_path), *loras]):
        with suppress(BundleError):
            bundle.rewrite(bundle.manifest.model_copy(update={"source": source}))


def _found(name: str, path: str | None) -> bool:
    if path is not None:
        return Path(path).exists()
    return name == "default" or (HUB_ID.fullmatch(name) is not None and not Path(name).exists())


def _with_lora(model: Model, lora: Lora, strength: float | None) -> Model:
    if strength is None:
        return replace(model, lora=lora)
    fuse(model.unet, lora, strength)
    return model


def check_strength(bundle: Bundle, strength: float, name: str) -> None:
    """A strength other than 1 can be named for a bundle whose LoRA is set as it runs, and for no other.

    Raises:
        InputError: the bundle holds its LoRA fused, or none; `name` is what it is said of.
    """
    lora = bundle.source.lora
    if strength != 1.0 and (lora is None or lora.strength is not None):
        raise InputError(
            f"{name}: the bundle holds its LoRA fused, or none; leave it out, or build with --lora-mode "
            "runtime or refit"
        )
