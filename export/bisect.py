"""Find the first node of a graph at which a backend's numbers part from the reference's.

One intermediate result at a time is made an output of the graph, and the graph is run on both. Where a backend is wrong
at one node it is wrong at what follows from it, and where it is right it was right at what led there, so about half of
what is left goes with each run: a dozen or two for a UNet's thousands of nodes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from engines.errors import EngineError, InputError, reason
from export.quiet import quiet

__all__ = ["RUNNERS", "Divergence", "Run", "first_divergence", "on_openvino"]

# (graph, inputs by name, the tensor wanted) -> its value
Run = Callable[[Path, Mapping[str, Tensor], str], np.ndarray]


@dataclass(frozen=True)
class Divergence:
    """The first node over the tolerance, in the graph's order: number `index` of `count` that were candidates."""

    node: str
    operator: str
    tensor: str
    error: float
    index: int
    count: int


def first_divergence(
    graph: Path,
    inputs: Mapping[str, Tensor],
    candidate: Run,
    tolerance: float,
    reference: Run | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Divergence | None:
    """The first node whose result `candidate` computes with a relative L2 error over `tolerance`; None if the graph's
    outputs are within it.

    Args:
        graph: an ONNX file, its weights beside it.
        inputs: by name.
        candidate: see `RUNNERS`.
        tolerance: of the error.
        reference: None stands for ONNX Runtime without its optimisations.
        progress: called with the tensor tried, tries done and tries expected.

    Raises:
        EngineError: the graph cannot be read, or a runner cannot run it.
    """
    run = reference or RUNNERS["onnxruntime-plain"]
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:
        raise EngineError(f"{graph}: not an ONNX graph ({reason(error)}); export it again") from error
    candidates = _candidates(model)
    with tempfile.TemporaryDirectory(prefix="smooth-rt-bisect-") as folder:
        room = Path(folder)
        for part in graph.parent.glob(f"{graph.name}.*"):
            _take(part, room / part.name)
        tries = max(1, len(candidates)).bit_length() + 1
        done = 0

        def error_at(index: int) -> float:
            nonlocal done
            _, tensor = candidates[index]
            if progress is not None:
                progress(tensor, min(done, tries), tries)
            done += 1
            probe = _probe(model, tensor, room / graph.name)
            return _relative(candidate(probe, inputs, tensor), run(probe, inputs, tensor))

        bad = len(candidates) - 1
        off = error_at(bad)
        if off <= tolerance:
            return None
        before = _before(candidates)
        left = before[bad]
        while left:
            middle = sorted(left)[len(left) // 2]
            found = error_at(middle)
            if found > tolerance:
                bad, off = middle, found
                left = left & before[middle]
            else:  # and so is what leads to it
                left = left - before[middle] - {middle}
    node, tensor = candidates[bad]
    return Divergence(node.name, node.op_type, tensor, off, bad, len(candidates))


def _before(candidates: list[tuple[Any, str]]) -> list[frozenset[int]]:
    """For each candidate, those that its result follows from: what merely comes earlier in the graph's order, such as
    what becomes of the text, says nothing of it."""
    place = {name: index for index, (node, _) in enumerate(candidates) for name in node.output}
    before: list[frozenset[int]] = []
    for node, _ in candidates:
        direct = {place[name] for name in node.input if name in place}
        before.append(frozenset(direct).union(*(before[index] for index in direct)))
    return before


def _candidates(model: Any) -> list[tuple[Any, str]]:
    """The nodes in order, each with its first result; those of results that are no floats are left out."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    found = [(node, node.output[0]) for node in model.graph.node if types.get(node.output[0]) in floats]
    if not found:
        raise InputError("bisect: the graph does not tell the types of its results; export it again")
    return found


def _probe(model: Any, tensor: str, path: Path) -> Path:
    """The graph with one more output, beside its weights."""
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    if tensor not in {value.name for value in model.graph.output}:
        # Without its shape, which the graph's own symbols name: whoever runs it infers that.
        probe.graph.output.append(
            onnx.helper.make_tensor_value_info(tensor, known[tensor].type.tensor_type.elem_type, None)
        )
    path.write_bytes(probe.SerializeToString())
    return path


def _relative(got: np.ndarray, wanted: np.ndarray) -> float:
    difference = np.linalg.norm(got.astype(np.float64) - wanted.astype(np.float64))
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    error = float(difference) / norm if norm > 0 else float(difference)
    return error if np.isfinite(error) else float("inf")


def _onnxruntime(optimised: bool) -> Run:
    """ONNX Runtime: as the graph is, without its optimisations, or rewritten as engines open it, with them."""

    def run(graph: Path, inputs: Mapping[str, Tensor], tensor: str) -> np.ndarray:
        import onnxruntime

        from export.to_ort import to_ort

        # What is in the middle of a rewritten part is computed as it was; the part's result bears its name.
        graph = to_ort(graph, apart=False)[0] if optimised else graph
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            return np.asarray(session.run([tensor], {name: value.numpy() for name, value in inputs.items()})[0])
        except Exception as error:
            raise EngineError(f"bisect: onnxruntime cannot run it up to {tensor} ({reason(error)})") from error

    return run


def on_openvino(hint: str, change: Callable[[Any], object] | None = None) -> Run:
    """OpenVINO, told to compute in `hint`, on a graph that `change` has changed in place."""

    def run(graph: Path, inputs: Mapping[str, Tensor], tensor: str) -> np.ndarray:
        import openvino

        from engines.ov import core
        from export.to_openvino import rewrite

        try:
            with quiet():
                model = openvino.convert_model(str(graph))
            if change is not None:
                change(model)
            rewrite(model)
            compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
            results = compiled.create_infer_request().infer({name: value.numpy() for name, value in inputs.items()})
            return np.asarray(results[tensor])
        except Exception as error:
            raise EngineError(f"bisect: openvino cannot run it up to {tensor} ({reason(error, -1)})") from error

    return run


# What can be searched: by backend and the hint it is given.
RUNNERS: dict[str, Run] = {
    "onnxruntime-plain": _onnxruntime(optimised=False),
    "onnxruntime": _onnxruntime(optimised=True),
    "openvino-f32": on_openvino("f32"),
    "openvino-bf16": on_openvino("bf16"),
}


def _take(file: Path, place: Path) -> None:
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)
