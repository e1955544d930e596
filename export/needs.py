"""What a build takes of the disk and of the memory, and what the machine has: told before anything runs.

Both are estimates, made from the weights. The one of the memory counts what a build adds to the model, which is loaded
already: the networks are built and verified one after the other, so it is the hungriest step that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from engines.contract import DERIVED, NetworkName
from engines.errors import EngineError
from engines.recipes import RECIPES
from engines.select import ONNX
from engines.staging import said_size
from engines.variant import Order, Precision, Variant

__all__ = ["available_memory", "check_memory", "disk_needed", "memory_needed"]

_GRAPH_SHARE = 1.1  # graph files and rounding, over the weights' bytes
_ON_DISK: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.5, "bf16": 1.0, "int8": 0.5}
# The memory that building and verifying a network adds at its largest, over the bytes of its weights in fp32. Measured:
# docs/measurements, "Memory of a build". By backend, then by the precision of the graph; others are as fp32.
_IN_TENSORRT: dict[Precision, float] = {"fp32": 3.5, "fp16": 3.0, "bf16": 3.0}
_IN_ONNX: dict[Precision, float] = {"fp32": 3.0, "fp16": 3.5, "int8": 9.5}
_IN_MEMORY: dict[str, Mapping[Precision, float]] = {
    **dict.fromkeys(ONNX, _IN_ONNX),
    "openvino": {"fp32": 3.0, "int8": 3.5},
    "inductor": {"fp32": 4.5},
    "tensorrt": _IN_TENSORRT,
    "tensorrt-rtx": _IN_TENSORRT,
}
_GRADIENT = 1.5  # of a gradient graph, over the UNet's: it holds weights as they are and transposed
# With weights that are transformed for 3x3 convolutions, over those that are not: SD1.5's UNet as it is written, and as
# two sizes of it are opened, the file mapped.
_TRANSFORMED = 2.2
_TRANSFORMED_IN_MEMORY = 1.6
_ALWAYS = 2**29  # bytes; libraries that are loaded on the way
_MEMORY_V1 = "memory"


def disk_needed(networks: Mapping[NetworkName, nn.Module], orders: Sequence[Order]) -> int:
    """Bytes on disk at the fullest moment: the weights once a variant, and once as ONNX on the way."""
    tensors = {id(t): t for module in networks.values() for t in (*module.parameters(), *module.buffers())}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    onnx = {order.variant.precision for order in orders if order.variant.backend == "onnxruntime"}
    way = 0.0 if "fp32" in onnx else 1.0
    forward = weights * (way + sum(_on_disk(order.variant) for order in orders))
    gradients = sum(len(order.gradients) for order in orders) * _GRADIENT * _bytes(networks["unet"])
    return int(_GRAPH_SHARE * (forward + gradients))


def _on_disk(variant: Variant) -> float:
    return _ON_DISK[variant.precision] * (1.0 if variant.convolution == "direct" else _TRANSFORMED)


def memory_needed(
    networks: Mapping[NetworkName, nn.Module], variant: Variant, gradients: Sequence[NetworkName] = ()
) -> tuple[int, NetworkName]:
    """Bytes that the build of a variant adds to the loaded model at its largest, and the network that it is for."""
    shares = _IN_MEMORY[variant.backend]
    recipes = RECIPES[variant.backend][variant.precision]

    def needed(name: NetworkName) -> int:
        weights = _GRADIENT * _bytes(networks["unet"]) if name in DERIVED else _bytes(networks[name])
        larger = 1.0 if variant.convolution == "direct" else _TRANSFORMED_IN_MEMORY
        return int(shares.get(recipes[name].precision, shares["fp32"]) * larger * weights)

    largest = max([*networks, *gradients], key=needed)
    return _ALWAYS + needed(largest), largest


def check_memory(networks: Mapping[NetworkName, nn.Module], orders: Sequence[Order], available: int | None) -> None:
    """Raise EngineError if a build takes more memory than is available; None is an amount that nobody knows.

    The message says which of what was asked for can be built, and which other precisions could.
    """
    if available is None:
        return
    needs = {order.variant: memory_needed(networks, order.variant, order.gradients) for order in orders}
    worst, (most, network) = max(needs.items(), key=lambda one: one[1][0])
    if most <= available:
        return
    # They are built one after the other, so leaving out the hungriest helps.
    fit = [variant.name for variant, (needed, _) in needs.items() if needed <= available]
    others = [
        precision
        for precision in RECIPES[worst.backend]
        if memory_needed(networks, worst.model_copy(update={"precision": precision}))[0] <= available
    ]
    mends = [f"build {', '.join(fit)} alone"] if fit else []
    mends += [f"{worst.backend} in {', '.join(others)}"] if others else []
    mends += ["free some"]
    raise EngineError(
        f"{network}: building {worst.name} takes about {said_size(most)} of memory beside the model and "
        f"{said_size(available)} are there; {', or '.join(mends)} (SMOOTH_RT_MEMORY=0 builds all the same)"
    )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: what the machine has to give, within the limits of its control groups.

    None where the system does not say. What a control group holds of files counts as free: it is given back on demand.

    Args:
        root: of the file system.
    """
    found = [*_machine(root), *_groups(root)]
    return max(0, min(found)) if found else None


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What each control group above this process leaves, of both versions."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif _MEMORY_V1 in controllers.split(","):
            top = root / "sys/fs/cgroup" / _MEMORY_V1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        # Within a container the path may be that of the host, and is not there: the container's own is the top.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            limit, taken = (_number(_lines(folder / name)) for name in names[:2])
            if limit is not None and taken is not None:
                cached = [one.split()[1] for one in _lines(folder / "memory.stat") if one.startswith(f"{names[2]} ")]
                yield limit - taken + (_number(cached) or 0)


def _number(lines: Sequence[str]) -> int | None:
    return int(lines[0]) if lines and lines[0].isdecimal() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
