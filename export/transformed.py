"""What transformed 3x3 convolutions add to the weights, found without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.contract import Network
from engines.variant import Bounds
from export.activations import without_numbers

__all__ = ["added_by_transforms"]


def added_by_transforms(module: nn.Module, network: Network, bounds: Sequence[Bounds], native: bool) -> int:
    """Bytes that `--convolution winograd` writes for a network over those of its weights in fp32.

    (m + 2)^2 numbers for nine of each layer that has tiles of m x m, 64 at the most; which tiles those are, depends on
    the sizes (`rewrites/winograd.py`). Layers whose weights a LoRA's strength changes keep them as they are, and are
    counted all the same.

    Args:
        module: of the network, on any device.
        network: its contract.
        bounds: of one height and one width.
        native: whether this project's kernels make the transforms.
    """
    from export.rewrites.winograd import KERNEL, NATIVE, OPERATIONS, tile  # a build for another backend has no openvino

    sizes = {symbol: best for symbol, (_, best, _) in bounds[0].items()}
    rows = max(one["batch"][1] for one in bounds)
    added = 0

    def look(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal added
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (KERNEL, KERNEL) or layer.groups != 1:
            return
        if not layer.stride == layer.dilation == layer.padding == (1, 1):
            return
        height, width = output.shape[2:]
        sides = NATIVE if native else OPERATIONS
        size = tile(rows, layer.in_channels, layer.out_channels, height, width, sides)
        if size is not None:
            more = (size + KERNEL - 1) ** 2 - KERNEL**2
            added += more * layer.in_channels * layer.out_channels * layer.weight.element_size()

    empty = without_numbers(module)
    for layer in empty.modules():
        layer.register_forward_hook(look)
    with torch.no_grad():
        empty(
            *(
                torch.empty(spec.shape(sizes), dtype=getattr(torch, spec.dtype), device="meta")
                for spec in network.inputs
            )
        )
    return added
