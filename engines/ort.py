"""ONNX Runtime: runs the exported ONNX graph as it is, on the processor or, through IO binding, on a GPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from engines import forks
from engines.base import Engine
from engines.contract import Network
from engines.device import OnDevice
from engines.errors import EngineError, InputError, reason
from engines.locks import ReadWriteLock
from engines.providers import BY_BACKEND, PROVIDERS, lacking, open_session, settings
from engines.specialised import Specialised, one_size
from engines.text_part import TextPart
from engines.variant import Bounds

__all__ = ["RUN_GRAPH", "OrtEngine", "plain_graph", "text_graph"]

LOG = logging.getLogger("smooth_rt")

_FATAL = 4  # ONNX Runtime's log severity: what it raises, it would print as well
RUN_GRAPH = "onnxruntime.onnx"  # in the place of the plain graph, where rewrites make a faster one


def plain_graph(path: Path) -> Path | None:
    """The plain graph, which others open, beside the rewritten one at `path`; None where `path` is no rewritten one."""
    return path.with_name("model.onnx") if path.name == RUN_GRAPH else None


def text_graph(path: Path) -> Path:
    """Where what the graph at `path` takes of the text is computed, if that has a graph of its own."""
    return path.with_name(f"{path.stem}-text.onnx")


class OrtEngine(Engine):
    """One ONNX file in ONNX Runtime. Calls from several threads take turns in its session.

    Bounds of one size get a session of their own in which that size is fixed, opened at the first call of that size;
    every other call runs in a session of free sizes. On the processor it takes as many threads as torch has when it is
    opened. On a device inputs and outputs are bound by address to buffers
    that stay, all on one stream, and a session of one size is captured as a CUDA graph where the graph allows it.

    Args:
        network: the contract; the graph's inputs and outputs must bear its names.
        path: the .onnx file; its external data lies beside it. On the processor a file at `text_graph(path)` may
            compute from the text what the graph takes in its place; it runs when the text changes.
        bounds: as in `Engine`.
        provider: of `providers.PROVIDERS`.
        cache: a folder for what TensorRT compiles as a session opens; of this graph and these weights alone. None:
            nothing is kept.
        binding: whether inputs and outputs are bound to buffers; None: where the provider runs on a device.

    Raises:
        InputError: there is no such provider.
        EngineError: the file cannot be read, its names are not the contract's, or the provider does not start.
    """

    # Which of them is known when one is made.
    backend: str  # type: ignore[misc]

    def __init__(
        self,
        network: Network,
        path: Path,
        bounds: Sequence[Bounds] = (),
        provider: str = "cpu",
        cache: Path | None = None,
        binding: bool | None = None,
    ) -> None:
        super().__init__(network, bounds)
        if provider not in PROVIDERS:
            raise InputError(f"provider={provider}: unknown; choose from {', '.join(PROVIDERS)}")
        self.backend = next(name for name, own in BY_BACKEND.items() if own == provider)
        device = PROVIDERS[provider].device
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(f"{path}: {self.backend} runs on a CUDA GPU and torch finds none; choose another engine")
        fault = lacking(provider)
        if fault is not None:
            raise EngineError(f"{path}: {fault}")
        bound = device != "cpu" if binding is None else binding
        self._path, self._provider = path, provider
        self._cache = cache if provider.startswith("tensorrt") else None
        self._device = OnDevice(device, self._bound) if bound else None
        self._graphs = PROVIDERS[provider].graphs is not None
        self._replaced: dict[str, Any] = {}
        # A session's threads serve one call at a time: two at once took 5 to 13 % longer than one after the other.
        self._turn = ReadWriteLock()
        self._sessions = Specialised(self.bounds, self._open)
        session = self._sessions.any()
        taken = {value.name for value in session.get_inputs()}
        self._text: TextPart | None = None
        if not bound and text_graph(path).exists():
            self._text = TextPart(Specialised(self.bounds, self._open_text), taken)
            taken = taken - self._text.outputs | self._text.inputs
        self.check_names(taken, [value.name for value in session.get_outputs()])

    def _open_text(self, sizes: Mapping[str, int] | None) -> Any:
        return self._session(sizes, graph=False, path=text_graph(self._path))

    def _open(self, sizes: Mapping[str, int] | None) -> Any:
        if sizes is None or not self._graphs:
            return self._session(sizes, graph=False)
        try:
            return self._session(sizes, graph=True)
        except EngineError as error:
            session = self._session(sizes, graph=False)  # which fails, too, where the graph was not the cause
            self._without_graphs(error)
            return session

    def _session(self, sizes: Mapping[str, int] | None, graph: bool, path: Path | None = None) -> Any:
        path = path or self._path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        # As many threads as torch has. By itself ONNX Runtime takes a thread a core and binds each to its own, and the
        # default model's gradient took 1.2 to 1.5 times as long on the two cores of a virtual machine.
        options.intra_op_num_threads = forks.threads()
        # Each session has threads of its own, which would go on spinning for a while beside those of the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if sizes is not None:
            for spec in self.network.inputs:  # whose free axes bear the contract's names
                for name, size in zip(spec.axis_names, spec.shape(sizes), strict=True):
                    if isinstance(name, str):
                        options.add_free_dimension_override_by_name(name, size)
        if self._replaced:
            options.add_external_initializers(list(self._replaced), list(self._replaced.values()))
        try:
            session = open_session(self._provider, path, options, self._settings(sizes is not None, graph))
        except EngineError as error:
            raise EngineError(f"{path}: {error}") from error
        except Exception as error:
            # It says the path again, which may be long, before the cause.
            said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
            cause = RuntimeError(said.removeprefix(f"Load model from {path} failed:"))
            raise EngineError(f"{path}: {self.backend} cannot open it ({reason(cause)}); rebuild") from error
        self.unchanged()
        return session

    def _settings(self, fixed: bool, graph: bool) -> dict[str, str]:
        if self._device is None or self._device.stream is None:
            return {}
        # What was compiled holds the weights of its day.
        cache = None if self._replaced else self._cache
        if cache is not None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                LOG.info("%s: compiled anew at each start: %s (%s)", self.network.name, cache, error.strerror)
                cache = None
        return settings(
            self._provider,
            self.network,
            self.bounds,
            stream=self._device.stream.cuda_stream,
            device=torch.cuda.current_device(),
            fixed=fixed,
            graph=graph,
            cache=cache,
        )

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        if self._device is not None:
            dtypes = {spec.name: getattr(torch, spec.dtype) for spec in self.network.outputs}
            return self._device.run(profile, inputs, dtypes)
        names = [spec.name for spec in self.network.outputs]
        session = self._sessions.of(profile)
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        if self._text is not None:
            given = self._text.put(given, profile)
        with self._turn.write():
            arrays = session.run(names, given)
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    def _bound(self, profile: int | None, inputs: Mapping[str, Tensor]) -> _Bound:
        assert self._device is not None
        fixed = profile is not None and one_size(self.bounds[profile]) is not None
        bound = _Bound(self._sessions.of(profile), self._device.device, self.network, inputs, lasting=fixed)
        if fixed and self._graphs:
            try:
                bound.replay()  # captures it
            except Exception as error:
                self._without_graphs(error)
                self._sessions.clear()
                return self._bound(profile, inputs)
        return bound

    def _without_graphs(self, error: Exception) -> None:
        LOG.warning("%s: %s runs without CUDA graphs (%s)", self.network.name, self.backend, reason(error))
        self._graphs = False

    def refit_impl(self, weights: Mapping[str, Tensor]) -> None:
        # A session packs its weights as it opens, so that it takes no others later: it is opened anew, on the same
        # file, with these in the place of the file's.
        self._replaced |= {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(weight.float().numpy()) for name, weight in weights.items()
        }
        self._clear()
        self._sessions.any()

    def _clear(self) -> None:
        if self._device is not None:  # bindings go before their sessions
            self._device.clear()
        if self._text is not None:
            self._text.clear()
        self._sessions.clear()

    def after_fork_impl(self) -> str | None:
        if self._device is not None:
            forks.abandon(self._device)
            if self._device.stream is not None:
                return forks.NO_CUDA
            self._device = OnDevice(self._device.device, self._bound)
        self._sessions.abandon()
        if self._text is not None:
            self._text.abandon()
        return None

    def close_impl(self) -> None:
        """Free the sessions and their buffers."""
        self._clear()


class _Bound:
    """One shape in one session: buffers on the device, bound by address. `lasting` where the session runs no other."""

    def __init__(
        self, session: Any, device: str, network: Network, inputs: Mapping[str, Tensor], lasting: bool
    ) -> None:
        self.lasting = lasting
        sizes = network.bind(inputs)
        self.inputs = {name: torch.zeros_like(tensor, device=device) for name, tensor in inputs.items()}
        self.outputs = {
            spec.name: torch.empty(spec.shape(sizes), dtype=getattr(torch, spec.dtype), device=device)
            for spec in network.outputs
        }
        self._session, self._binding = session, session.io_binding()
        index = torch.cuda.current_device() if device == "cuda" else 0
        for specs, buffers, bind in (
            (network.inputs, self.inputs, self._binding.bind_input),
            (network.outputs, self.outputs, self._binding.bind_output),
        ):
            for spec in specs:
                buffer = buffers[spec.name]
                bind(spec.name, device, index, getattr(np, spec.dtype), tuple(buffer.shape), buffer.data_ptr())

    def replay(self) -> None:
        """Run on what the inputs' buffers hold."""
        self._session.run_with_iobinding(self._binding)
