"""TensorRT and TensorRT for RTX: run a built engine on a CUDA GPU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.base import Engine
from engines.contract import Network
from engines.device import OnDevice
from engines.errors import EngineError, InputError, reason
from engines.trt_log import quiet_log
from engines.variant import Bounds

__all__ = ["TrtEngine", "given_weights"]

_WARM_UP = 2  # runs before a capture: TensorRT allocates and compiles at the first ones


class TrtEngine(Engine):
    """One engine file. `infer` takes turns: threads wait for each other.

    Inputs are copied into buffers on the GPU that stay, bound by address; outputs leave the GPU before the next call
    writes over them. Each shape is captured as a CUDA graph at its first use. One context serves each set of bounds.

    Args:
        network: the contract; the engine's inputs and outputs must bear its names.
        path: of the engine.
        bounds: as in `Engine`, in the order of the engine's optimization profiles.
        backend: "tensorrt" or "tensorrt-rtx".

    Raises:
        EngineError: there is no CUDA GPU, the module does not load, or the file is damaged, of another version of
            TensorRT or for another GPU, or its names are not the contract's.
    """

    # Which of the two is known when one is made.
    backend: str  # type: ignore[misc]

    def __init__(self, network: Network, path: Path, bounds: Sequence[Bounds] = (), backend: str = "tensorrt") -> None:
        super().__init__(network, bounds)
        self.backend = backend
        # Before anything is read: TensorRT's own refusal without a GPU says nothing.
        if not torch.cuda.is_available():
            raise EngineError(f"{path}: {backend} runs on a CUDA GPU and torch finds none; choose another engine")
        try:
            self._trt = importlib.import_module(backend.replace("-", "_"))
        except (ImportError, OSError) as error:
            raise EngineError(
                f"engine {backend!r}: does not load ({reason(error)}); run `pip install {backend}`"
            ) from error
        self._log = quiet_log(self._trt)
        runtime = self._trt.Runtime(self._log)
        try:
            self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        except OSError as error:
            raise EngineError(f"{path}: cannot be read ({error.strerror}); rebuild") from error
        if self._engine is None:
            raise EngineError(
                f"{path}: {backend} {self._trt.__version__} cannot open it on {torch.cuda.get_device_name()} "
                f"({self._log.fault()}); rebuild it here"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        kinds = {name: self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self.check_names([n for n in names if kinds[n]], [n for n in names if not kinds[n]])
        self._device = OnDevice("cuda", self._capture)
        self._contexts: dict[int, Any] = {}

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in self.network.outputs}
        return self._device.run(profile, inputs, dtypes)

    def refit_impl(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights in place; every captured graph is dropped.

        Raises:
            InputError: the engine has no weights of a name.
            EngineError: TensorRT refuses them; the engine is closed, since it is neither the old one nor the new.
        """
        trt = self._trt
        with self._device.turn():
            refitter = trt.Refitter(self._engine, self._log)
            known = set(refitter.get_all_weights())
            unknown = sorted(set(weights) - known)
            if unknown:
                raise InputError(
                    f"{self.network.name}: no refittable weights {unknown[0]!r}; build with --lora-mode refit"
                )
            held = []  # TensorRT reads the memory until the refit is done
            for name, tensor in weights.items():
                given, memory = given_weights(trt, refitter.get_weights_prototype(name).dtype, tensor)
                held.append(memory)
                if not refitter.set_named_weights(name, given):
                    self.close()
                    raise EngineError(
                        f"{self.network.name}: {self.backend} refuses {name} ({self._log.fault()}); rebuild"
                    )
            self._device.clear()
            if not refitter.refit_cuda_engine():
                self.close()
                raise EngineError(f"{self.network.name}: {self.backend} cannot refit ({self._log.fault()}); rebuild")

    def _capture(self, bounds: int | None, inputs: Mapping[str, Tensor]) -> _Run:
        profile, stream = bounds or 0, self._device.stream
        context = self._contexts.get(profile)
        if context is None:
            context = self._contexts[profile] = self._engine.create_execution_context()
            if context is None:
                raise EngineError(f"{self.network.name}: {self.backend} has no memory for it ({self._log.fault()})")
            context.set_optimization_profile_async(profile, stream.cuda_stream)
        buffers = {
            name: torch.empty(tensor.shape, dtype=self._dtype(name), device="cuda") for name, tensor in inputs.items()
        }
        for name, buffer in buffers.items():
            context.set_input_shape(name, tuple(buffer.shape))
        outputs = {
            spec.name: torch.empty(
                tuple(context.get_tensor_shape(spec.name)), dtype=self._dtype(spec.name), device="cuda"
            )
            for spec in self.network.outputs
        }
        return _Run(context, stream, buffers, outputs)

    def _dtype(self, name: str) -> torch.dtype:
        return _TORCH_TYPES[self._engine.get_tensor_dtype(name).name]

    def close(self) -> None:
        """Free the engine and its buffers."""
        self._device.clear()
        self._contexts.clear()
        self._engine = None
        super().close()


_TORCH_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64,
    "INT8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip


def given_weights(trt: Any, dtype: Any, tensor: Tensor) -> tuple[Any, Tensor]:
    """A tensor's values as weights of TensorRT's, and the memory that they are read from, which must stay so long.

    Args:
        trt: the module, tensorrt or tensorrt_rtx.
        dtype: its name for the type that the engine holds them in.
    """
    flat = tensor.detach().to("cpu", _TORCH_TYPES[dtype.name]).contiguous()
    return trt.Weights(dtype, flat.data_ptr(), flat.numel()), flat


class _Run:
    """One shape on one context: its buffers, and the CUDA graph over them, or plain runs where a capture fails."""

    lasting = False  # the graph goes with the buffers

    def __init__(self, context: Any, stream: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._context = context
        self._stream = stream
        for _ in range(_WARM_UP):
            self._plain()
        stream.synchronize()
        self._graph: Any = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._enqueue()
        except RuntimeError:  # some layers cannot be captured
            self._graph = None

    def replay(self) -> None:
        """Run on what the inputs' buffers hold."""
        if self._graph is None:
            self._plain()
        else:
            self._graph.replay()

    def _plain(self) -> None:
        # Another shape may have used the context since.
        for name, buffer in self.inputs.items():
            self._context.set_input_shape(name, tuple(buffer.shape))
        for name, buffer in {**self.inputs, **self.outputs}.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError("TensorRT cannot run the engine; verify the bundle")
