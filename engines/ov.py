"""OpenVINO: runs the IR that was converted from the exported ONNX graph, on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import openvino
import torch
from torch import Tensor

from engines import forks, kernels
from engines.base import Engine
from engines.contract import DERIVED, Network
from engines.errors import EngineError, reason
from engines.halves import first_half, shared
from engines.locks import ReadWriteLock
from engines.request_pool import RequestPool
from engines.rounds import Rounds
from engines.specialised import Specialised, one_size
from engines.variant import Bounds

__all__ = ["OvEngine", "core"]

LOG = logging.getLogger("smooth_rt")

# Of free sizes OpenVINO works out every shape and buffer at each call: 29 ms where a form of the call's own size takes
# 19 (a gradient of the default model), 15 and 11 (its UNet), and nothing to speak of where arithmetic is most of the
# time (SD1.5), whose packed weights would be in memory once a form. A form takes as long to compile as the free one.
# Two sizes are what tasks go to and fro between (with guidance and without), and of the three that a build compares
# with torch (`export.graphs.cases`) the third runs in the free form.
OWN_SIZES = 2
OWN_BELOW = 2**30  # bytes of weights
BY_TEXT = "unet_vjp_text"  # the gradients that come in rounds
LOOPED = ("unet", *DERIVED)  # the networks that tasks call again and again


_OPENING = ReadWriteLock()  # of the Core: `cache` alone lets two threads make one each


def core() -> openvino.Core:
    """The one Core of the process, never given up.

    Each Core that loads the CPU plugin puts an alternate signal stack under the calling thread and takes it away again
    when it dies, whatever the order: of two Cores that die in the order in which they came, the second puts the first
    one's stack back, which is unmapped by then, and the next signal, Ctrl-C too, is a segmentation fault (seen with
    openvino 2026.4).
    """
    with _OPENING.write():
        return _core()


@cache
def _core() -> openvino.Core:
    return openvino.Core()


@cache
def _say_no_bf16() -> None:
    LOG.warning("openvino: this processor has no bf16; what is built for it is computed in fp32 here")


class OvEngine(Engine):
    """One IR file compiled for the CPU, for as many threads as torch has then.

    Calls from several threads have an infer request each (`engines.request_pool`).

    Bounds of one size get a compilation of their own in which that size is fixed, made at the first call of that size.
    So do, of a UNet of less than `OWN_BELOW`, the first `OWN_SIZES` sizes that calls come with. Every other call runs
    in one of free sizes. Of a UNet each fixed size has one more, for calls whose halves differ in their text alone, as
    guidance makes them (`engines.halves`); a large UNet has only that of the two which it used last. Gradients by the
    text are in two parts where a size is fixed (`engines.rounds`). Results of one form and another differ by rounding.

    Args:
        network: the contract; the graph's inputs and outputs must bear its names.
        path: the .xml file; its .bin lies beside it.
        bounds: as in `Engine`.
        hint: INFERENCE_PRECISION_HINT, "f32" or "bf16". It is always set: left alone, OpenVINO computes in bf16 by
            itself where the processor has AVX512_BF16, with relative errors around 2e-2. Where the processor has no
            bf16 it computes in fp32, which is logged.

    Raises:
        EngineError: the file cannot be read or compiled, or its names are not the contract's.
    """

    backend: ClassVar[str] = "openvino"

    def __init__(self, network: Network, path: Path, bounds: Sequence[Bounds] = (), hint: str = "f32") -> None:
        super().__init__(network, bounds)
        self.hint = hint
        self._path = path
        self._replaced: dict[str, Any] = {}
        weights = path.with_suffix(".bin")
        self._heavy = weights.exists() and weights.stat().st_size >= OWN_BELOW
        own = OWN_SIZES if network.name in LOOPED and not self._heavy else 0
        self._requests = Specialised(self.bounds, self._open, own)
        self._halved = Specialised(self.bounds, self._open_halved, own) if network.name == "unet" else None
        self._used = self._requests
        if own or (self._halved is not None and self.bounds and all(map(one_size, self.bounds))):
            self._read()  # what to compile, the first call says
        else:
            self._requests.any()

    def _read(self) -> Any:
        """The graph, with the weights that were replaced in it."""
        with self._reading():
            own = kernels.holds(self._path)
        if own:
            kernels.register(core())
        with self._reading():
            model = core().read_model(str(self._path))
            _replace(model, self._replaced)
        self.unchanged()
        self.check_names(
            [_contract_name(port, [spec.name for spec in self.network.inputs]) for port in model.inputs],
            [_contract_name(port, [spec.name for spec in self.network.outputs]) for port in model.outputs],
        )
        return model

    def _open(self, sizes: Mapping[str, int] | None) -> Any:
        model = self._fixed(sizes)
        if sizes is None or self.network.name != BY_TEXT:
            return self._compiled(model)
        with self._reading():
            return RequestPool(Rounds(model, self._compile))

    def _open_halved(self, sizes: Mapping[str, int] | None) -> Any:
        """None for free sizes, which say nothing of what a half is."""
        if sizes is None:
            return None
        half, whole = self._fixed({**sizes, "batch": sizes["batch"] // 2}), self._fixed(sizes)
        with self._reading():
            graph = shared(half, whole)
        return self._compiled(graph)

    def _compiled(self, model: Any) -> RequestPool:
        compiled = self._compile(model)
        with self._reading():
            return RequestPool(compiled)

    def _fixed(self, sizes: Mapping[str, int] | None) -> Any:
        model = self._read()
        if sizes is not None:
            with self._reading():
                model.reshape({spec.name: list(spec.shape(sizes)) for spec in self.network.inputs})
        return model

    def _compile(self, model: Any) -> Any:
        with self._reading():
            settings = {"INFERENCE_PRECISION_HINT": self.hint, "INFERENCE_NUM_THREADS": forks.threads()}
            compiled = core().compile_model(model, "CPU", settings)
        if self.hint == "bf16" and compiled.get_property("INFERENCE_PRECISION_HINT") != openvino.Type.bf16:
            _say_no_bf16()
        return compiled

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with forks.no_fork():
                yield
        except EngineError:  # of this project, in words of its own
            raise
        except Exception as error:
            # OpenVINO puts the place in its own sources first and the cause last.
            raise EngineError(f"{self._path}: openvino cannot open it ({reason(error, -1)}); rebuild") from error

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        requests, given = self._form(profile, inputs)
        arrays = {name: tensor.numpy() for name, tensor in given.items()}
        outputs = requests.infer(arrays, [spec.name for spec in self.network.outputs])
        return {name: torch.from_numpy(output) for name, output in outputs.items()}

    def _form(self, profile: int | None, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """What computes a call, and what it takes of the inputs."""
        sizes = self.network.bind(inputs)
        half = None if self._halved is None else first_half(inputs)
        other = self._halved if half is None else self._requests
        if self._heavy and other is not None:
            other.drop(profile, sizes)
        if self._halved is not None and half is not None:
            request = self._halved.of(profile, sizes)
            if request is not None:
                self._used = self._halved
                return request, half
        self._used = self._requests
        return self._requests.of(profile, sizes), inputs

    def refit_impl(self, weights: Mapping[str, Tensor]) -> None:
        # The compiled graph holds its weights packed: it is compiled anew from the same file with these in it.
        self._replaced |= {name: weight.float().numpy() for name, weight in weights.items()}
        for forms in self._all():  # only what the last call took is sure to be needed again
            forms.renew() if forms is self._used else forms.clear()

    def _all(self) -> list[Specialised]:
        return [forms for forms in (self._requests, self._halved) if forms is not None]

    def after_fork_impl(self) -> None:
        for forms in self._all():
            forms.abandon()

    def close_impl(self) -> None:
        """Free the compiled graphs."""
        for forms in self._all():
            forms.clear()


def _replace(model: Any, weights: Mapping[str, Any]) -> None:
    """Put other constants in the places of those of these names."""
    if not weights:
        return
    from openvino import opset13 as ops

    left = dict(weights)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() in left:
            weight = left.pop(node.get_friendly_name())
            fresh = ops.constant(weight, shared_memory=True)
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(fresh.output(0))
    if left:
        raise ValueError(f"the graph has no constant {sorted(left)[0]!r}")


def _contract_name(port: Any, names: list[str]) -> str:
    """A port may bear further names of tensors that the conversion merged into it."""
    own = port.get_names()
    return next((name for name in names if name in own), str(port.any_name) if own else "(unnamed)")
