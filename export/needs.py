"""What a build takes of the disk and of the memory, told before anything runs.

Both are estimates. The one of the memory counts what a build adds to the model, which is loaded already. The networks
are built and verified one after the other, so it is the hungriest step that counts, which is the greater of

    building   a multiple of the weights
    verifying  the weights once for each form that is opened, and what the largest case holds beside them

and half a GiB for libraries. The multiples are measured (docs/measurements, "Memory of a build"); what a case holds is
counted on the torch module (`export/activations.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from engines.contract import DERIVED, NETWORKS, WRT, Dims, NetworkName, contract
from engines.eager import gradient_networks
from engines.errors import EngineError
from engines.recipes import RECIPES, native_hint
from engines.select import ONNX, TENSORRT
from engines.specialised import one_size
from engines.staging import said_size
from engines.variant import Bounds, Order, Precision, Profile, Span
from export.activations import held_at_most, without_numbers
from export.graphs import Case, cases
from export.transformed import added_by_transforms

__all__ = ["Need", "check_memory", "disk_needed", "memory_needed"]

_GRAPH_SHARE = 1.1  # graph files and rounding, over the weights' bytes
_ON_DISK: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.5, "bf16": 1.0, "int8": 0.5}
_COMPILING = 3.0  # the folder that inductor works in, over the weights of the network: `to_inductor`
# The memory that building a network adds at its largest, over the bytes of its weights in fp32. By backend, then by the
# precision of the graph; others are as fp32.
_IN_TENSORRT: dict[Precision, float] = {"fp32": 3.5, "fp16": 3.0, "bf16": 3.0}
_IN_ONNX: dict[Precision, float] = {"fp32": 1.2, "fp16": 2.2, "int8": 9.5}
_BUILDING: dict[str, Mapping[Precision, float]] = {
    **dict.fromkeys(ONNX, _IN_ONNX),
    "openvino": {"fp32": 3.0, "int8": 3.5},
    "inductor": {"fp32": 4.5},
    **dict.fromkeys(TENSORRT, _IN_TENSORRT),
}


@dataclass(frozen=True)
class _Opened:
    """What a backend that runs on the processor takes: for each form of a graph that it opens over the weights, by
    precision (others are as fp32), and beside them over what the torch module holds, free sizes or one."""

    weights: Mapping[Precision, float]
    held: float
    held_static: float


# Inductor's are not measured.
_VERIFYING: dict[str, _Opened] = {
    "onnxruntime": _Opened({"fp32": 1.2, "fp16": 2.2, "int8": 1.0}, 1.5, 1.5),
    "openvino": _Opened({"fp32": 2.2, "int8": 1.2}, 2.5, 1.3),
    "inductor": _Opened({"fp32": 2.0}, 1.5, 1.5),
}
# Of a gradient graph, over the UNet's: it holds weights as they are and transposed; and of one that is opened.
_GRADIENT = 1.5
_GRADIENT_OPENED = 1.8
# With weights that are transformed for 3x3 convolutions, over those that are not: SD1.5's UNet, as two sizes of it are
# opened, the file mapped.
_TRANSFORMED_IN_MEMORY = 1.6
_ALWAYS = 2**29  # bytes; libraries that are loaded on the way


@dataclass(frozen=True)
class Need:
    """Bytes that a build adds to the loaded model at its largest, and the network that it is for. `profile` and `case`
    are what is verified then, None where it is the building that takes most."""

    size: int
    network: NetworkName
    profile: Profile | None = None
    case: Case | None = None


def disk_needed(networks: Mapping[NetworkName, nn.Module], dims: Dims, orders: Sequence[Order]) -> int:
    """Bytes on disk at the fullest moment: the weights once a variant, and once as ONNX on the way; of inductor once
    for each size that it compiles, and the folder that it works in."""
    held = [one for one in orders if one.variant.backend != "inductor"]
    tensors = {id(t): t for module in networks.values() for t in (*module.parameters(), *module.buffers())}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    onnx = {order.variant.precision for order in held if order.variant.backend == "onnxruntime"}
    way = 0.0 if "fp32" in onnx or not held else 1.0
    forward = weights * (way + sum(_ON_DISK[order.variant.precision] for order in held))
    gradients = sum(len(order.gradients) for order in held) * _GRADIENT * _bytes(networks["unet"])
    transformed = sum(_added(networks, dims, order) for order in held if order.variant.convolution == "winograd")
    compiled, working = 0.0, 0.0
    for order in orders:
        if order.variant.backend == "inductor":
            share = 1.0 if order.variant.precision == "fp32" else 0.5
            for name in order.networks:
                own = share * _bytes(networks["unet" if name in DERIVED else name])
                compiled += own * len(_bounds(order, name, dims))
                working = max(working, _COMPILING * own)
    return int(_GRAPH_SHARE * (forward + gradients + transformed + compiled + working))


def _added(networks: Mapping[NetworkName, nn.Module], dims: Dims, order: Order) -> float:
    """Of transformed convolutions. A gradient graph has the UNet's and their counterparts on the way back."""
    added = 0.0
    for name in order.networks:
        own: NetworkName = "unet" if name in DERIVED else name
        network = contract(own, dims)
        bounds = [one for _, one in _bounds(order, own, dims)]
        native = native_hint(order.variant, name) is not None
        if "height" in network.symbols:
            share = 2.0 if name in DERIVED else 1.0
            added += share * added_by_transforms(networks[own], network, bounds, native)
    return added


