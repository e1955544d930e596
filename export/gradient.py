"""The vector-Jacobian product of the UNet, or of its features, as a plain graph, its sizes as free as those of the
forward pass.

torch's exporters refuse what differentiates within a graph, so the forward pass is exported first, and the pull-back
through that graph is traced: `torch.func.vjp` of it, functionalised, runs once on tensors that have free sizes and no
data, with the operators of `decompositions` in the place of their own. The weights are constants in it, so that their
gradients are nowhere in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.compile_utils import fx_graph_cse
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

from engines.contract import Dims, Network, undifferentiated
from engines.eager import UnetVjp, pulled_back
from export.decompositions import RULES, WRITTEN_OUT
from export.graphs import dynamic_shapes, example_inputs

__all__ = ["traced"]


class _WrittenOut(fx.Interpreter):
    """Runs an exported graph with the operators of `WRITTEN_OUT` in the place of their own."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(WRITTEN_OUT.get(target, target), args, kwargs)


class _Decomposed(ExportedProgram):
    """A program of operators that the exporter knows. It would trace it anew to find that out, which takes minutes."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        return self


def traced(module: UnetVjp, network: Network, dims: Dims) -> ExportedProgram:
    """The gradient network that `module` is, as a program without autograd, on the same weights.

    Args:
        module: of `engines.eager.gradient_networks`.
        network: its contract; the program's inputs and outputs are those, in order.
        dims: the model's sizes.

    Raises:
        NotImplementedError: an operator of the forward pass has a form that there is no rule for.
        Exception: whatever torch raises at what it cannot export.
    """
    plain = undifferentiated(network)
    with torch.no_grad():
        forward = torch.export.export(
            module.module,
            example_inputs(plain, dims),
            dynamic_shapes=dynamic_shapes(plain, module.module),
            strict=False,
        )
    specs = forward.graph_signature.input_specs
    values = [node.meta["val"] for node in forward.graph.nodes if node.op == "placeholder"]
    users = [index for index, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT]
    named = dict(zip((spec.name for spec in plain.inputs), users, strict=True))
    mode = values[named["sample"]].fake_mode
    with torch.no_grad(), mode, enable_python_dispatcher():
        (predicted,) = (node.meta["val"] for node in forward.graph.output_node().args[0])
        cotangents = [torch.empty(predicted.shape, dtype=torch.float32), torch.empty(1, dtype=torch.float32)]
        joint = torch.func.functionalize(_joint(forward, [named[name] for name in module.wrt], module.module))
        tables = {**core_aten_decompositions(), **RULES}
        graph_module = make_fx(joint, decomposition_table=tables)(*values, *cotangents)
    graph = fx_graph_cse(graph_module.graph)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return _program(forward, graph_module, graph, [spec.name for spec in network.inputs])


def _joint(forward: ExportedProgram, wrt: list[int], module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """(the forward graph's inputs, weights among them, cotangent, scale) -> (prediction, the gradients by `wrt`)."""
    interpreter = _WrittenOut(forward.graph_module)

    def joint(*values: Tensor) -> tuple[Tensor, ...]:
        *rest, cotangent, scale = values

        def predict(*leaves: Tensor) -> Tensor:
            inputs = list(rest)
            for index, leaf in zip(wrt, leaves, strict=True):
                inputs[index] = leaf
            result: Tensor = interpreter.run(*inputs)[0]
            return result

        differentiated: Any = torch.func.vjp(predict, *(rest[index] for index in wrt))
        output, pull = differentiated
        return output, *pulled_back(pull, cotangent + scale[:, None, None, None] * output, module)

    return joint


def _program(forward: ExportedProgram, root: fx.GraphModule, graph: fx.Graph, names: list[str]) -> ExportedProgram:
    """`graph` as an exported program on the weights of `forward`; its inputs are called `names`."""
    left = iter(names)
    inputs = []
    specs = [*forward.graph_signature.input_specs, None, None]
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        kind, target = (InputKind.USER_INPUT, None) if spec is None else (spec.kind, spec.target)
        node.name = next(left) if kind is InputKind.USER_INPUT else spec.arg.name
        node.target = node.name
        persistent = None if spec is None else spec.persistent
        inputs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))
    returned: Any = graph.output_node().args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in returned]
    _, taken = tree_flatten((tuple(names), {}))
    _, given = tree_flatten(tuple(spec.arg.name for spec in outputs))
    calls = ModuleCallSignature([], [], taken, given)
    return _Decomposed(
        root=root,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=forward.state_dict,
        range_constraints=forward.range_constraints,
        module_call_graph=[ModuleCallEntry("", calls)],
        example_inputs=None,
        constants=forward.constants,
    )
