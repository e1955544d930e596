"""Each rewrite finds what it is for, leaves other graphs alone, and gives the same numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from engines import text_part
from engines.contract import LORA_STRENGTH, NETWORKS, Dims, Network, NetworkName, contract
from engines.eager import EagerEngine
from engines.lora import LoraWeights
from engines.ort import RUN_GRAPH, OrtEngine, text_graph
from engines.runtime_lora import RuntimeUnet
from export.graphs import cases, random_inputs
from export.rewrites.fused_attention import fused_attention
from export.rewrites.split_projection import split_projection
from export.rewrites.text_apart import text_apart
from export.to_onnx import to_onnx
from export.to_ort import to_ort
from export.verify import verify

Networks = dict[NetworkName, nn.Module]
RULES: tuple[Callable[[Any], Any], ...] = (fused_attention, split_projection, text_apart)


@pytest.fixture
def unet(built: Any) -> Path:
    """The folder of the tiny model's UNet for ONNX Runtime."""
    return Path(built.bundle.path / "onnxruntime-fp32" / "unet")


@pytest.fixture
def inputs(dims: Dims, generator: torch.Generator) -> dict[str, Tensor]:
    network = contract("unet", dims)
    two = next(case for case in cases(network, dims) if case.sizes["batch"] == 2)
    return random_inputs(network, dims, two, generator)


def domains(path: Path) -> set[str]:
    return {node.domain for node in onnx_ir.load(path).graph}


def test_the_manifest_counts_the_hits_of_each(built: Any, networks: Networks) -> None:
    blocks = sum(name.endswith(".attn1") for name, _ in networks["unet"].named_modules())
    assert blocks > 0
    notes = built.bundle.find("onnxruntime").engine("unet").notes
    assert {name: hits for name, hits in notes.items() if name != "plain_graph"} == {
        "fused_attention": 2 * blocks,
        "split_projection": blocks,
        "text_apart": 2 * blocks,
    }


def test_what_onnxruntime_runs_lies_beside_the_plain_graph(built: Any, unet: Path) -> None:
    records = {record.network: record for record in built.bundle.find("onnxruntime").engines}
    assert Path(records["unet"].file).name == RUN_GRAPH
    for name in NETWORKS:
        folder = built.bundle.path / "onnxruntime-fp32" / name
        assert domains(folder / "model.onnx") == {""}
        assert (folder / RUN_GRAPH).exists() == (Path(records[name].file).name == RUN_GRAPH)
    assert domains(unet / RUN_GRAPH) == {"", "com.microsoft"}
    # Weights are on the disk once.
    assert [path.name for path in unet.glob("*.data")] == ["model.onnx.data"]
    assert len(list(onnx_ir.load(unet / RUN_GRAPH).graph)) < 0.9 * len(list(onnx_ir.load(unet / "model.onnx").graph))


def test_a_graph_without_hits_is_left_alone(built: Any, tmp_path: Path) -> None:
    path = built.bundle.path / "onnxruntime-fp32" / "text_encoder" / "model.onnx"
    for rule in RULES:
        model = onnx_ir.load(path)
        before = onnx_ir.to_proto(model).SerializeToString()
        assert rule(model) in (0, (None, 0))
        assert onnx_ir.to_proto(model).SerializeToString() == before
    assert to_ort(path)[0] == path
    assert not (path.parent / RUN_GRAPH).exists()


def test_what_is_no_such_attention_is_left_alone(unet: Path) -> None:
    model = onnx_ir.load(unet / "model.onnx")
    # A mask between the product and the softmax.
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        masked = onnx_ir.Node("", "Relu", [node.inputs[0]])
        model.graph.insert_before(node, masked)
        node.replace_input_with(0, masked.outputs[0])
    assert fused_attention(model) == 0


