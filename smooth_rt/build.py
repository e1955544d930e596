"""The one door to `export`: from a model, a LoRA and backends to a bundle of engines, built or reused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle import Bundle, LoraSource, Source, digest_json
from engines.contract import gradients_named
from engines.paths import absolute
from engines.torch_modes import default_modes
from smooth_rt.cache import bundle_of, cache_root, compiled, limit, make_room, parse_size, timings, used
from smooth_rt.errors import BundleError, InputError
from smooth_rt.orders import lacking, variants_of
from smooth_rt.ranges import check, shown

if TYPE_CHECKING:
    from engines.bundle import VariantRecord
    from engines.contract import NetworkName
    from engines.lora import LoraWeights
    from engines.variant import Order, Profile
    from export.bisect import Divergence
    from smooth_rt.lora import Lora
    from smooth_rt.model import Model

__all__ = ["Built", "bisect_engines", "build_engines", "ensure_engines", "prove_engines"]

LOG = logging.getLogger("smooth_rt")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """A bundle, whether it was there already, and why it was reused or built."""

    bundle: Bundle
    reused: bool
    reason: str


@default_modes()
def build_engines(
    model: str | Path | Model = "default",
    lora: str | Path | Lora | None = None,
    lora_strength: float = 1.0,
    backends: Sequence[str] = ("onnxruntime", "openvino"),
    output: str | Path | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
    profiles: Sequence[Profile] = (),
    lora_mode: str = "fused",
    gradients: Sequence[str] = (),
    kernels: str = "backend",
) -> Bundle:
    """The bundle of `ensure_engines`, whether built or reused."""
    return ensure_engines(
        model,
        lora,
        lora_strength,
        backends,
        output,
        progress,
        precision,
        profiles,
        lora_mode=lora_mode,
        gradients=gradients,
        kernels=kernels,
    ).bundle


@default_modes()
def ensure_engines(
    model: str | Path | Model = "default",
    lora: str | Path | Lora | None = None,
    lora_strength: float = 1.0,
    backends: Sequence[str] = ("onnxruntime", "openvino"),
    output: str | Path | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
    profiles: Sequence[Profile] = (),
    calibration_prompts: Sequence[str] = (),
    gpu_arch: str | None = None,
    lora_mode: str = "fused",
    gradients: Sequence[str] = (),
    convolution: str = "direct",
    kernels: str = "backend",
) -> Built:
    """A bundle of the model's engines with the LoRA fused in; reused where one stands that is whole and still fits.

    A bundle in the place that is damaged, or made from other weights, another LoRA or strength, is built anew and
    replaced. One of the same weights is added to: what it lacks or has from another version of a backend is built, be
    it a variant or a network of gradients; everything else in it stays. Which of it happened, and why, is logged on
    "smooth_rt". Of two processes that want the same bundle one builds, and the other waits and uses it.

    Args:
        model: as `load_model` takes it, or a model as it returned it (the LoRA is then fused into its UNet).
        lora: None, or as `read_lora` takes or returns it.
        lora_strength: the factor that the LoRA is fused at; 1.0 is as trained.
        backends: of `engines.BACKENDS`; eager needs no bundle.
        output: the bundle's folder. None: a folder of the cache that is named by what the bundle is made of.
        progress: called with stage, steps done and steps in all.
        precision: of the engines: "fp32", "fp16", "bf16" or "int8", as far as each backend has it.
        profiles: the requests that the engines shall take beside those that they are built for already; none stands
            for every size.
        gpu_arch: for TensorRT for RTX and ONNX Runtime on GPUs, the architectures such as "sm80,sm89"; "rtx" is one
            engine for every GPU that TensorRT for RTX supports. None is the GPU at hand, or without one that the
            backend names every one that it supports. Backends of the CPU among others are built as without it.
        lora_mode: "fused"; "refit": the engines are those of the base model, and the LoRA's weights are put into them
            when they are opened, at any strength; or "runtime": the strength is an input of the UNet's graph.
            `lora_strength` is of no account here with either.
        gradients: that the engines shall have beside those that they have already: "text" (of the UNet's output with
            respect to the text embeddings), "sample" (to the latents), "both" (in one call) and "features" (those
            of the last up block but one, and their gradient) or, of another block, "features:up_blocks.1"; see
            `Engine.vjp` and `Engine.features`.
        convolution: "direct"; or "winograd": on OpenVINO in fp32, for profiles of one height and one width, 3x3
            convolutions are rewritten to take fewer multiplications. The weights take twice the space.
        kernels: "backend"; or "native": on OpenVINO, the UNet computes some of its layers in kernels of this project,
            which a C++ compiler compiles once on the machine that runs them.
        calibration_prompts: of the images that int8 is calibrated on; engines that were calibrated on others are built
            anew. None stands for those of the engines that are there, or those that ship.

    Raises:
        InputError: no backend, a precision or gradients that one lacks, a profile that is none of the model's, or a
            strength out of range.
        EngineError: a backend that cannot run here.
        ModelError: the model or the LoRA cannot be read or does not fit. ParityError: a graph is not exact enough.
        BundleError: `output` is in use by something else than a bundle, or cannot be written.
    """
    wrt, profiles = gradients_named(gradients), tuple(dict.fromkeys(profiles))
    variants = variants_of(backends, precision, gpu_arch, lora_mode, wrt, convolution, kernels, profiles)
    if calibration_prompts and precision != "int8":
        said = shown(list(calibration_prompts))
        raise InputError(f"calibration_prompts={said}: int8 alone is calibrated, not {precision}; leave them out")
    target = None if output is None else absolute(output)
    most = limit() if output is None else None
    memory = _memory()
    (lora_strength,) = check(lora_strength=lora_strength)
    from smooth_rt.lora import Lora, fused_with, read_lora
    from smooth_rt.model import Model, load_model
    from smooth_rt.opening import refresh_source
    from smooth_rt.scheduler_config import read_scheduler

    # The LoRA first: what is wrong with it is told before minutes of a large model.
    given = lora if lora is None or isinstance(lora, Lora) else read_lora(lora)
    loaded = model if isinstance(model, Model) else load_model(model)
    wrt = gradients_named(gradients, loaded.dims.up_blocks)
    for profile in profiles:
        profile.check(loaded.dims)
    read_scheduler(loaded.scheduler_config)  # engines do not need it, but every pipeline on them does
    if fused_with(loaded.unet) is not None:
        raise InputError(f"{loaded.source}: a LoRA is fused into this model, so its digests do not hold; load it again")
    adapter = loaded.lora if given is None else given
    record = None
    if adapter is not None:
        strength = lora_strength if lora_mode == "fused" else None
        record = LoraSource(source=adapter.source, digest=adapter.digest, strength=strength, path=adapter.path)
    elif lora_mode != "fused":
        raise InputError(f"lora_mode={lora_mode}: there is no LoRA whose strength could be set; name one")
    source = Source(
        model=loaded.source,
        revision=loaded.revision,
        config=loaded.config_source,
        digests=loaded.digests,
        lora=record,
        model_path=loaded.path,
        config_path=loaded.config_path,
    )

    target = target or bundle_of(source)
    with _alone(target):
        there = _open(target)
        if not isinstance(there, str) and there.dims.latent_size != loaded.dims.latent_size:
            # Earlier versions read another size from the same configs, and took every size for a square.
            there = f"{target}: its default size is not the model's"
        prompts = None
        if calibration_prompts:
            from smooth_rt.calibration import spread

            prompts = spread(calibration_prompts, loaded)
        missing = lacking(there, source, variants, profiles, wrt, loaded.dims, prompts)
        if not missing:
            reason = f"{target}: verified; made from the same weights by the installed versions"
            LOG.info("reusing engines: %s", reason)
            used(target)
            assert not isinstance(there, str)
            refresh_source(there, source)
            return Built(there, True, reason)
        fault = " ".join(dict.fromkeys(missing.values()))
        if _works_in(target):
            raise BundleError(f"{target}: the current folder, which a build replaces; call it from another folder")
        if any(order.variant.precision == "int8" for order in missing):
            from export.to_int8 import check_installed

            check_installed()  # before it is said that anything is built
        LOG.info("building engines for %s: %s", ", ".join(order.variant.name for order in missing), fault)
        keep = there if not isinstance(there, str) and there.misfit(source) is None else None
        if keep is not None and not calibration_prompts:
            # Another size, or another version of a backend, is no reason to calibrate on other prompts.
            same = (built for built in keep.variants if built.variant in [order.variant for order in missing])
            calibration_prompts = next((built.prompts for built in same if built.prompts), ())
        bundle = _build(loaded, adapter, source, list(missing), target, keep, progress, calibration_prompts, memory)
        if most is not None:
            make_room(most, keep=target)
        return Built(bundle, False, fault)


def prove_engines(
    bundle: Bundle, model: Model, seed: int = 1, progress: Progress | None = None
) -> dict[str, VariantRecord | str]:
    """Compare a bundle's engines with `model`, as `reopen_model` gives it, on fresh inputs: see `export.prove`.

    While a build adds to the bundle it waits, and while it compares, a build does.
    """
    from engines.eager import torch_networks
    from export.prove import prove

    bundle.caches = compiled()
    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    with _alone(bundle.path):
        bundle.reload()
        return prove(bundle, networks, seed, progress, _apart(model))


def bisect_engines(
    bundle: Bundle, model: Model, network: NetworkName, seed: int = 1, progress: Progress | None = None
) -> dict[str, Divergence | str | None]:
    """By variant, the first node at which a network parts from fp32 by more than a tenth of the tolerance; None if none
    does, or why it cannot be searched.

    Args:
        bundle: an open bundle. The exported graph is searched, rewritten as a variant's is: of int8 and fp16, whose
            graphs are others, it tells nothing.
        model: what the bundle was made from, as `reopen_model` gives it.
        network: which.
        seed: of the inputs.
        progress: as everywhere.
    """
    from engines.eager import torch_networks
    from export.prove import bisect

    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    return bisect(bundle, networks, network, seed, progress, _apart(model))


def _apart(model: Model) -> LoraWeights | None:
    from smooth_rt.lora import lora_weights

    return None if model.lora is None else lora_weights(model.unet, model.lora)


def _build(
    model: Model,
    lora: Lora | None,
    source: Source,
    orders: Sequence[Order],
    target: Path,
    keep: Bundle | None,
    progress: Progress | None,
    calibration_prompts: Sequence[str],
    memory: int | None,
) -> Bundle:
    from engines.eager import torch_networks
    from engines.machine import available_memory
    from export.build import Configs, build_bundle
    from smooth_rt.lora import fuse, lora_weights
    from smooth_rt.scheduler_config import finite_config

    weights = None
    if lora is not None and source.lora is not None:
        if source.lora.strength is None:
            weights = lora_weights(model.unet, lora)
        else:
            fuse(model.unet, lora, source.lora.strength)
    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    calibration = None
    if any(order.variant.precision == "int8" for order in orders):
        from smooth_rt.calibration import Trajectories

        calibration = Trajectories(model, calibration_prompts)
    return build_bundle(
        networks,
        model.dims,
        source,
        orders,
        target,
        model.write_config,
        configs=Configs(model.network_configs(), finite_config(model.config().sampling_config)),
        keep=keep,
        calibration=calibration,
        lora=weights,
        timing_caches=timings(),
        memory=available_memory() if memory is None else memory or None,
        progress=progress,
    )


def _memory() -> int | None:
    """SMOOTH_RT_MEMORY: bytes that a build may take beside the model, 0 for any; None where it is not set."""
    said = os.environ.get("SMOOTH_RT_MEMORY")
    return parse_size(said, "SMOOTH_RT_MEMORY") if said else None


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold `target` for this process, to write in it; whoever comes later waits, and says so once."""
    from filelock import FileLock, Timeout

    # Beside the bundles, not beside the target: a lock file stays.
    path = cache_root() / "locks" / f"{digest_json(os.path.realpath(target))[:32]}.lock"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        LOG.warning("waiting: another process is at work on %s", target)
        lock.acquire()
    except OSError as error:
        # Who builds into a folder of his own needs no cache. Should another do so too, the later one's bundle stands.
        LOG.info("building without a lock: %s (%s)", path.parent, error.strerror)
    try:
        yield
    finally:
        lock.release()


def _works_in(target: Path) -> bool:
    """Whether the current folder is `target` or lies in it: it would be renamed away, and `target` with it."""
    try:
        return Path.cwd().is_relative_to(os.path.realpath(target))
    except OSError:  # it is gone already
        return False


def _open(target: Path) -> Bundle | str:
    """The bundle at `target`, else why there is none that can be used."""
    if not os.path.exists(target):
        return f"{target}: not built yet"
    try:
        return Bundle.open(target)
    except BundleError as error:
        return str(error)
