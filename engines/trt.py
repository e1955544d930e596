"""TensorRT and TensorRT for RTX: run a built engine on a CUDA GPU."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import forks
from engines.base import Engine
from engines.contract import Network
from engines.device import OnDevice
from engines.errors import EngineError, InputError, reason
from engines.rtx import leaves_out
from engines.select import gpu
from engines.trt_cache import Kernels
from engines.trt_log import quiet_log
from engines.variant import Bounds

__all__ = ["TrtEngine", "given_weights"]

LOG = logging.getLogger("smooth_rt")

_WARM_UP = 2  # runs before a capture: TensorRT allocates and compiles at the first ones
_KERNELS = "kernels.bin"


class TrtEngine(Engine):
    """One engine file. `infer` takes turns: threads wait for each other.

    Inputs are copied into buffers on the GPU that stay, bound by address; outputs leave the GPU before the next call
    writes over them. Each shape has a context of its own, which is captured as a CUDA graph at its first use and left
    as it is from then on. As they run in turns, all contexts share the memory that they compute in.

    Args:
        network: the contract; the engine's inputs and outputs must bear its names.
        path: of the engine.
        bounds: as in `Engine`, in the order of the engine's optimization profiles.
        backend: "tensorrt" or "tensorrt-rtx".
        cache: a folder for the kernels that TensorRT for RTX compiles as the engine runs; of this engine and this GPU
            alone. They are read as it opens and written as it closes. None: nothing is kept.

    Raises:
        EngineError: there is no CUDA GPU, the module does not load, or the file is damaged, of another version of
            TensorRT or for another GPU, or its names are not the contract's.
    """

    # Which of the two is known when one is made.
    backend: str  # type: ignore[misc]

    def __init__(
        self,
        network: Network,
        path: Path,
        bounds: Sequence[Bounds] = (),
        backend: str = "tensorrt",
        cache: Path | None = None,
    ) -> None:
        super().__init__(network, bounds)
        self.backend = backend
        # Before anything is read: TensorRT's own refusal without a GPU says nothing.
        if not torch.cuda.is_available():
            raise EngineError(f"{path}: {backend} runs on a CUDA GPU and torch finds none; choose another engine")
        try:
            self._trt = importlib.import_module(backend.replace("-", "_"))
        except (ImportError, OSError) as error:
            raise EngineError(
                f"engine {backend!r}: does not load ({reason(error)}); run `pip install 'smooth-rt[{backend}]'`"
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
                f"({self._log.fault()}); {self._mend()}"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        kinds = {name: self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self.check_names([n for n in names if kinds[n]], [n for n in names if not kinds[n]])
        self._device = OnDevice("cuda", self._prepare)
        self._memory: Tensor | None = None
        self._graphs = True
        self._config = self._engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._kernels: Kernels | None = None
        if backend == "tensorrt-rtx":
            # Otherwise kernels made for the shape would take over at some later run, and a captured graph miss them.
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._config.dynamic_shapes_kernel_specialization_strategy = eager
            if cache is not None:
                self._kernels = Kernels(self._config, cache / _KERNELS)

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

    def _prepare(self, bounds: int | None, inputs: Mapping[str, Tensor]) -> _Run:
        device, context = self._device.device, self._context(bounds or 0)
        # Filled before the first run: whatever lies in fresh memory is no token's number.
        buffers = {name: tensor.to(device, self._dtype(name), copy=True) for name, tensor in inputs.items()}
        if not all(context.set_input_shape(name, tuple(buffer.shape)) for name, buffer in buffers.items()):
            raise EngineError(f"{self.network.name}: {self.backend} takes no such shape ({self._log.fault()}); rebuild")
        outputs = {
            spec.name: torch.empty(
                tuple(context.get_tensor_shape(spec.name)), dtype=self._dtype(spec.name), device=device
            )
            for spec in self.network.outputs
        }
        for name, buffer in {**buffers, **outputs}.items():
            context.set_tensor_address(name, buffer.data_ptr())
        run = _Run(partial(self._enqueue, context), buffers, outputs)
        for _ in range(_WARM_UP):
            run.replay()
        self._device.stream.synchronize()
        if self._graphs:
            try:
                self._check_capturable(context)
                run.capture(self._device.stream)
            except (RuntimeError, EngineError) as error:
                LOG.warning("%s: %s runs without CUDA graphs (%s)", self.network.name, self.backend, reason(error))
                self._graphs = False
        return run

    def _context(self, profile: int) -> Any:
        """A fresh one, in the memory that all of them share."""
        stream = self._device.stream.cuda_stream
        if self._memory is None:  # enough for each profile
            size = max(1, self._engine.device_memory_size_v2)
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._device.device)
        context = self._engine.create_execution_context(self._config)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"{self.network.name}: {self.backend} has no memory for it ({self._log.fault()})")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        return context

    def _check_capturable(self, context: Any) -> None:
        # TensorRT itself has no such question; what cannot be captured fails.
        if self.backend == "tensorrt-rtx" and not context.is_stream_capturable(self._device.stream.cuda_stream):
            raise EngineError("TensorRT for RTX does not let this engine be captured")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream.cuda_stream):
            raise EngineError(
                f"{self.network.name}: {self.backend} cannot run it ({self._log.fault()}); {self._mend()}"
            )

    def _mend(self) -> str:
        """What to do where TensorRT refuses an engine."""
        left_out = leaves_out(gpu() or "") if self.backend == "tensorrt-rtx" else None
        return "rebuild it here" if left_out is None else f"{left_out}; choose another engine"

    def _dtype(self, name: str) -> torch.dtype:
        return _TORCH_TYPES[self._engine.get_tensor_dtype(name).name]

    def after_fork_impl(self) -> str:
        forks.abandon(self.__dict__)
        return forks.NO_CUDA

    def close_impl(self) -> None:
        """Free the engine and its buffers; keep the kernels that were compiled."""
        if self._kernels is not None:
            self._kernels.save()
        self._device.clear()
        self._kernels = self._memory = self._config = self._engine = None


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
    """One shape on a context of its own: its buffers, and a run over them, or the CUDA graph that it became."""

    lasting = False  # the context and the graph go with the buffers

    def __init__(self, run: Callable[[], None], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._run = run  # holds the context, which a graph needs as well
        self._replay = run

    def capture(self, stream: Any) -> None:
        """Replay a CUDA graph from now on; where that fails the run stays as it is."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._run()
        self._replay = graph.replay

    def replay(self) -> None:
        """Run on what the inputs' buffers hold."""
        self._replay()
