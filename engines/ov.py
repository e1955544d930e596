"""OpenVINO: runs the IR that was converted from the exported ONNX graph, on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import openvino
import torch
from torch import Tensor

from engines.base import Engine
from engines.contract import Network
from engines.errors import EngineError, reason

__all__ = ["OvEngine", "core"]


@cache
def core() -> openvino.Core:
    """The one Core of the process, never given up.

    Each Core that loads the CPU plugin puts an alternate signal stack under the calling thread and takes it away again
    when it dies, whatever the order: of two Cores that die in the order in which they came, the second puts the first
    one's stack back, which is unmapped by then, and the next signal, Ctrl-C too, is a segmentation fault (seen with
    openvino 2026.4).
    """
    return openvino.Core()


class OvEngine(Engine):
    """One IR file compiled for the CPU. `infer` serves one thread at a time.

    Args:
        network: the contract; the graph's inputs and outputs must bear its names.
        path: the .xml file; its .bin lies beside it.
        hint: INFERENCE_PRECISION_HINT, "f32" or "bf16". It is always set: left alone, OpenVINO computes in bf16 by
            itself where the processor has AVX512_BF16, with relative errors around 2e-2.

    Raises:
        EngineError: the file cannot be read or compiled, or its names are not the contract's.
    """

    backend: ClassVar[str] = "openvino"

    def __init__(self, network: Network, path: Path, hint: str = "f32") -> None:
        super().__init__(network)
        self._request: Any = None
        self.hint = hint
        try:
            compiled = core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": hint})
        except Exception as error:
            # OpenVINO puts the place in its own sources first and the cause last.
            raise EngineError(f"{path}: openvino cannot open it ({reason(error, -1)}); rebuild") from error
        self.check_names(
            [_contract_name(port, [spec.name for spec in network.inputs]) for port in compiled.inputs],
            [_contract_name(port, [spec.name for spec in network.outputs]) for port in compiled.outputs],
        )
        self._request = compiled.create_infer_request()

    def infer_impl(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        # Outputs are copied out of the request, which writes over its own buffers at the next call.
        results = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        return {spec.name: torch.from_numpy(results[spec.name]) for spec in self.network.outputs}

    def close(self) -> None:
        """Free the compiled graph."""
        self._request = None
        super().close()


def _contract_name(port: Any, names: list[str]) -> str:
    """A port may bear further names of tensors that the conversion merged into it."""
    own = port.get_names()
    return next((name for name in names if name in own), str(port.any_name) if own else "(unnamed)")
