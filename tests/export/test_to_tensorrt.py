"""Engines of TensorRT for RTX, built for real and without a GPU; that they run, tests/gpu shows where there is one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from engines.contract import NETWORKS, Dims, Network, NetworkName, contract
from engines.eager import gradient_networks
from engines.errors import EngineError, InputError
from engines.trt import TrtEngine
from engines.variant import Bounds, Precision, Variant

pytest.importorskip("tensorrt_rtx", reason="builds the engines; pip install 'smooth-rt[tensorrt-rtx]'")

import tensorrt_rtx

from export import stages
from export import to_tensorrt as to_tensorrt_module
from export.half import in_half
from export.to_onnx import to_onnx
from export.to_tensorrt import BuildFacts, capabilities, to_tensorrt

RTX = {"backend": "tensorrt-rtx", "architecture": "rtx"}


def bounded(
    network: Network, batch: tuple[int, int, int] = (1, 2, 4), side: tuple[int, int, int] = (8, 8, 16)
) -> Bounds:
    return {symbol: batch if symbol == "batch" else side for symbol in network.symbols}


def graph(built: Any, name: str) -> Path:
    path: Path = built.bundle.path / "onnxruntime-fp32" / name / "model.onnx"
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_built_without_a_gpu(built: Any, dims: Dims, tmp_path: Path, name: NetworkName) -> None:
    network = contract(name, dims)
    seen: list[tuple[str, int, int]] = []
    path = tmp_path / "model.engine"
    facts = to_tensorrt(
        graph(built, name), path, network, [bounded(network)], progress=lambda *step: seen.append(step), **RTX
    )
    assert facts.bytes == path.stat().st_size
    assert facts.layers > 50
    assert facts.capabilities == ("rtx",)
    assert {phase for phase, _, _ in seen} >= {"Building engine"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert list(tmp_path.iterdir()) == [path]


def test_several_profiles_and_named_gpus(
    built: Any, dims: Dims, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    made = to_tensorrt_module._config
    monkeypatch.setattr(to_tensorrt_module, "_config", lambda *given: configs.append(made(*given)) or configs[-1])
    network = contract("text_encoder", dims)
    one, two = bounded(network, (1, 1, 1)), bounded(network, (1, 4, 8))
    sizes = {}
    for architecture in ("sm89", "sm80,sm120"):
        facts = to_tensorrt(
            graph(built, "text_encoder"),
            tmp_path / architecture,
            network,
            [one, two],
            backend="tensorrt-rtx",
            architecture=architecture,
        )
        assert facts.capabilities == tuple(architecture.split(","))
        sizes[architecture] = facts.bytes
    assert sizes["sm89"] != sizes["sm80,sm120"]
    # On by default, and no fp32: ten bits of mantissa.
    assert [config.get_flag(tensorrt_rtx.BuilderFlag.TF32) for config in configs] == [False, False]
    # Else a run may allocate, which no CUDA graph can hold.
    assert [config.get_flag(tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION) for config in configs] == [True, True]
    assert [config.num_compute_capabilities for config in configs] == [1, 2]
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; tests/gpu builds and refits such an engine")
def test_replaceable_weights_want_a_gpu_at_the_build(built: Any, dims: Dims, tmp_path: Path) -> None:
    network = contract("unet", dims)
    options: Any = {**RTX, "refittable": ["unet.conv_in.weight"]}
    with pytest.raises(EngineError, match=r"unet: tensorrt-rtx makes weights replaceable on a CUDA GPU alone"):
        to_tensorrt(graph(built, "unet"), tmp_path / "model.engine", network, [bounded(network)], **options)


def test_every_weight_of_a_lora_is_marked_as_replaceable(
    built: Any, networks: dict[NetworkName, nn.Module], dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def record(graph: Path, path: Path, *_: Any, **options: Any) -> BuildFacts:
        weights = onnx.load(graph, load_external_data=False).graph.initializer
        found.update(options, known={tensor.name for tensor in weights})
        return BuildFacts(1, 1, 1.0, ("sm89",), len(options["refittable"]))

    monkeypatch.setattr("export.to_tensorrt.to_tensorrt", record)
    variant = Variant(backend="tensorrt-rtx", precision="fp32", lora_mode="refit", architecture="sm89")
    network, module = contract("unet", dims), networks["unet"]
    way = stages.Stages(tmp_path / "way", dims, None, lambda *_: None, built.bundle.path)
    weights = {name: weight for name, weight in module.named_parameters() if ".attn1.to_q." in name}
    made = way.build(network, module, variant, "fp32", [bounded(network)], tmp_path, weights)
    assert len(weights) == made.notes["refittable"] > 0
    assert set(found["refittable"]) <= found["known"]
    way.build(network, module, variant, "fp32", [bounded(network)], tmp_path)
    assert found["refittable"] == []


def test_a_graph_in_half_precision(
    exported_once: Any, networks: dict[NetworkName, nn.Module], dims: Dims, tmp_path: Path
) -> None:
    network = contract("vae_decoder", dims)
    sizes = []
    half, _ = in_half(networks["vae_decoder"], network, dims, "fp16")
    for name, module in (("exact", networks["vae_decoder"]), ("half", half)):
        path = tmp_path / name / "model.onnx"
        exported_once(module, network, dims, path)
        sizes.append(to_tensorrt(path, tmp_path / f"{name}.engine", network, [bounded(network)], **RTX).bytes)
    assert sizes[1] < sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_of_gradients(
    networks: dict[NetworkName, nn.Module], dims: Dims, tmp_path: Path, precision: Precision
) -> None:
    network = contract("unet_vjp", dims)
    module = gradient_networks(networks["unet"], [network.name])[network.name]
    if precision != "fp32":
        module, _ = in_half(module, network, dims, precision)
    to_onnx(module, network, dims, tmp_path / "model.onnx")
    facts = to_tensorrt(tmp_path / "model.onnx", tmp_path / "model.engine", network, [bounded(network)], **RTX)
    assert facts.layers > 1000


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as a terminal leaves it: in the background of a shell it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("by", ["progress", "Ctrl-C"])
def test_a_build_that_is_interrupted_leaves_nothing(built: Any, dims: Dims, tmp_path: Path, by: str) -> None:
    network = contract("unet", dims)
    seen = 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 500:
            if by == "progress":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)  # of the main thread, which waits for the build
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        to_tensorrt(graph(built, "unet"), tmp_path / "m.engine", network, [bounded(network)], progress=stop, **RTX)
    assert list(tmp_path.iterdir()) == []
    assert by == "Ctrl-C" or seen == 500


@pytest.mark.usefixtures("ctrl_c")
def test_a_build_is_waited_for_however_often_ctrl_c_is_pressed() -> None:
    """A thread of TensorRT's that is left behind tells its log when Python ends, which aborts the process."""
    ended: list[float] = []

    def work() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        ended.append(time.monotonic())

    with pytest.raises(KeyboardInterrupt):
        to_tensorrt_module._apart(work)
    assert ended


