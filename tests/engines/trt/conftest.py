"""A module that stands for TensorRT's, and an engine that is opened on it."""

from __future__ import annotations

import contextlib
import ctypes
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
from engines.contract import Network
from engines.device import OnDevice
from engines.trt import TrtEngine
from engines.variant import Bounds

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
