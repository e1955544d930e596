"""TensorRT's engine without a GPU, on a module that stands for TensorRT's: contexts and their graphs, weights, kernels
that are kept, refusals. That it runs, tests/gpu shows where there is one."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import trt as trt_engine
from engines.contract import Dims, Network
from engines.device import SHAPES, OnDevice
from engines.errors import EngineError, InputError
from engines.trt import TrtEngine, given_weights
from engines.variant import Bounds, Place

BOUNDS: list[Bounds] = [dict.fromkeys(("batch", "height", "width"), (1, 2, 16))]


def at(address: int, shape: tuple[int, ...]) -> Tensor:
    """The floats that lie there, as TensorRT sees them: by address alone."""
    count = math.prod(shape)
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(shape)


class Gpu:
    """What the module that stands for TensorRT's does and is told."""

    def __init__(self, network: Network, module: Any) -> None:
        self.network, self.module = network, module
        self.contexts: list[Context] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.capturable = True
        self.fails = "never"
        self.compiled = b""
        self.compilations = 0
        self.seen: list[Tensor] = []

    def trt(self, backend: str) -> SimpleNamespace:
        """The module, with as little in it as the engine may use."""

        class Logger:
            Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)

        class Runtime:
            def __init__(self, log: Any) -> None:
                self.log = log

            def deserialize_cuda_engine(runtime, content: bytes) -> Engine | None:  # noqa: N805
                if content == b"an engine":
                    return Engine(self, backend)
                runtime.log.log(1, "of another\nversion")
                return None

        own = SimpleNamespace(
            __version__="1.7",
            ILogger=Logger,
            Runtime=Runtime,
            Refitter=lambda engine, _: Refitter(engine),
            Weights=Weights,
            TensorIOMode=SimpleNamespace(INPUT=0, OUTPUT=1),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="shared"),
        )
        if backend == "tensorrt-rtx":
            own.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
            names = ("SM75", "SM80", "SM86", "SM89", "SM120")
            own.ComputeCapability = SimpleNamespace(__members__=dict.fromkeys(names, 0))
        return own


class Weights:
    def __init__(self, dtype: Any, address: int = 0, size: int = 0) -> None:
        self.dtype, self.address, self.size = dtype, address, size


class Refitter:
    def __init__(self, engine: Engine) -> None:
        self.module, self.given = engine.gpu.module, {}

    def get_all_weights(self) -> list[str]:
        return ["weight"]

    def get_weights_prototype(self, name: str) -> Weights:
        return Weights(SimpleNamespace(name="FLOAT"))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        assert weights.size == self.module.get_parameter(name).numel()
        self.given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        for name, weights in self.given.items():
            parameter = self.module.get_parameter(name)
            parameter.data.copy_(at(weights.address, tuple(parameter.shape)))
        return True


class Cache:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        gpu.compiled = b"kernels:"

    def deserialize(self, content: bytes) -> bool:
        good = content.startswith(b"kernels:")
        self.gpu.compiled = content if good else self.gpu.compiled
        return good

    def serialize(self) -> bytes:
        return self.gpu.compiled


class Engine:
    device_memory_size_v2 = 4096

    def __init__(self, gpu: Gpu, backend: str) -> None:
        self.gpu, self.backend = gpu, backend
        self.tensors = [*gpu.network.inputs, *gpu.network.outputs]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_mode(self, name: str) -> int:
        return int(name not in [spec.name for spec in self.gpu.network.inputs])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def create_runtime_config(self) -> Any:
        told: dict[str, Any] = {}
        config = SimpleNamespace(told=told, set_execution_context_allocation_strategy=lambda way: told.update(way=way))
        if self.backend == "tensorrt-rtx":
            config.create_runtime_cache = lambda: Cache(self.gpu)
            config.set_runtime_cache = lambda cache: told.update(cache=cache)
        return config

    def create_execution_context(self, config: Any) -> Context:
        assert config.told["way"] == "shared"
        eager = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
        assert eager == ("eager" if self.backend == "tensorrt-rtx" else None)
        self.gpu.contexts.append(Context(self.gpu))
        return self.gpu.contexts[-1]