def _bounds(order: Order, name: NetworkName, dims: Dims) -> list[tuple[Profile, Bounds]]:
    network = contract(name, dims)
    return [(profile, one) for profile in order.profiles for one in profile.bounds(network, dims)]


class _Held:
    """What calls of a model's networks hold beside the weights; each size is looked at once."""

    def __init__(self, networks: Mapping[NetworkName, nn.Module], dims: Dims) -> None:
        self._networks = networks
        self._dims = dims
        self._modules: dict[NetworkName, nn.Module] = {}
        self._rows: dict[tuple[NetworkName, int, int, bool], int] = {}

    def bytes(self, name: NetworkName, case: Case, fused: bool) -> int:
        """Of a case: those of a row, times its rows. A text encoder's are next to nothing."""
        if "height" not in case.sizes:
            return 0
        key = (name, case.sizes["height"], case.sizes["width"], fused)
        if key not in self._rows:
            self._rows[key] = self._row(name, {**case.sizes, "batch": 1}, fused)
        return case.sizes["batch"] * self._rows[key]

    def _row(self, name: NetworkName, sizes: Mapping[str, int], fused: bool) -> int:
        if name not in self._modules:
            own = "unet" if name in DERIVED else name
            module = self._modules.get(own) or without_numbers(self._networks[own])
            self._modules[own] = module
            if name in DERIVED:
                self._modules[name] = gradient_networks(module, [name])[name]
        return held_at_most(self._modules[name], contract(name, self._dims), sizes, fused)


def memory_needed(
    networks: Mapping[NetworkName, nn.Module], dims: Dims, order: Order, held: _Held | None = None
) -> Need:
    """What the build of an order takes at its largest."""
    held = held or _Held(networks, dims)
    needs = [need for name in order.networks for need in _needs(networks, dims, order, name, held)]
    return max(needs, key=lambda one: one.size)


def _needs(
    networks: Mapping[NetworkName, nn.Module], dims: Dims, order: Order, name: NetworkName, held: _Held
) -> Iterator[Need]:
    """Of building a network, and of verifying it at the largest case of each of its bounds."""
    variant = order.variant
    precision = RECIPES[variant.backend][variant.precision][name].precision
    weights: float = _bytes(networks["unet" if name in DERIVED else name])
    weights *= 1.0 if variant.convolution == "direct" else _TRANSFORMED_IN_MEMORY
    building = _BUILDING[variant.backend]
    graph = weights * (_GRADIENT if name in DERIVED else 1.0)
    yield Need(_ALWAYS + int(building.get(precision, building["fp32"]) * graph), name)
    opened = _VERIFYING.get(variant.backend)
    if opened is None:  # it runs on a GPU
        return
    bounds = _bounds(order, name, dims)
    fixed = [one_size(one) is not None for _, one in bounds]
    forms = sum(fixed) + (not all(fixed))
    if variant.backend == "openvino" and not all(fixed):
        from engines.ov import LOOPED, OWN_BELOW, OWN_SIZES  # a build for another backend needs no openvino

        forms += OWN_SIZES if name in LOOPED and weights < OWN_BELOW else 0
    weights *= (_GRADIENT_OPENED if name in DERIVED else 1.0) * opened.weights.get(precision, opened.weights["fp32"])
    plain = variant.backend == "onnxruntime" and (precision != "fp32" or name not in NETWORKS)
    network = contract(name, dims)
    for (profile, one), static in zip(bounds, fixed, strict=True):
        case = max(cases(network, dims, [one]), key=lambda case: math.prod(case.sizes.values()))
        share = opened.held_static if static else opened.held
        beside = share * held.bytes(name, case, fused=not plain and name not in WRT)
        yield Need(_ALWAYS + int(forms * weights + beside), name, profile, case)
    if variant.backend == "onnxruntime" and not plain:  # the graph that others open, at the first case
        profile, one = bounds[0]
        case = cases(network, dims, [one])[0]
        beside = opened.held * held.bytes(name, case, fused=False)
        yield Need(_ALWAYS + int(weights + beside), name, profile, case)


