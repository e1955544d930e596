"""ONNX Runtime: runs the exported ONNX graph as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import torch
from torch import Tensor

from engines.base import Engine
from engines.contract import Network
from engines.errors import EngineError, reason
from engines.specialised import Specialised
from engines.variant import Bounds

__all__ = ["OrtEngine"]

_ERRORS_ONLY = 3  # ONNX Runtime's log severity


class OrtEngine(Engine):
    """One ONNX file in ONNX Runtime. `infer` may be called from several threads.

    Bounds of one size get a session of their own in which that size is fixed, opened at the first call of that size;
    every other call runs in a session of free sizes.

    Args:
        network: the contract; the graph's inputs and outputs must bear its names.
        path: the .onnx file; its external data lies beside it.
        bounds: as in `Engine`.
        providers: ONNX Runtime's execution providers, in order of preference.

    Raises:
        EngineError: the file cannot be read, or its names are not the contract's.
    """

    backend: ClassVar[str] = "onnxruntime"

    def __init__(
        self,
        network: Network,
        path: Path,
        bounds: Sequence[Bounds] = (),
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        super().__init__(network, bounds)
        unknown = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if unknown:
            available = ", ".join(onnxruntime.get_available_providers())
            raise EngineError(f"{path}: this onnxruntime has no {unknown[0]}; it has {available}")
        self._path, self._providers = path, list(providers)
        self._replaced: dict[str, Any] = {}
        self._sessions = Specialised(self.bounds, self._open)
        session = self._sessions.any()
        self.check_names(
            [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
        )

    def _open(self, sizes: Mapping[str, int] | None) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if sizes is not None:
            for spec in self.network.inputs:  # whose free axes bear the contract's names
                for name, size in zip(spec.axis_names, spec.shape(sizes), strict=True):
                    if isinstance(name, str):
                        options.add_free_dimension_override_by_name(name, size)
        if self._replaced:
            options.add_external_initializers(list(self._replaced), list(self._replaced.values()))
        try:
            return onnxruntime.InferenceSession(str(self._path), options, providers=self._providers)
        except Exception as error:
            # It says the path again, which may be long, before the cause.
            said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
            cause = RuntimeError(said.removeprefix(f"Load model from {self._path} failed:"))
            raise EngineError(f"{self._path}: onnxruntime cannot open it ({reason(cause)}); rebuild") from error

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        names = [spec.name for spec in self.network.outputs]
        session = self._sessions.of(profile)
        arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    def refit_impl(self, weights: Mapping[str, Tensor]) -> None:
        # A session packs its weights as it opens, so that it takes no others later: it is opened anew, on the same
        # file, with these in the place of the file's.
        self._replaced |= {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(weight.float().numpy()) for name, weight in weights.items()
        }
        self._sessions.clear()
        self._sessions.any()

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()
        super().close()