class Context:
    """One that refuses every change once it was captured."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.captured, self.shape = gpu, False, (0,)
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert (profile, stream) == (0, 7)
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.captured
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.gpu.module(torch.zeros(self.shape))[0].shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        assert not self.captured
        self.addresses[name] = address

    def is_stream_capturable(self, stream: int) -> bool:
        return self.gpu.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory[1] == Engine.device_memory_size_v2
        if self.gpu.fails == "always" or (self.gpu.fails == "in a capture" and self.gpu.capturing is not None):
            return False
        if str(self.shape).encode() not in self.gpu.compiled:
            self.gpu.compiled += str(self.shape).encode()
            self.gpu.compilations += 1

        def run() -> None:
            self.gpu.seen.append(at(self.addresses["sample"], self.shape).clone())
            outputs = self.gpu.module(self.gpu.seen[-1])
            for spec, output in zip(self.gpu.network.outputs, outputs, strict=True):
                at(self.addresses[spec.name], tuple(output.shape)).copy_(output)

        if self.gpu.capturing is None:
            run()
        else:
            self.captured = True
            self.gpu.capturing.append(run)
        return True


@pytest.fixture
def gpu(network: Network, module: Any, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The CPU in the place of a GPU, and both modules on it."""
    own = Gpu(network, module)

    class Graph:
        def __init__(self) -> None:
            self.work: list[Callable[[], None]] = []

        def replay(self) -> None:
            for run in self.work:
                run()

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Any) -> Iterator[None]:
        own.capturing = graph.work
        try:
            yield
        finally:
            own.capturing = None

    class Placed(OnDevice):
        def __init__(self, device: str, prepare: Any) -> None:
            assert device == "cuda"
            super().__init__("cpu", prepare)
            self.stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(trt_engine, "OnDevice", Placed)
    monkeypatch.setattr(trt_engine, "gpu", lambda: "sm89")
    for backend in ("tensorrt", "tensorrt-rtx"):
        monkeypatch.setitem(sys.modules, backend.replace("-", "_"), own.trt(backend))  # type: ignore[arg-type]
    return own


@pytest.fixture
def opened(gpu: Gpu, tmp_path: Path) -> Callable[..., TrtEngine]:
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine")
    return lambda backend="tensorrt-rtx", cache=None: TrtEngine(gpu.network, path, BOUNDS, backend, cache)


def image(dims: Dims, height: int, seed: int = 0) -> Tensor:
    shape = (2, dims.image_channels, height * dims.vae_factor, dims.vae_factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_each_shape_is_captured_on_a_context_of_its_own(
    backend: str, gpu: Gpu, opened: Any, dims: Dims, module: Any
) -> None:
    heights = range(1, SHAPES + 3)
    with opened(backend) as engine:
        # In turns, so that every graph is replayed after others were captured; the first ones were dropped by then.
        for turn, height in enumerate([*heights, *heights, 2, 4, 2]):
            sample = image(dims, height, turn)
            torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())
        # The first run of all was on what was asked for, and not on what lay in fresh memory.
        assert torch.equal(gpu.seen[0], image(dims, 1, 0))
        assert len(engine._device._held) == SHAPES
        assert all(context.captured for context in gpu.contexts)
        assert len(gpu.contexts) == 2 * len(heights) + 1  # of the last three, one was dropped before
        assert len({context.memory for context in gpu.contexts}) == 1


