"""Give weights that the exporter folded the names of the parameters they come from.

The exporter computes at once what depends on no input: the weight of a linear layer, which ONNX wants transposed,
becomes an initializer called `val_175`. By its own name, `….to_q.weight.T`, a layer can be found again: to put another
LoRA's weights there, and to say which layers were quantised.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TRANSPOSED", "named_weights"]

TRANSPOSED = ".T"


def named_weights(model: Any, module: nn.Module) -> int:
    """Rename the initializers of `model` (onnx_ir) that equal a parameter of `module`, or its transpose.

    Returns:
        how many were renamed.
    """
    initializers = model.graph.initializers
    nameless = {name: value for name, value in initializers.items() if name.startswith("val_")}
    shapes = {tuple(value.const_value.shape) for value in nameless.values() if value.const_value is not None}
    known: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, parameter in module.named_parameters():
        forms = {name: parameter} | ({name + TRANSPOSED: parameter.T} if parameter.ndim == 2 else {})
        for called, tensor in forms.items():
            if tuple(tensor.shape) in shapes:
                known.setdefault((tuple(tensor.shape), _digest(tensor)), called)
    hits = 0
    for value in list(nameless.values()):
        tensor = value.const_value
        found = None if tensor is None else known.get((tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()))
        # Two layers of equal weights share a name's digest; the second keeps its own.
        if found is not None and found not in initializers:
            initializers.pop(value.name)
            value.name = found
            tensor.name = found
            initializers[found] = value
            hits += 1
    return hits


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data).digest()
