"""ONNX Runtime: runs the exported ONNX graph as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import torch
from torch import Tensor

from engines.base import Engine
from engines.contract import Network
from engines.errors import EngineError, reason

__all__ = ["OrtEngine"]

_ERRORS_ONLY = 3  # ONNX Runtime's log severity


class OrtEngine(Engine):
    """One ONNX file in an ONNX Runtime session. `infer` may be called from several threads.

    Args:
        network: the contract; the graph's inputs and outputs must bear its names.
        path: the .onnx file; its external data lies beside it.
        providers: ONNX Runtime's execution providers, in order of preference.

    Raises:
        EngineError: the file cannot be read, or its names are not the contract's.
    """

    backend: ClassVar[str] = "onnxruntime"

    def __init__(self, network: Network, path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        super().__init__(network)
        self._session: Any = None
        unknown = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if unknown:
            available = ", ".join(onnxruntime.get_available_providers())
            raise EngineError(f"{path}: this onnxruntime has no {unknown[0]}; it has {available}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:
            raise EngineError(f"{path}: onnxruntime cannot open it ({reason(error)}); rebuild") from error
        self.check_names(
            [value.name for value in self._session.get_inputs()], [value.name for value in self._session.get_outputs()]
        )

    def infer_impl(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [spec.name for spec in self.network.outputs]
        arrays = self._session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    def close(self) -> None:
        """Free the session."""
        self._session = None
        super().close()
