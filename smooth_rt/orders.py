"""What a build is asked for, and what of it a bundle lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from engines.bundle import Bundle, Source
from engines.contract import Dims, NetworkName
from engines.recipes import RECIPES, check_convolution, check_gradients, check_kernels, check_lora_mode, check_precision
from engines.select import BOUNDED, buildable, targets
from engines.variant import (
    Convolution,
    Kernels,
    LoraMode,
    Order,
    Precision,
    Profile,
    Variant,
    every_size,
    few_images,
    merged,
)
from smooth_rt.errors import EngineError, InputError
from smooth_rt.ranges import check

__all__ = ["lacking", "variants_of"]


def variants_of(
    backends: Sequence[str],
    precision: str,
    gpu_arch: str | None,
    lora_mode: str,
    gradients: Sequence[NetworkName],
    convolution: str,
    kernels: str,
    profiles: Sequence[Profile],
) -> list[Variant]:
    """What is asked for, one variant a backend, each checked before anything is loaded."""
    known = [name for name in RECIPES if name != "eager"]  # which runs the torch modules
    if not backends:
        raise InputError(f"backends: none named; name one or more of {', '.join(known)}")
    for name in backends:
        if name not in known:
            raise InputError(f"backend {name!r}: there is nothing to build for it; choose from {', '.join(known)}")
        reason = buildable(name)
        if reason is not None:
            raise EngineError(f"engine {name!r}: {reason}")
        check_precision(name, precision)
    for name in backends:
        check_lora_mode(name, precision, lora_mode)
        check_gradients(name, precision, lora_mode, gradients)
    convolution, kernels = check(convolution=convolution, kernels=kernels)
    for name in backends:
        check_kernels(name, kernels)
    exact, mode = cast("Precision", precision), cast("LoraMode", lora_mode)
    form, own = cast("Convolution", convolution), cast("Kernels", kernels)
    variants = [
        Variant(backend=name, precision=exact, lora_mode=mode, architecture=built_for, convolution=form, kernels=own)
        for name, built_for in targets(backends, gpu_arch).items()
    ]
    for variant in variants:
        check_convolution(variant, profiles)
    return variants


def lacking(
    there: Bundle | str,
    source: Source,
    variants: Sequence[Variant],
    profiles: Sequence[Profile],
    gradients: tuple[NetworkName, ...],
    dims: Dims,
    calibrated_on: Sequence[str] | None = None,
) -> dict[Order, str]:
    """What has to be built, and why. A variant that was built for other profiles or gradients keeps those.

    `calibrated_on` are the prompts that are named for int8, one an image; who names none takes what there is.
    """

    def wanted(variant: Variant) -> list[Profile]:
        return list(profiles) or [few_images(dims) if variant.backend in BOUNDED else every_size(dims)]

    if isinstance(there, str) or there.misfit(source) is not None:
        fault = there if isinstance(there, str) else str(there.misfit(source))
        return {
            Order(variant=variant, profiles=tuple(wanted(variant)), gradients=gradients): fault for variant in variants
        }
    found = {}
    for variant in variants:
        # Who names no size takes what there is.
        reason = there.misfit(source, variant, profiles, gradients)
        same = next((built for built in there.variants if built.variant == variant), None)
        if reason is None and same is not None and not same.calibrated_on(calibrated_on):
            reason = f"{there.path}: {variant.name} is calibrated on other prompts"
        if reason is not None:
            before, has = ([], ()) if same is None else (same.profiles, same.gradients)
            asked = list(profiles) if profiles or before else wanted(variant)
            every = tuple(dict.fromkeys([*has, *gradients]))
            found[Order(variant=variant, profiles=tuple(merged(before, asked)), gradients=every)] = reason
    return found