@pytest.mark.usefixtures("ctrl_c")
def test_a_graph_that_is_interrupted_as_it_is_read(
    built: Any, dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = to_tensorrt_module._parse

    def parse(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # in which the main thread hears of it, and TensorRT's log does not
        plain(*given)

    monkeypatch.setattr(to_tensorrt_module, "_parse", parse)
    network = contract("unet", dims)
    with pytest.raises(KeyboardInterrupt):
        to_tensorrt(graph(built, "unet"), tmp_path / "m.engine", network, [bounded(network)], **RTX)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_nobody_knows(dims: Dims, tmp_path: Path) -> None:
    network = contract("vae_decoder", dims)
    spec = network.inputs[0]
    ends = [
        helper.make_tensor_value_info(one.name, TensorProto.FLOAT, list(one.axis_names))
        for one in (spec, network.outputs[0])
    ]
    node = helper.make_node("Frobnicate", [spec.name], [network.outputs[0].name], name="frob", domain="nobody")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [ends[0]], [ends[1]]), opset_imports=opsets, ir_version=10)
    onnx.save_model(model, str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=r"vae_decoder: tensorrt-rtx does not take node 'frob'.*Frobnicate") as caught:
        to_tensorrt(tmp_path / "model.onnx", tmp_path / "m.engine", network, [bounded(network)], **RTX)
    assert "\n" not in str(caught.value)
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(EngineError, match="vae_decoder: tensorrt-rtx does not take"):
        to_tensorrt(tmp_path / "model.onnx", tmp_path / "m.engine", network, [bounded(network)], **RTX)
    assert not (tmp_path / "m.engine").exists()


