"""Torch module -> ONNX graph with the contract's names and free batch, height and width; one timestep or one a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.contract import Dims, Network
from engines.eager import UnetVjp
from engines.errors import EngineError, reason
from export.graphs import dynamic_shapes, example_inputs
from export.quiet import quiet
from export.rewrites.named_weights import named_weights

__all__ = ["OPSET", "to_onnx"]

OPSET = 20


def to_onnx(module: nn.Module, network: Network, dims: Dims, path: Path) -> None:
    """Write `path` and its weights beside it as `<path>.data`.

    The same module gives the same bytes on every machine: what the exporter notes about its own source lines is left
    out.

    Args:
        module: a module of `engines.eager.torch_networks` or `gradient_networks`, on the CPU.
        network: its contract.
        dims: the model's sizes.
        path: the .onnx file; its folder is created.

    Raises:
        EngineError: the module cannot be exported, or the graph's names are not the contract's.
        OSError: the files cannot be written.
    """
    inputs = [spec.name for spec in network.inputs]
    outputs = [spec.name for spec in network.outputs]
    try:
        with quiet(), torch.no_grad():
            program = _exported(module, network, dims)
    except Exception as error:
        raise EngineError(f"{network.name}: export to ONNX failed: {_cause(error)}") from error
    if program is None:
        raise EngineError(f"{network.name}: export to ONNX returned nothing; reinstall torch and onnxscript")
    graph = program.model.graph
    for kind, names, values in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
        got = [value.name for value in values]
        if got != names:
            raise EngineError(f"{network.name}: the ONNX graph's {kind} are {got}, not {names}; does the module fit?")
    _forget_origin(program.model)
    _name_axes(program.model, network)
    named_weights(program.model, module.module if isinstance(module, UnetVjp) else module)
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        program.save(str(path), external_data=True)


def _exported(module: nn.Module, network: Network, dims: Dims) -> Any:
    options: dict[str, Any] = {
        "dynamo": True,
        "opset_version": OPSET,
        "input_names": [spec.name for spec in network.inputs],
        "output_names": [spec.name for spec in network.outputs],
        "verbose": False,
    }
    if isinstance(module, UnetVjp):
        from export.gradient import traced

        program = torch.onnx.export(traced(module, network, dims), optimize=False, **options)
        if program is not None:
            _tidy(program.model)
        return program
    shapes = dynamic_shapes(network, module)
    return torch.onnx.export(module, example_inputs(network, dims), dynamic_shapes=shapes, **options)


def _tidy(model: Any) -> None:
    """What the exporter does to a graph by itself, but for its rewrites: they take longer by the square of the nodes,
    which in a gradient graph are thousands, and are minutes there. Weights stay as they are, once for all who take them
    transposed: backends compute that as they open the graph.
    """
    import onnx_ir.passes.common
    from onnx_ir.passes import Sequential
    from onnxscript.optimizer import fold_constants

    passes: Any = onnx_ir.passes.common
    passes.InlinePass()(model)
    fold_constants(
        model, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type == "Transpose" else None
    )
    Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)


def _name_axes(model: Any, network: Network) -> None:
    """Give the inputs' free axes the contract's names; within the graph sizes are inferred by who runs it."""
    import onnx_ir

    for value, spec in zip(model.graph.inputs, network.inputs, strict=True):
        value.shape = onnx_ir.Shape(spec.axis_names)


def _forget_origin(model: Any) -> None:
    """Drop stack traces and module paths: they hold this machine's folders, and would change the graph's digest."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
