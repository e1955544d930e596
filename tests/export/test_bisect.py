"""The first node that diverges is found, wherever it is."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from engines.contract import Dims, contract
from engines.errors import EngineError
from engines.manifest import EngineRecord
from engines.select import architecture
from engines.variant import Bounds, LoraMode, Variant
from export import prove
from export.bisect import RUNNERS, _probe, first_divergence, on_openvino
from export.graphs import Case, random_inputs
from export.to_openvino import fewer_multiplications, native_kernels


@pytest.fixture(scope="module")
def graph(built: Any) -> Path:
    path: Path = built.bundle.path / "onnxruntime-fp32" / "unet" / "model.onnx"
    return path


@pytest.fixture
def inputs(dims: Dims) -> dict[str, Tensor]:
    case = Case({"batch": 1, "height": 8, "width": 8}, 1.0)
    return random_inputs(contract("unet", dims), dims, case, torch.Generator().manual_seed(4))


@pytest.mark.parametrize("backend", [pytest.param("onnxruntime", marks=pytest.mark.slow), "openvino-f32"])
def test_exact_backends_part_nowhere(graph: Path, inputs: dict[str, Tensor], backend: str) -> None:
    before = {path.name for path in graph.parent.iterdir()}
    assert first_divergence(graph, inputs, RUNNERS[backend], 1e-4) is None
    assert {path.name for path in graph.parent.iterdir()} == before


@pytest.mark.parametrize(
    "share", [pytest.param(0.05, marks=pytest.mark.slow), 0.5, pytest.param(0.95, marks=pytest.mark.slow)]
)
def test_a_node_that_is_wrong_is_found(graph: Path, inputs: dict[str, Tensor], share: float) -> None:
    nodes = [node for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == "Conv"]
    wrong = nodes[int(share * len(nodes))]

    def broken(probe: Path, given: Mapping[str, Tensor], tensor: str) -> np.ndarray:
        """ONNX Runtime on a graph in which that convolution's result is a third larger."""
        model = onnx.load(probe, load_external_data=False)
        node = next(one for one in model.graph.node if one.name == wrong.name)
        index = list(model.graph.node).index(node)
        model.graph.initializer.append(onnx.helper.make_tensor("third", onnx.TensorProto.FLOAT, [], [1.33]))
        own = node.output[0]
        node.output[0] = f"{own}/right"
        scaled = onnx.helper.make_node("Mul", [node.output[0], "third"], [own], name="scaled")
        model.graph.node.insert(index + 1, scaled)
        changed = probe.with_name("broken.onnx")
        changed.write_bytes(model.SerializeToString())
        return RUNNERS["onnxruntime-plain"](changed, given, tensor)

    seen: list[tuple[str, int, int]] = []
    found = first_divergence(graph, inputs, broken, 1e-3, progress=lambda *step: seen.append(step))
    assert found is not None
    assert (found.node, found.operator) == (wrong.name, "Conv")
    assert found.error == pytest.approx(0.33, abs=0.01)
    assert len(seen) < 40
    assert all(done <= total for _, done, total in seen)


def test_a_lower_precision_parts_somewhere(graph: Path, inputs: dict[str, Tensor]) -> None:
    found = first_divergence(graph, inputs, RUNNERS["openvino-bf16"], 1e-4)
    if found is not None:  # a processor without bf16 computes in fp32
        assert 1e-4 < found.error < 0.5
        assert found.index < found.count


