"""Where in a built graph the weights lie that a LoRA changes, so that others can be put there without a rebuild."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engines.errors import EngineError
from engines.variant import Place
from export.rewrites.named_weights import TRANSPOSED

__all__ = ["find_places"]


def find_places(graph: Path, onnx: Path, backend: str, weights: Mapping[str, Tensor]) -> dict[str, Place]:
    """The place of each of `weights` in `graph`.

    Args:
        graph: what was built.
        onnx: the graph in ONNX that it was built from.
        backend: of `graph`.
        weights: by the torch parameter's name, with the values that the graph was built with.

    Raises:
        EngineError: a weight is nowhere, so that a LoRA could not be replaced whole.
    """
    found = _in_openvino(graph, weights) if backend == "openvino" else _in_onnx(onnx, weights)
    missing = sorted(set(weights) - set(found))
    if missing:
        raise EngineError(
            f"{graph}: the weights of {missing[0]} are not in it as they are; build with --lora-mode fused"
        )
    return found


def _in_onnx(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Place]:
    """By name: `named_weights` has given folded weights theirs back. TensorRT keeps the names of ONNX."""
    import onnx as onnx_library

    names = {tensor.name for tensor in onnx_library.load(str(path), load_external_data=False).graph.initializer}
    found = {}
    for name in weights:
        for called, transposed in ((name, False), (name + TRANSPOSED, True)):
            if called in names:
                found[name] = Place(name=called, transposed=transposed)
    return found


def _in_openvino(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Place]:
    """By value: OpenVINO names constants anew, and lays some out another way."""
    from engines.ov import core

    model: Any = core().read_model(str(path))
    forms = {
        (form.shape, form.tobytes()): (name, transposed)
        for name, weight in weights.items()
        for form, transposed in _forms(weight.detach().numpy())
    }
    sizes = {shape for shape, _ in forms}
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or tuple(node.get_output_shape(0)) not in sizes:
            continue
        data = np.ascontiguousarray(node.get_data())
        match = forms.get((data.shape, data.tobytes()))
        if match is not None:
            found[match[0]] = Place(name=node.get_friendly_name(), transposed=match[1])
    return found


def _forms(weight: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    straight = np.ascontiguousarray(weight)
    return [(straight, False)] if weight.ndim != 2 else [(straight, False), (np.ascontiguousarray(weight.T), True)]
