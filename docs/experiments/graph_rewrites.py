"""What rewrites of the UNet's graph gain, one by one, in ONNX Runtime and OpenVINO: python graph_rewrites.py --help.

Prints for each the time of a call over that of the graph as exported: the median over rounds, with a 90 % interval by
bootstrap over rounds. What changes from process to process, such as where memory lies, is not in it, so run it several
times with other seeds. Graphs run in pairs of calls, the first of which warms the caches again; each round sets a pair
between two pairs of the plain graph. One thread is timed by the processor's clock, so that other work on the machine
counts little. "plain again" is the plain graph opened twice: what it is off 1 by is the error of all others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
from diffusers import UNet2DConditionModel
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from transformers import CLIPTextConfig, CLIPTextModel

from engines.contract import Dims, NetworkName, contract
from engines.eager import TextEncoder, Unet
from export.rewrites.fused_attention import fused_attention
from export.rewrites.split_projection import split_projection
from export.rewrites.text_apart import text_apart
from export.to_onnx import to_onnx
from smooth_rt.model import load_model

# SD1.5's UNet at 0.4 of its width: 142 M parameters.
MIDDLE = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768, "attention_head_dim": 8}
# And its text encoder, whole.
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
MIDDLE_DIMS = Dims(77, 768, 49408, 4, 3, 8, 8, 32)


def turned_keys(model: Any) -> int:
    """Attention's keys turned by one node, where the exporter folds axes, swaps two, and unfolds."""
    rule = RewriteRule(
        lambda op, x, folded, back: op.Reshape(
            op.Transpose(op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), folded), perm=[0, 2, 1]), back
        ),
        lambda op, x, **_: op.Transpose(x, perm=[0, 2, 3, 1]),
        remove_nodes=False,
    )
    hits = RewriteRuleSet([rule]).apply_to_model(model)
    RemoveUnusedNodesPass()(model)
    return hits


def group_norm(model: Any) -> int:
    """GroupNormalization as one node (opset 21), where the exporter writes InstanceNormalization, Mul and Add."""
    hits = 0
    for node in list(model.graph):
        if node.op_type != "InstanceNormalization":
            continue
        before = node.inputs[0].producer()
        mul = _next(_next(node))
        add = _next(mul)
        groups = int(before.inputs[1].const_value.numpy()[1])
        weights = [
            _constant(model, f"norm_{hits}_{i}", n.inputs[1].const_value.numpy().reshape(-1))
            for i, n in enumerate((mul, add))
        ]
        attributes = [
            onnx_ir.AttrInt64("num_groups", groups),
            onnx_ir.AttrFloat32("epsilon", node.attributes["epsilon"].value),
        ]
        made = onnx_ir.Node("", "GroupNormalization", [before.inputs[0], *weights], attributes)
        model.graph.insert_after(add, made)
        add.outputs[0].replace_all_uses_with(made.outputs[0])
        hits += 1
    model.opset_imports[""] = 21
    return hits