def test_the_text_is_computed_when_it_changes(
    unet: Path, networks: Networks, dims: Dims, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    network = contract("unet", dims)
    eager = EagerEngine(network, networks["unet"])
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    with OrtEngine(network, unet / RUN_GRAPH) as engine:
        assert engine._text is not None
        sessions, compute = engine._text._sessions, engine._text._sessions.of
        monkeypatch.setattr(sessions, "of", lambda profile: runs.append(profile) or compute(profile))

        def run(given: dict[str, Tensor], times: int) -> None:
            wanted = eager.infer(**given)["noise_pred"]
            got = engine.infer(**given)["noise_pred"]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            assert len(runs) == times

        run(inputs, 1)
        run({**inputs, "sample": 2 * inputs["sample"]}, 1)
        run(other, 2)
        run(inputs, 2)
        monkeypatch.setattr(text_part, "KEPT_BYTES", 0)  # but for one
        run({name: tensor[:1] for name, tensor in inputs.items()}, 3)
        run(inputs, 4)
        # What is written over where it lies is another text.
        inputs["encoder_hidden_states"].neg_()
        run(inputs, 5)


def test_fixed_sizes(unet: Path, networks: Networks, dims: Dims) -> None:
    network = contract("unet", dims)
    side = dims.sample_size
    bounds = [{"batch": (2, 2, 2), "height": (side, side, side), "width": (side, side, side)}]
    with OrtEngine(network, unet / RUN_GRAPH, bounds) as engine:
        verify(engine, networks["unet"], network, dims, "fp32", 1, cases(network, dims, bounds))


@pytest.mark.slow
def test_a_strength_stays_with_the_latent(networks: Networks, dims: Dims, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    block = "mid_block.attentions.0.transformer_blocks.0"
    base = {
        f"unet.{block}.{name}.weight": networks["unet"].get_parameter(f"unet.{block}.{name}.weight")
        for name in ("attn1.to_q", "attn2.to_k")
    }
    down = {name: 0.2 * torch.randn(2, *weight.shape[1:], generator=generator) for name, weight in base.items()}
    up = {name: torch.randn(len(weight), 2, generator=generator) for name, weight in base.items()}
    module = RuntimeUnet(networks["unet"], LoraWeights(base, down, up, dict.fromkeys(base, 1.0))).eval()
    network: Network = contract("unet", dims, lora_strength=True)
    to_onnx(module, network, dims, tmp_path / "model.onnx")
    path, hits = to_ort(tmp_path / "model.onnx")
    assert all(hits.values())
    inputs = [{value.name for value in onnx_ir.load(graph).graph.inputs} for graph in (path, text_graph(path))]
    assert LORA_STRENGTH in inputs[0]
    assert inputs[1] == {"encoder_hidden_states"}
    with OrtEngine(network, path) as engine:
        verify(engine, module, network, dims, "fp32", 1)


def test_weights_that_are_put_in_later_lie_in_one_graph(built: Any, tmp_path: Path) -> None:
    for part in (built.bundle.path / "onnxruntime-fp32" / "unet").glob("model.onnx*"):
        (tmp_path / part.name).write_bytes(part.read_bytes())
    path, hits = to_ort(tmp_path / "model.onnx", apart=False)
    assert hits["text_apart"] == 0
    assert not text_graph(path).exists()
    plain, run = (onnx_ir.load(tmp_path / name).graph.initializers for name in ("model.onnx", RUN_GRAPH))
    for name, value in plain.items():
        if ".weight" in name:
            np.testing.assert_array_equal(run[name].const_value.numpy(), value.const_value.numpy())


def test_the_text_encoders_causal_mask_is_a_constant(built: Any, dims: Dims) -> None:
    """The exporter folds the comparison of positions; no rewrite of ours does (docs/experiments/graph-rewrites.md)."""
    graph = onnx_ir.load(built.bundle.path / "onnxruntime-fp32" / "text_encoder" / "model.onnx").graph
    masks = [node.inputs[0] for node in graph if node.op_type == "Expand"]
    assert len(masks) == 1
    assert masks[0] is not None
    assert masks[0].const_value is not None
    found = masks[0].const_value.numpy()
    np.testing.assert_array_equal(found.reshape(dims.tokens, dims.tokens), np.tril(np.ones_like(found[0, 0])))
    assert found.dtype == np.bool_
    # Nor does OpenVINO's graph compute it: it picks one of two numbers by the constant.
    text = (built.bundle.path / "openvino-fp32" / "text_encoder" / "openvino_model.xml").read_text()
    kinds = set(re.findall(r'<layer [^>]*type="(\w+)"', text))
    assert "Select" in kinds
    assert not kinds & {"Range", "LessEqual", "Less", "GreaterEqual", "Greater", "CumSum"}