@pytest.mark.parametrize("way", ["not capturable", "in a capture", "torch"])
def test_what_cannot_be_captured_runs_without_and_says_so_once(
    way: str,
    gpu: Gpu,
    opened: Any,
    dims: Dims,
    module: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu.capturable, gpu.fails = way != "not capturable", way
    if way == "torch":

        def refused(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: not permitted\nwhen capturing")

        monkeypatch.setattr(torch.cuda, "graph", refused)
    with opened() as engine, caplog.at_level(logging.WARNING, "smooth_rt"):
        for turn, height in enumerate([1, 2, 1, 2]):
            sample = image(dims, height, turn)
            torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())
    (said,) = caplog.messages
    assert said.startswith("vae_encoder: tensorrt-rtx runs without CUDA graphs (")
    assert "\n" not in said


def test_a_run_that_fails_is_an_error_of_the_engine(gpu: Gpu, opened: Any, dims: Dims) -> None:
    gpu.fails = "always"
    with opened() as engine, pytest.raises(EngineError, match=r"vae_encoder: tensorrt-rtx cannot run it .*rebuild it"):
        engine.infer(sample=image(dims, 1))


def test_weights_a_then_b_then_a_again(opened: Any, dims: Dims, module: Any) -> None:
    own, sample, found = module.weight.detach().clone(), image(dims, 2), []
    with opened() as engine:
        engine.places = {"weight": Place(name="weight", transposed=False)}
        for weight in (own, 2 * own, own):
            engine.refit({"weight": weight})
            found.append(engine.infer(sample=sample)["latent_mean"])
        assert torch.equal(found[0], found[2])
        torch.testing.assert_close(found[1], 2 * found[0])
        engine.places = {"other": Place(name="other", transposed=False)}
        with pytest.raises(InputError, match="no refittable weights 'other'; build with --lora-mode refit"):
            engine.refit({"other": own})


@pytest.mark.parametrize(("kind", "dtype"), [("FLOAT", torch.float32), ("HALF", torch.float16)])
def test_weights_as_tensorrt_itself_reads_them(kind: str, dtype: torch.dtype) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="reads them; pip install 'smooth-rt[tensorrt-rtx]'")
    # As a refit asks: by the type of the weights that stand in the engine.
    prototype = trt.Weights(getattr(trt.DataType, kind))
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T
    given, memory = given_weights(trt, prototype.dtype, tensor.requires_grad_())
    assert (given.dtype, given.size) == (prototype.dtype, 12)
    assert torch.equal(torch.from_numpy(given.numpy()).reshape(3, 4), tensor.detach().to(dtype))
    assert memory.data_ptr() == given.numpy().ctypes.data


def test_kernels_are_kept_from_one_start_to_the_next(
    gpu: Gpu, opened: Any, dims: Dims, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, sample = tmp_path / "compiled" / "key-sm89", image(dims, 1)

    def start() -> int:
        before = gpu.compilations
        with opened(cache=cache) as engine:
            engine.infer(sample=sample)
        return gpu.compilations - before

    with caplog.at_level(logging.INFO, "smooth_rt"):
        assert [start(), start()] == [1, 0]
        (file,) = cache.iterdir()
        whole = file.read_bytes()
        file.write_bytes(b"damaged")
        assert [start(), start()] == [1, 0]
        assert file.read_bytes() == whole
        assert [path.name for path in cache.iterdir()] == [file.name]
        assert caplog.messages == [f"{file}: damaged, or of another version or GPU; its kernels are compiled anew"]
        file.unlink()
        cache.rmdir()
        cache.write_bytes(b"a file where the folder belongs")
        assert [start(), start()] == [1, 1]
        assert "the compiled kernels are not kept" in caplog.messages[-1]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_nothing_is_kept_unasked(backend: str, opened: Any, dims: Dims, tmp_path: Path) -> None:
    cache = tmp_path / "compiled" if backend == "tensorrt" else None
    with opened(backend, cache=cache) as engine:
        engine.infer(sample=image(dims, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]


@pytest.mark.parametrize(
    ("at_hand", "mend"),
    [
        ("sm89", "rebuild it here"),
        ("sm90", "made for sm75, sm80, sm86, sm89, sm120 and newer, and this is sm90; choose another engine"),
    ],
)
def test_an_engine_that_tensorrt_refuses(
    at_hand: str, mend: str, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_engine, "gpu", lambda: at_hand)
    path = tmp_path / "model.engine"
    opened().close()
    path.write_bytes(b"a foreign one")
    with pytest.raises(EngineError, match=r"cannot open it on a GPU \(of another version\); ") as caught:
        opened()
    assert str(caught.value).endswith(mend)
    assert "\n" not in str(caught.value)