def check_memory(
    networks: Mapping[NetworkName, nn.Module], dims: Dims, orders: Sequence[Order], available: int | None
) -> None:
    """Raise EngineError if a build takes more memory than is available; None is an amount that nobody knows.

    The message says which of what was asked for can be built, and what else could: other precisions, without gradients,
    smaller sizes.
    """
    if available is None:
        return
    held = _Held(networks, dims)
    needs = {order: memory_needed(networks, dims, order, held) for order in orders}
    worst, need = max(needs.items(), key=lambda one: one[1].size)
    if need.size <= available:
        return

    def fits(order: Order) -> bool:
        return memory_needed(networks, dims, order, held).size <= available

    # They are built one after the other, so leaving out the hungriest helps.
    fit = [order.variant.name for order, one in needs.items() if one.size <= available]
    mends = [f"build {', '.join(fit)} alone"] if fit else []
    if need.network in DERIVED and fits(worst.model_copy(update={"gradients": ()})):
        mends += ["leave --gradients out"]
    smaller = (one for one in _smaller(need, dims) if fits(worst.model_copy(update={"profiles": (one,)})))
    mends += [f"give a smaller profile such as {_options(one)}" for one in itertools.islice(smaller, 1)]
    variant = worst.variant
    others = [
        precision
        for precision, recipes in RECIPES[variant.backend].items()
        if set(worst.networks) <= set(recipes)
        and fits(worst.model_copy(update={"variant": variant.model_copy(update={"precision": precision})}))
    ]
    mends += [f"{variant.backend} in {', '.join(others)}"] if others else []
    mends += ["free some"]
    raise EngineError(
        f"{need.network}: {_what(worst, need)} takes about {said_size(need.size)} of memory beside the model and "
        f"{said_size(available)} are there; {', or '.join(mends)} (SMOOTH_RT_MEMORY=0 builds all the same)"
    )


def _what(order: Order, need: Need) -> str:
    name = order.variant.name
    if need.profile is None or need.case is None:
        return f"building {name}"
    if need.profile.height.max is None:
        return f"verifying {name}"
    return f"verifying {name} at the profile of {need.profile}"


def _smaller(need: Need, dims: Dims) -> Iterator[Profile]:
    """Profiles that take less than what takes most, the largest first: of half the images and so on down to one, then
    of one size, down to a quarter of the sides that the model was trained at."""
    asked = need.profile
    if asked is not None and asked.height.max is not None and asked.batch.max is not None:
        most = asked.batch.max // 2
        while most:
            batch = Span(min=min(asked.batch.min, most), opt=min(asked.batch.opt, most), max=most)
            yield Profile(batch=batch, height=asked.height, width=asked.width)
            most //= 2
    trained, unit = dims.image_size, dims.image_multiple
    for size in dict.fromkeys(tuple(max(unit, side // part // unit * unit) for side in trained) for part in (1, 2, 4)):
        height, width = (Span(min=side, opt=side, max=side) for side in size)
        yield Profile(batch=Span(min=1, opt=1, max=1), height=height, width=width)


def _options(profile: Profile) -> str:
    return f"--batch {profile.batch} --height {profile.height} --width {profile.width}"


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
