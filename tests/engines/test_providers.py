"""ONNX Runtime's providers: which there are, what each is told, refusals, and IO binding, which runs on the CPU too."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from engines import providers, select
from engines.contract import Dims, Network, contract
from engines.device import SHAPES
from engines.errors import EngineError, InputError
from engines.ort import OrtEngine, _Bound
from engines.providers import BY_BACKEND, PROVIDERS, Provider, joined, lacking, open_session, settings
from engines.variant import Bounds, Place

GPU_NAMES = ["cuda", "tensorrt", "tensorrt-rtx"]
ONE = {"batch": (2, 2, 2), "height": (2, 2, 2), "width": (3, 3, 3)}
MANY = {"batch": (1, 2, 4), "height": (1, 2, 9), "width": (1, 3, 9)}


def image(dims: Dims, batch: int, height: int, width: int) -> Tensor:
    shape = (batch, dims.image_channels, height * dims.vae_factor, width * dims.vae_factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch + height))


@pytest.fixture
def bound(network: Network, write_graph: Any, tmp_path: Path) -> Any:
    """Opens the convolution with its inputs and outputs bound to buffers, on the CPU."""

    def open_it(*bounds: Bounds) -> OrtEngine:
        return OrtEngine(network, write_graph(tmp_path / "graph.onnx"), bounds, binding=True)

    return open_it


def test_bound_buffers_give_what_a_run_gives(
    bound: Any, network: Network, dims: Dims, write_graph: Any, tmp_path: Path
) -> None:
    plain = OrtEngine(network, write_graph(tmp_path / "plain.onnx"))
    for engine in (bound(), bound(ONE, MANY)):
        with engine:
            for sizes in ((2, 2, 3), (1, 2, 3), (4, 9, 1), (2, 2, 3)):
                sample = image(dims, *sizes)
                got, wanted = engine.infer(sample=sample), plain.infer(sample=sample)
                assert all(torch.equal(got[name], wanted[name]) for name in wanted)
            kept = got["latent_mean"].clone()
            engine.infer(sample=sample + 1)
            assert torch.equal(got["latent_mean"], kept)


def test_buffers_of_many_shapes_go_and_those_of_a_fixed_size_stay(bound: Any, dims: Dims) -> None:
    with bound(ONE, MANY) as engine:
        engine.infer(sample=image(dims, 2, 2, 3))
        (fixed,) = engine._device._held.values()
        assert fixed.lasting
        for height in range(1, 10):
            engine.infer(sample=image(dims, 1, height, 2))
        held = list(engine._device._held.values())
        assert fixed in held
        assert len(held) == SHAPES + 1
        engine.infer(sample=image(dims, 2, 2, 3))
        assert len(engine._device._held) == SHAPES + 1


def test_weights_are_replaced_behind_bound_buffers(
    network: Network, write_graph: Any, dims: Dims, module: Any, tmp_path: Path
) -> None:
    path, own = write_graph(tmp_path / "graph.onnx"), module.weight.detach()
    # Weights that lie beside the graph, as those of every export, can be replaced.
    onnx.save_model(onnx.load(path), str(path), save_as_external_data=True, location="data", size_threshold=0)
    with OrtEngine(network, path, [ONE], binding=True) as engine:
        engine.places = {"weight": Place(name="weight", transposed=False)}
        sample, found = image(dims, 2, 2, 3), []
        for weight in (own, 2 * own, own):
            engine.refit({"weight": weight})
            found.append(engine.infer(sample=sample)["latent_mean"])
        assert torch.equal(found[0], found[2])
        torch.testing.assert_close(found[1], 2 * found[0])


def test_a_graph_that_cannot_be_captured_runs_without(
    bound: Any, dims: Dims, module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(PROVIDERS, "cpu", Provider("CPUExecutionProvider", "onnxruntime", "cpu", graphs="of_nothing"))
    replay, calls = _Bound.replay, []

    def fails_once(self: Any) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("no capture\nof this")
        replay(self)

    monkeypatch.setattr(_Bound, "replay", fails_once)
    sample = image(dims, 2, 2, 3)
    with bound(ONE) as engine, caplog.at_level(logging.WARNING, "smooth_rt"):
        torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())
        engine.infer(sample=sample)
    assert caplog.messages == ["vae_encoder: onnxruntime runs without CUDA graphs (no capture)"]
    assert [one is calls[1] for one in calls] == [False, True, True]


def test_an_engine_and_a_provider_make_one_name() -> None:
    assert joined("openvino", None) == "openvino"
    assert [joined("onnxruntime", name) for name in PROVIDERS] == list(BY_BACKEND)
    assert joined("auto", "cuda") == joined("onnxruntime-cuda", "cuda") == "onnxruntime-cuda"
    with pytest.raises(InputError, match="provider=rocm: unknown; choose from cpu, cuda, tensorrt, tensorrt-rtx"):
        joined("onnxruntime", "rocm")
    with pytest.raises(InputError, match="is one of onnxruntime's, and the engine is openvino"):
        joined("openvino", "cuda")


@pytest.mark.parametrize("name", GPU_NAMES)
def test_what_is_lacking_names_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = PROVIDERS[name]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "find_spec", lambda _: None)
    said = str(lacking(name))
    assert said.startswith(f"this onnxruntime has no {own.name} (it has CPUExecutionProvider); run `pip ")
    assert said.endswith(f"{own.package}`")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [own.name])
    assert lacking(name) is None
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    assert select.availability(f"onnxruntime-{name}") is None
    monkeypatch.setattr(select, "gpu", lambda: None)
    assert "torch finds none here" in str(select.availability(f"onnxruntime-{name}"))


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    monkeypatch.setattr(select, "lacking", lambda _: None)
    assert select.choose("auto", ["openvino", "onnxruntime-cuda"]).backend == "onnxruntime-cuda"
    assert select.choose("auto", ["openvino", "onnxruntime-tensorrt"]).backend == "openvino"
    monkeypatch.setattr(select, "lacking", lambda _: "has no such provider")
    choice = select.choose("auto", ["openvino", "onnxruntime-cuda"])
    assert (choice.backend, "onnxruntime-cuda (has no such provider)" in choice.reason) == ("openvino", True)


def test_what_a_graph_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "gpu", lambda: None)
    assert select.target("onnxruntime-cuda") == select.ANY_GPU
    assert select.target("onnxruntime-cuda", "SM80, sm89") == "sm80,sm89"
    with pytest.raises(InputError, match="gpu_arch=ada: no architecture; give for example sm89"):
        select.target("onnxruntime-cuda", "ada")
    for backend, every in (("onnxruntime-cuda", "cuda"), ("tensorrt-rtx", "rtx")):
        assert select.target(backend, every.upper()) == every
        with pytest.raises(InputError, match=f"gpu_arch=sm89,{every}: no architecture; .* or {every} alone"):
            select.target(backend, f"sm89,{every}")
    assert "torch finds none" in str(select.runs_here(select.ANY_GPU))
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    assert select.target("onnxruntime-cuda") == "sm89"
    assert select.runs_here(select.ANY_GPU) is None


def test_what_each_provider_is_told(dims: Dims, tmp_path: Path) -> None:
    network = contract("unet", dims)
    bounds: list[Bounds] = [
        {"batch": (1, 2, 4), "height": (2, 4, 8), "width": (4, 4, 4)},
        {"batch": (2, 8, 8), "height": (4, 4, 4), "width": (2, 4, 6)},
    ]

    def told(name: str, **options: Any) -> dict[str, str]:
        return settings(name, network, bounds, stream=77, device=1, **options)

    assert told("cpu") == {}
    always = {"device_id": "1", "has_user_compute_stream": "1", "user_compute_stream": "77"}
    assert told("cuda") == {**always, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert told("cuda", fixed=True, graph=True) == {**always, "use_tf32": "0", "enable_cuda_graph": "1"}
    text = f"encoder_hidden_states:{{}}x{dims.tokens}x{dims.text_width}"
    for name, prefix in (("tensorrt", "trt"), ("tensorrt-rtx", "nv")):
        found = told(name)
        assert found[f"{prefix}_profile_min_shapes"] == f"sample:1x3x2x2,timestep:1,{text.format(1)}"
        assert found[f"{prefix}_profile_opt_shapes"] == f"sample:2x3x4x4,timestep:2,{text.format(2)}"
        assert found[f"{prefix}_profile_max_shapes"] == f"sample:8x3x8x6,timestep:8,{text.format(8)}"
    of_trt = {"trt_fp16_enable": "1", "trt_cuda_graph_enable": "1"}
    kept = {f"trt_{what}_cache_{key}": value for what in ("engine", "timing") for key, value in
            (("enable", "1"), ("path", str(tmp_path)))}  # fmt: skip
    assert told("tensorrt", fixed=True, graph=True, cache=tmp_path) == {**always, **of_trt, **kept}
    of_rtx = {"enable_cuda_graph": "1", "nv_runtime_cache_path": str(tmp_path)}
    assert told("tensorrt-rtx", fixed=True, graph=True, cache=tmp_path) == {**always, **of_rtx}
    bounds[0]["height"] = (2, 4, None)
    with pytest.raises(EngineError, match="height: has no end, and TensorRT needs one"):
        told("tensorrt")


class Opened:
    """A session that got some providers."""

    def __init__(self, got: list[str]) -> None:
        self.got, self.fallback = got, True

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_providers(self) -> list[str]:
        return self.got


CHOSEN = {"device_id": "0", "has_user_compute_stream": "1", "user_compute_stream": "5"}


def test_a_provider_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def session(path: str, options: Any, **given: Any) -> Opened:
        asked.append(given)
        return Opened([given["providers"][0][0], "CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert open_session("cuda", Path("g"), None, CHOSEN).fallback is False
    assert asked == [{"providers": [("CUDAExecutionProvider", CHOSEN)], "enable_fallback": 0}]
    open_session("tensorrt", Path("g"), None, {**CHOSEN, "trt_fp16_enable": "1"})
    (_, own), (name, beside) = asked[1]["providers"]
    assert (own["trt_fp16_enable"], name) == ("1", "CUDAExecutionProvider")
    assert beside == {**CHOSEN, "use_tf32": "0"}


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
@pytest.mark.parametrize("missing", [None, "libcublasLt.so.13: cannot open shared object file"])
def test_a_silent_fallback_to_the_cpu_is_refused(
    name: str, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: Opened(["CPUExecutionProvider"]))
    monkeypatch.setattr(providers, "_not_loading", lambda _: missing)
    with pytest.raises(EngineError, match="would run on the CPU instead") as caught:
        open_session(name, Path("g"), None, CHOSEN)
    said = str(caught.value)
    assert (missing or "it did not say why") in said
    assert said.startswith(PROVIDERS[name].name)
    assert "\n" not in said


def test_a_provider_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(*_: Any, **__: Any) -> Any:
        raise RuntimeError("of the graph")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(providers, "_not_loading", lambda _: None)
    with pytest.raises(RuntimeError, match="of the graph"):
        open_session("tensorrt", Path("g"), None, CHOSEN)
    monkeypatch.setattr(providers, "_not_loading", lambda _: "libnvinfer.so.10: cannot open shared object file")
    with pytest.raises(EngineError, match=r"does not start \(libnvinfer\.so\.10: .*tensorrt<11"):
        open_session("tensorrt", Path("g"), None, CHOSEN)


def test_a_plugin_that_is_added_to_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PROVIDERS["tensorrt-rtx"]
    module = SimpleNamespace(get_library_path=lambda: "lib.so")
    registered: list[tuple[str, str]] = []
    devices = [SimpleNamespace(ep_name="CPUExecutionProvider")]
    second = SimpleNamespace(ep_name=own.name, ep_metadata={"device_id": "1"})
    monkeypatch.setattr(providers.importlib, "import_module", lambda _: module)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *given: registered.append(given))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: Opened([own.name]))
    given: list[Any] = []
    options = SimpleNamespace(add_provider_for_devices=lambda *them: given.append(them))
    providers._register.cache_clear()
    with pytest.raises(EngineError, match="finds no GPU that it supports; choose the provider cuda"):
        open_session("tensorrt-rtx", Path("g"), options, CHOSEN)
    devices.append(second)
    with pytest.raises(EngineError, match="finds no GPU that it supports"):  # the first, that is
        open_session("tensorrt-rtx", Path("g"), options, CHOSEN)
    devices.append(SimpleNamespace(ep_name=own.name, ep_metadata={"device_id": "0"}))
    for number, device in (("0", devices[2]), ("1", second)):
        open_session("tensorrt-rtx", Path("g"), options, {**CHOSEN, "device_id": number})
        # Of all that it may be told, the number of the GPU is unknown to it.
        assert given.pop() == ([device], {key: value for key, value in CHOSEN.items() if key != "device_id"})
    assert registered == [(own.name, "lib.so")]
    providers._register.cache_clear()


def test_an_unknown_provider(network: Network, write_graph: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="provider=rocm: unknown; choose from cpu, cuda"):
        OrtEngine(network, write_graph(tmp_path / "graph.onnx"), (), "rocm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_found(network: Network, write_graph: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime-cuda runs on a CUDA GPU and torch finds none"):
        OrtEngine(network, write_graph(tmp_path / "graph.onnx"), (), "cuda")