def test_what_is_refused_before_anything_is_built(built: Any, dims: Dims, tmp_path: Path) -> None:
    network = contract("unet", dims)
    endless: Bounds = {"batch": (1, 2, 4), "height": (8, 8, None), "width": (8, 8, None)}
    with pytest.raises(InputError, match=r"needs an end to height, width; give --batch, --height and --width as MIN"):
        to_tensorrt(graph(built, "unet"), tmp_path / "m.engine", network, [endless], **RTX)
    for name in ("sm90", "hopper", ""):
        with pytest.raises(InputError, match=rf"gpu_arch={name}: tensorrt-rtx .* builds ahead of time for sm75"):
            capabilities("tensorrt-rtx", name)
    with pytest.raises(EngineError, match=r"engine 'tensorrt': does not load .*pip install 'smooth-rt\[tensorrt\]'"):
        to_tensorrt(
            graph(built, "unet"), tmp_path / "m", network, [bounded(network)], backend="tensorrt", architecture="sm89"
        )


class Caching:
    """Stands for a builder's configuration: TensorRT for RTX has no timing cache to show it with, TensorRT no build."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content.startswith(b"damaged") else SimpleNamespace(serialize=lambda: content + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch  # of another version or GPU it is refused
        self.content = cache.serialize()


def test_a_timing_cache_grows_and_never_fails_a_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "timing" / "tensorrt-11-sm89.cache"
    for grown in (b"+", b"++"):
        config = Caching()
        to_tensorrt_module._save_cache(to_tensorrt_module._load_cache(config, path), path)
        assert config.content == path.read_bytes() == grown
    path.write_bytes(b"damaged")
    to_tensorrt_module._save_cache(to_tensorrt_module._load_cache(Caching(), path), path)
    assert path.read_bytes() == b"+"
    assert list(path.parent.iterdir()) == [path]
    below = path / "a file is no folder"
    with caplog.at_level("INFO", "smooth_rt"):
        to_tensorrt_module._save_cache(to_tensorrt_module._load_cache(Caching(), below), below)
    assert "the timing cache is not kept" in caplog.text


def test_a_timing_cache_is_of_one_version_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for version in ("11.0", "11.1"):
        monkeypatch.setattr(stages, "backend_version", lambda _, version=version: version)
        for architecture in ("sm80", "sm89"):
            for backend in ("tensorrt", "tensorrt-rtx"):
                variant = Variant(backend=backend, precision="fp16", lora_mode="fused", architecture=architecture)
                names.add(stages._cache_name(variant))
    assert len(names) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; tests/gpu runs the engine")
def test_an_engine_without_a_gpu_is_refused(built: Any, dims: Dims, tmp_path: Path) -> None:
    network = contract("text_encoder", dims)
    path = tmp_path / "m.engine"
    to_tensorrt(graph(built, "text_encoder"), path, network, [bounded(network)], **RTX)
    with pytest.raises(EngineError, match=r"m\.engine: tensorrt-rtx runs on a CUDA GPU and torch finds none"):
        TrtEngine(network, path, [bounded(network)], "tensorrt-rtx")
