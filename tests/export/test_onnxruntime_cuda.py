"""What ONNX Runtime's CUDA provider is given: attention as one node, beside the plain graph, the processor's own."""

from __future__ import annotations

import shutil
from typing import Any

import onnx_ir
import pytest
import torch
from torch import nn

from engines.bundle import Bundle
from engines.contract import NETWORKS, Dims, NetworkName, contract
from engines.manifest import digest_file
from engines.ort import OrtEngine, plain_graph, text_graph
from engines.select import ANY_GPU
from engines.variant import Order, Variant, every_size
from export.build import build_bundle
from export.verify import verify

Networks = dict[NetworkName, nn.Module]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where tests/gpu builds and runs it")


@pytest.fixture(scope="module")
def bundle(built: Any, networks: Networks, dims: Dims, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The variants of both precisions, added where the processor's is; without a GPU nothing runs them."""
    orders = [
        Order(
            variant=Variant(backend="onnxruntime-cuda", precision=precision, lora_mode="fused", architecture=ANY_GPU),
            profiles=(every_size(dims),),
        )
        for precision in ("fp32", "fp16")
    ]
    target = tmp_path_factory.mktemp("cuda") / "bundle"
    keep = Bundle.open(shutil.copytree(built.bundle.path, target))
    return build_bundle(networks, dims, keep.source, orders, target, lambda _: None, keep=keep)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_unet_that_runs_has_attention_as_one_node(bundle: Bundle, networks: Networks, precision: Any) -> None:
    attentions = sum(name.endswith((".attn1", ".attn2")) for name, _ in networks["unet"].named_modules())
    record = bundle.find("onnxruntime-cuda", precision).engine("unet")
    assert record.notes["fused_attention"] == attentions
    # For a processor alone; and on a device the text has no graph of its own.
    assert not {"split_projection", "text_apart"} & set(record.notes)
    run = bundle.path / record.file
    assert not text_graph(run).exists()
    nodes = [(node.domain, node.op_type) for node in onnx_ir.load(run).graph]
    assert nodes.count(("com.microsoft", "MultiHeadAttention")) == attentions
    assert {domain for domain, _ in nodes} == {"", "com.microsoft"}
    assert ("", "Softmax") not in nodes


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_others_find_the_plain_graph_beside_it(bundle: Bundle, built: Any, precision: Any) -> None:
    before = {file.path: file.sha256 for file in built.bundle.manifest.files}
    variant = bundle.find("onnxruntime-cuda", precision)
    rewritten = {one.network: plain_graph(bundle.path / one.file) for one in variant.engines}
    assert rewritten["unet"] is not None
    for name in NETWORKS:
        plain = rewritten[name] or bundle.path / variant.engine(name).file
        assert plain.name == "model.onnx"
        assert {node.domain for node in onnx_ir.load(plain).graph} == {""}
        assert [path.name for path in plain.parent.glob("*.data")] == ["model.onnx.data"]
        if precision == "fp32":  # the processor's own, once on the disk
            ours = f"onnxruntime-fp32/{name}/model.onnx"
            assert plain.samefile(bundle.path / ours)
            assert digest_file(plain) == before[ours]


def test_its_unet_in_fp32_computes_torchs_numbers(bundle: Bundle, networks: Networks, dims: Dims) -> None:
    """By the processor, which has the operator in fp32 alone."""
    network, run = contract("unet", dims), bundle.find("onnxruntime-cuda", "fp32").engine("unet").file
    with OrtEngine(network, bundle.path / run) as engine:
        verify(engine, networks["unet"], network, dims, "fp32", 1)