def packed(model: Any) -> int:
    """Queries, keys and values of self-attention by one product."""
    layers: dict[Any, list[Any]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and any(f"attn1.to_{x}.weight" in (node.inputs[1].name or "") for x in "qkv"):
            layers.setdefault(node.inputs[0], []).append(node)
    for hits, (x, nodes) in enumerate(layers.items()):
        weight = _constant(model, f"packed_{hits}", np.concatenate([n.inputs[1].const_value.numpy() for n in nodes], 1))
        product = onnx_ir.Node("", "MatMul", [x, weight])
        parts = onnx_ir.Node(
            "",
            "Split",
            product.outputs,
            [onnx_ir.AttrInt64("axis", 2), onnx_ir.AttrInt64("num_outputs", 3)],
            num_outputs=3,
        )
        model.graph.insert_after(nodes[-1], [product, parts])
        for node, part in zip(nodes, parts.outputs, strict=True):
            node.outputs[0].replace_all_uses_with(part)
        model.graph.sort()
    return len(layers)


def timestep_apart(model: Any) -> int:
    """What the blocks take of the timestep as inputs: all that a table of the steps could save."""
    layers = [n for n in model.graph if n.op_type == "Gemm" and "time_emb_proj" in (n.inputs[1].name or "")]
    for index, node in enumerate(layers):
        shape = onnx_ir.Shape(["batch", node.inputs[1].const_value.shape[0], 1, 1])
        taken = onnx_ir.Value(name=f"time_{index}", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=shape)
        model.graph.inputs.append(taken)
        _next(node).outputs[0].replace_all_uses_with(taken)
    RemoveUnusedNodesPass()(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if list(value.uses())]
    return len(layers)


def mask_folded(model: Any) -> int:
    """The text encoder's causal mask as a constant of numbers, without the guard against rows that are masked whole."""
    hits = 0
    for node in [node for node in model.graph if node.op_type == "Where"]:
        condition, kept, other = node.inputs
        before = condition.producer()
        if before.op_type == "Expand":  # of booleans, to the batch
            mask = np.where(before.inputs[0].const_value.numpy(), kept.const_value.numpy(), other.const_value.numpy())
            node.outputs[0].replace_all_uses_with(_constant(model, f"mask_{hits}", mask))
        elif before.op_type == "IsNaN" and before.inputs[0] is other:
            node.outputs[0].replace_all_uses_with(other)
        else:
            continue
        hits += 1
    RemoveUnusedNodesPass()(model)
    return hits


# By name: the backends that it is tried on, and its rewrites in order.
REWRITES: dict[str, tuple[str, list[Callable[[Any], Any]]]] = {
    "plain again": ("both", []),
    "turned keys": ("both", [turned_keys]),
    "fused attention": ("onnxruntime", [fused_attention]),
    "split projection": ("both", [split_projection]),
    "text apart": ("both", [text_apart]),
    "timestep apart": ("both", [timestep_apart]),
    "packed QKV": ("both", [packed]),
    "GroupNorm as a node": ("both", [group_norm]),
    "all that onnxruntime gets": ("onnxruntime", [fused_attention, split_projection, text_apart]),
}
OF_THE_TEXT: dict[str, tuple[str, list[Callable[[Any], Any]]]] = {
    "plain again": ("both", []),
    "mask folded": ("both", [mask_folded]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("default", "middle"), default="default")
    parser.add_argument("--network", choices=("unet", "text_encoder"), default="unet")
    parser.add_argument("--backend", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed", action="store_true", help="open the graphs for this one size")
    parser.add_argument("--only", nargs="*", choices=[*REWRITES, *OF_THE_TEXT], help="default: all of the network")
    parser.add_argument("--graphs", type=Path, help="a folder that keeps the exported graph; default: none is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = (options.graphs or Path(work)) / options.model
        rewrites_of = REWRITES
        if options.network == "text_encoder":
            folder, rewrites_of = folder / "text_encoder", OF_THE_TEXT
        plain, dims = folder / "model.onnx", _export(options.model, options.network, folder)
        rng = np.random.default_rng(options.seed)
        inputs = _inputs(rng, options.network, dims, options.rows)
        calls = {}
        opened = ["plain", *(rewrites_of if options.only is None else options.only)]
        rng.shuffle(opened)  # the order has a part in how fast a graph is
        for name in opened:
            on, rewrites = rewrites_of.get(name, ("both", []))
            if on in ("both", options.backend):
                model, given = onnx_ir.load(plain), dict(inputs)
                path = folder / f"{name.replace(' ', '-')}.onnx"
                counts = []
                for rewrite in rewrites:
                    hits = rewrite(model)
                    if isinstance(hits, tuple):
                        text, hits = hits
                        onnx_ir.save(text, folder / "text.onnx")
                        given |= _run(folder / "text.onnx", inputs)
                    counts.append(hits)
                onnx_ir.save(model, path)
                print(f"{name}: hits {counts}, {len(list(model.graph))} nodes")
                calls[name] = _open(path, given, options)
        _measure(calls.pop("plain"), calls, options)


def _run(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    return {value.name: array for value, array in zip(session.get_outputs(), found, strict=True)}


def _inputs(rng: np.random.Generator, network: str, dims: Dims, rows: int) -> dict[str, np.ndarray]:
    if network == "text_encoder":
        return {"input_ids": rng.integers(0, dims.vocabulary, (rows, dims.tokens), np.int32)}
    side = dims.sample_size
    return {
        "sample": rng.standard_normal((rows, dims.latent_channels, side, side), np.float32),
        "timestep": np.linspace(1, 990, rows).astype(np.int64),
        "encoder_hidden_states": rng.standard_normal((rows, dims.tokens, dims.text_width), np.float32),
    }


def _export(name: str, network: NetworkName, folder: Path) -> Dims:
    if name == "default":
        loaded = load_model("default")
        unet, text_encoder, dims = loaded.unet, loaded.text_encoder, loaded.dims
    elif network == "unet":
        unet, dims = UNet2DConditionModel(**MIDDLE, sample_size=MIDDLE_DIMS.sample_size), MIDDLE_DIMS
    else:
        text_encoder, dims = CLIPTextModel(CLIPTextConfig(**CLIP)), MIDDLE_DIMS
    module = Unet(unet) if network == "unet" else TextEncoder(text_encoder)
    if not (folder / "model.onnx").exists():
        to_onnx(module.requires_grad_(False).eval(), contract(network, dims), dims, folder / "model.onnx")
    return dims


def _open(path: Path, inputs: dict[str, np.ndarray], options: argparse.Namespace) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    given = {}
    for value in onnx_ir.load(path).graph.inputs:
        shape = [size if isinstance(size, int) else options.rows for size in value.shape]
        given[value.name] = inputs.get(value.name, rng.standard_normal(shape, np.float32))
    if options.backend == "onnxruntime":
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = 3
        if options.fixed:
            taken = np.delete(next(iter(inputs.values())).shape, 1)  # the text encoder's is the batch alone
            for axis, size in zip(("batch", "height", "width"), taken, strict=False):
                settings.add_free_dimension_override_by_name(axis, int(size))
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, given)

    from engines.ov import core

    model = core().read_model(path)
    if options.fixed:
        model.reshape({name: list(array.shape) for name, array in given.items()})
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": options.threads}
    request = core().compile_model(model, "CPU", hints).create_infer_request()
    return lambda: request.infer(given, share_inputs=True)


def _measure(plain: Callable[[], Any], calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> None:
    clock = time.process_time if options.threads == 1 else time.perf_counter

    def second(call: Callable[[], Any]) -> float:
        call()
        started = clock()
        call()
        return clock() - started

    for call in (plain, *calls.values()):
        second(call)
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    plains = [second(plain)]
    for _ in range(options.rounds):
        for name, call in calls.items():
            took = second(call)
            plains.append(second(plain))
            ratios[name].append(2 * took / sum(plains[-2:]))
    print(
        f"{options.model}, {options.backend}, {options.rows} rows, {options.threads} threads, "
        f"{'fixed' if options.fixed else 'free'} sizes: plain {statistics.median(plains) * 1e3:.1f} ms"
    )
    rng = np.random.default_rng(0)
    for name, found in ratios.items():
        drawn = np.median(rng.choice(found, (1000, len(found))), axis=1)
        low, high = np.quantile(drawn, [0.05, 0.95])
        print(f"  {name:26} {statistics.median(found):.3f}  [{low:.3f}, {high:.3f}]", flush=True)


def _next(node: Any) -> Any:
    return next(iter(node.outputs[0].uses())).node


def _constant(model: Any, name: str, array: np.ndarray) -> Any:
    tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape)
    model.graph.register_initializer(value)
    return value


if __name__ == "__main__":
    main()
