"""What each backend is built in: by the precision that is asked for, the precision of every network's graph; and which
can be built with which gradients, LoRAs, convolutions and kernels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

from engines import kernels
from engines.contract import DERIVED, NETWORKS, NetworkName, said_gradients
from engines.errors import InputError
from engines.providers import BY_BACKEND
from engines.variant import KERNELS, LORA_MODES, LoraMode, Precision, Profile, Variant

__all__ = [
    "NATIVE",
    "RECIPES",
    "Recipe",
    "build_revision",
    "check_convolution",
    "check_gradients",
    "check_kernels",
    "check_lora_mode",
    "check_precision",
    "native_hint",
]

NATIVE = ("openvino",)  # the backends that take kernels of this project


@dataclass(frozen=True)
class Recipe:
    """How one network is built: the precision of its graph, and the hint that the backend is given with it."""

    precision: Precision
    hint: str | None = None


# The four networks, and the UNet's gradients and features with them.
_FP32: dict[NetworkName, Recipe] = {name: Recipe("fp32") for name in (*NETWORKS, *DERIVED)}
_FP16: dict[NetworkName, Recipe] = {name: Recipe("fp16") for name in (*NETWORKS, *DERIVED)}
_IN_HALF: dict[Precision, dict[NetworkName, Recipe]] = {
    "fp32": _FP32,
    "fp16": _FP16,
    "bf16": {name: Recipe("bf16") for name in (*NETWORKS, *DERIVED)} | {"text_encoder": Recipe("fp32")},
}


def _plain(recipes: dict[NetworkName, Recipe]) -> dict[NetworkName, Recipe]:
    """Without gradients."""
    return {name: recipes[name] for name in NETWORKS}


# By backend and by the precision asked for: what each network is built in. The text encoder runs once a prompt and the
# VAE's encoder once an image: they stay exact where that costs next to nothing.
RECIPES: dict[str, dict[Precision, dict[NetworkName, Recipe]]] = {
    "eager": {"fp32": _FP32},
    "onnxruntime": {"fp32": _FP32, "fp16": _FP16, "int8": {**_plain(_FP32), "unet": Recipe("int8")}},
    # On GPUs without TF32, which CUDA can be told. ONNX Runtime's TensorRT and TensorRT for RTX leave it on and have no
    # option for it, so their fp32 would be none.
    "onnxruntime-cuda": {"fp32": _FP32, "fp16": _FP16},
    "onnxruntime-tensorrt": {"fp16": _plain(_FP16)},
    "onnxruntime-tensorrt-rtx": {"fp16": _plain(_FP16)},
    # OpenVINO would compute in bf16 by itself where the processor can, so it is always told. fp16 weights are stored in
    # half the space and computed with in fp32.
    "openvino": {
        "fp32": {name: Recipe("fp32", "f32") for name in (*NETWORKS, *DERIVED)},
        "fp16": {name: Recipe("fp16", "f32") for name in NETWORKS},
        "bf16": {name: Recipe("bf16", "bf16") for name in (*NETWORKS, *DERIVED)}
        | {"text_encoder": Recipe("fp32", "f32")},
        "int8": {
            "text_encoder": Recipe("fp32", "f32"),
            "unet": Recipe("int8", "bf16"),
            "vae_encoder": Recipe("fp32", "f32"),
            "vae_decoder": Recipe("bf16", "bf16"),
        },
    },
    "inductor": {precision: _plain(recipes) for precision, recipes in _IN_HALF.items()},
    "tensorrt": _IN_HALF,
    "tensorrt-rtx": _IN_HALF,
}

# By how the LoRA is held, where it is not fused: what a backend does for it, and in which precisions it can.
SETTABLE: dict[LoraMode, tuple[str, dict[str, tuple[Precision, ...]]]] = {
    # Quantised and packed weights are no longer what they were.
    "refit": (
        "replace weights",
        {
            **{name: ("fp32",) for name in BY_BACKEND if "fp32" in RECIPES[name]},
            "openvino": ("fp32", "bf16"),
            "tensorrt": ("fp32", "fp16", "bf16"),
            "tensorrt-rtx": ("fp32", "fp16", "bf16"),
        },
    ),
    # int8 is calibrated on images of one strength.
    "runtime": (
        "take the strength as an input",
        {name: tuple(precision for precision in recipes if precision != "int8") for name, recipes in RECIPES.items()},
    ),
}


# Counted up where a backend is told to compute other numbers of the same graph, by what is no option of a build: an
# engine of an earlier count is stale. 1 is fp32 without TF32, and of inductor the fp32 islands in half precision.
_REVISIONS: dict[str, int] = {"inductor": 1, "tensorrt": 1, "tensorrt-rtx": 1}


def build_revision(variant: Variant) -> int:
    """The count of what was changed in how `variant` is built, as far as numbers go; 0 where nothing ever was."""
    own = kernels.REVISION if variant.kernels == "native" else 0
    return _REVISIONS.get(variant.backend, 0) + own  # either is only counted up, so their sum tells


def check_precision(backend: str, precision: str) -> None:
    """Raise InputError unless `backend` can be built in `precision`."""
    offered = RECIPES[backend]
    if precision not in offered:
        others = [name for name, precisions in RECIPES.items() if name != "eager" and precision in precisions]
        has = f"; that is what {', '.join(others)} can" if others else ""
        raise InputError(f"precision {precision!r}: {backend} is built in {', '.join(offered)}{has}")


def check_gradients(backend: str, precision: str, lora_mode: str, gradients: Collection[NetworkName]) -> None:
    """Raise InputError unless `backend` can be built in `precision` with these networks of gradients."""
    said = ",".join(said_gradients(gradients))
    if not said:
        return
    able = [one for one, networks in RECIPES[backend].items() if set(DERIVED) <= set(networks)]
    if not able:
        others = [name for name, has in RECIPES.items() if name != "eager" and set(DERIVED) <= set(has.get("fp32", {}))]
        raise InputError(f"gradients={said}: {backend} is not built with gradients; {', '.join(others)} are")
    if precision not in able:
        raise InputError(f"gradients={said}: {backend} has them in {', '.join(able)}, not in {precision}")
    if lora_mode == "refit" and not backend.startswith("onnxruntime"):
        # Others hold a weight several times over: as it is, transposed, negated.
        raise InputError(
            f"gradients={said}: {backend} cannot replace the weights of their graphs; choose --lora-mode fused or "
            "runtime, or onnxruntime"
        )


def check_lora_mode(backend: str, precision: str, lora_mode: str) -> None:
    """Raise InputError unless `backend` can hold a LoRA in that way, in that precision."""
    if lora_mode not in LORA_MODES:
        raise InputError(f"lora_mode={lora_mode}: unknown; choose from {', '.join(LORA_MODES)}")
    if lora_mode == "fused":
        return
    what, backends = SETTABLE[cast("LoraMode", lora_mode)]
    able = backends.get(backend, ())
    if precision not in able:
        does = f"can {what} in {', '.join(able)}, not in {precision}" if able else f"cannot {what}"
        raise InputError(f"lora_mode={lora_mode}: {backend} {does}; choose fused, or another backend")


def check_convolution(variant: Variant, profiles: Sequence[Profile]) -> None:
    """Raise InputError unless `variant` can be built with its convolutions, for these profiles together."""
    if variant.convolution == "direct":
        return
    asked = f"convolution={variant.convolution}"
    if variant.backend != "openvino" or variant.precision != "fp32":
        raise InputError(f"{asked}: openvino has it, in fp32, not {variant.backend} in {variant.precision}")
    if variant.lora_mode == "refit":
        raise InputError(f"{asked}: its weights are transformed and cannot be replaced; choose fused or runtime")
    sides = {(profile.height, profile.width) for profile in profiles}
    if len(sides) != 1 or not all(span.static for pair in sides for span in pair):
        built = " or ".join(f"height {height}, width {width}" for height, width in sorted(sides, key=str))
        raise InputError(
            f"{asked}: a graph is for one height and one width, not {built or 'every size'}; give both with --batch, "
            "and another --output for another size"
        )


def check_kernels(backend: str, kernels: str) -> None:
    """Raise InputError unless `backend` can be built with these kernels, which it then can in each of its precisions,
    however it holds a LoRA."""
    if kernels not in KERNELS:
        raise InputError(f"kernels={kernels}: unknown; choose from {', '.join(KERNELS)}")
    if kernels == "native" and backend not in NATIVE:
        able = ", ".join(NATIVE)
        raise InputError(f"kernels={kernels}: {able} has them, not {backend}; name {able} alone")


def native_hint(variant: Variant, name: NetworkName) -> str | None:
    """The hint that the native kernels of a network are built for; None where all of its kernels are the backend's."""
    if variant.kernels != "native" or name != "unet":
        return None
    return RECIPES[variant.backend][variant.precision][name].hint