def test_a_rewritten_graph_is_searched_where_the_rewriting_is(
    graph: Path, inputs: dict[str, Tensor], dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.rewrites.winograd.LEAST_PAIRS", 0)
    monkeypatch.setattr("export.rewrites.winograd.LEAST_TILES", 1)
    network, hits = contract("unet", dims), []
    bounds: list[Bounds] = [{"batch": (1, 1, 1), "height": (8, 8, 8), "width": (8, 8, 8)}]

    def change(model: Any) -> None:
        hits.append(fewer_multiplications(model, network, bounds).total())

    assert first_divergence(graph, inputs, on_openvino("f32", change), 1e-4) is None
    assert min(hits) > 0
    # The result of a rewritten layer goes by the name of the layer that it stands for.
    model = onnx.load(graph, load_external_data=False)
    layers = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    probe = _probe(model, layers[len(layers) // 2], tmp_path / graph.name)
    shutil.copyfile(f"{graph}.data", f"{probe}.data")
    wanted = RUNNERS["onnxruntime-plain"](probe, inputs, layers[len(layers) // 2])
    found = on_openvino("f32", change)(probe, inputs, layers[len(layers) // 2])
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def attention(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """The results of what attention multiplies, and of what then turns their axes."""
    nodes = {name: node for node in model.graph.node for name in node.output}
    attended = [name for name in nodes if "scaled_dot_product_attention" in name and nodes[name].op_type == "MatMul"]
    turned = [node.output[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in attended]
    return attended, turned


def test_on_onnxruntime_the_graph_that_runs_is_searched(
    graph: Path, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Counter[str]] = []
    session = onnxruntime.InferenceSession

    def opens(path: str, *given: Any, **named: Any) -> Any:
        opened.append(Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node))
        return session(path, *given, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opens)
    model = onnx.load(graph, load_external_data=False)
    attended, turned = attention(model)
    whole = [node.output[0] for node in model.graph.node if node.op_type == "Reshape" and node.input[0] in turned]
    shutil.copyfile(f"{graph}.data", tmp_path / f"{graph.name}.data")
    # In the middle of an attention, its result, and the two halves of a projection.
    cut = next(node for node in model.graph.node if node.op_type == "Split").output[0]
    for tensor in (attended[0], whole[0], cut):
        probe = _probe(model, tensor, tmp_path / graph.name)
        wanted = RUNNERS["onnxruntime-plain"](probe, inputs, tensor)
        found = RUNNERS["onnxruntime"](probe, inputs, tensor)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        plain, rewritten = opened[-2:]
        assert plain["MultiHeadAttention"] == 0 < rewritten["MultiHeadAttention"]


@pytest.mark.usefixtures("own_kernels")
def test_a_graph_with_native_kernels_is_searched_where_they_are(
    graph: Path, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they compute, what is turned after it, and the halves of a projection go by the names that they had."""
    monkeypatch.setattr("export.rewrites.native.LEAST_KEYS", 1)
    hits: list[dict[str, int]] = []

    def change(model: Any) -> None:
        hits.append(native_kernels(model, "f32"))

    assert first_divergence(graph, inputs, on_openvino("f32", change), 1e-4) is None
    assert all(min(one.values()) > 0 for one in hits)
    model = onnx.load(graph, load_external_data=False)
    attended, turned = attention(model)
    cut = [node.output[0] for node in model.graph.node if node.op_type == "Split"]
    shutil.copyfile(f"{graph}.data", tmp_path / f"{graph.name}.data")
    for tensor in (attended[0], turned[0], cut[0]):
        probe = _probe(model, tensor, tmp_path / graph.name)
        wanted = RUNNERS["onnxruntime-plain"](probe, inputs, tensor)
        found = on_openvino("f32", change)(probe, inputs, tensor)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_graph_whose_weights_are_replaced_is_searched_with_them_in_one_piece(
    graph: Path, inputs: dict[str, Tensor], dims: Dims, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[Any] = []
    monkeypatch.setattr("export.prove.native_kernels", lambda _, native, whole: changes.append((native, whole)))
    record = EngineRecord.model_construct(network="unet", precision="fp32", hint="f32", bounds=[])
    modes: tuple[LoraMode, ...] = ("fused", "refit")
    for mode in modes:
        variant = Variant(
            backend="openvino", precision="fp32", lora_mode=mode, architecture=architecture(), kernels="native"
        )
        run = prove._runner(variant, record, contract("unet", dims))
        assert run is not None
        run(graph, inputs, "noise_pred")
    assert changes == [("f32", False), ("f32", True)]


def test_a_file_that_is_none(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(EngineError, match=r"model\.onnx: not an ONNX graph"):
        first_divergence(tmp_path / "model.onnx", inputs, RUNNERS["onnxruntime"], 1e-4)
