"""What `python -m bench gpu` times on a GPU: the modules, the graphs that they become, and opening those."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import Dims, Network, NetworkName, contract
from engines.recipes import RECIPES
from engines.select import TENSORRT, availability, open_engine, target
from engines.variant import Bounds, Precision
from export.half import DTYPES, Cast, converted, in_half
from export.to_onnx import to_onnx
from export.to_ort import REWRITTEN, to_ort

if TYPE_CHECKING:
    from smooth_rt.model import PipelineConfig

__all__ = ["CANDIDATES", "NETWORKS", "PEERS", "Eager", "Subject", "built", "opened", "runnable"]

NETWORKS: tuple[NetworkName, ...] = ("unet", "vae_decoder")  # the text encoder is a hundredth of one step
PEERS: dict[str, Precision] = {"eager fp32": "fp32", "eager fp16": "fp16"}
# What is timed on a GPU: the name, the backend, the precision.
CANDIDATES: dict[str, tuple[str, Precision]] = {
    "onnxruntime-cuda fp32": ("onnxruntime-cuda", "fp32"),
    "onnxruntime-cuda fp16": ("onnxruntime-cuda", "fp16"),
    "onnxruntime-tensorrt fp16": ("onnxruntime-tensorrt", "fp16"),
    "inductor fp16": ("inductor", "fp16"),
    "inductor bf16": ("inductor", "bf16"),
    "tensorrt fp16": ("tensorrt", "fp16"),
    "tensorrt-rtx fp16": ("tensorrt-rtx", "fp16"),
}


@dataclass(frozen=True)
class Subject:
    """The modules of NETWORKS in fp32 on the CPU, the model's sizes, and its sampling where it is to be sampled."""

    modules: Mapping[NetworkName, nn.Module]
    dims: Dims
    config: PipelineConfig | None


class Eager(Engine):
    """Torch modules on a device, as diffusers runs them."""

    backend: ClassVar[str] = "eager"

    def __init__(self, network: Network, module: nn.Module, precision: Precision, device: str) -> None:
        super().__init__(network)
        dtype, self._device = DTYPES[precision], device
        self._module = Cast(converted(module, dtype), dtype).eval().to(device)

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:  # noqa: ARG002
        with torch.no_grad():
            outputs = self._module(*(inputs[spec.name].to(self._device) for spec in self.network.inputs))
        return {spec.name: output.cpu() for spec, output in zip(self.network.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Free the copy."""
        self._module = cast("Cast", nn.Identity())
        super().close()


def runnable(candidates: Mapping[str, tuple[str, Precision]]) -> tuple[dict[str, tuple[str, Precision]], list[str]]:
    """Those that can run here, and a line for each of the others."""
    faults = {name: availability(backend) for name, (backend, _) in candidates.items()}
    kept = {name: candidates[name] for name, fault in faults.items() if fault is None}
    return kept, [f"{name} is left out: {fault}" for name, fault in faults.items() if fault is not None]


def _bounds(network: Network, subject: Subject, options: argparse.Namespace) -> list[Bounds]:
    """Of one size for each batch: both halves of guidance go through the UNet together."""
    side, halves = options.side // subject.dims.vae_factor, 2 if network.name == "unet" else 1
    return [
        {symbol: (halves * batch,) * 3 if symbol == "batch" else (side,) * 3 for symbol in network.symbols}
        for batch in options.batch_sizes
    ]


def built(
    backend: str, precision: Precision, subject: Subject, name: NetworkName, options: argparse.Namespace, work: Path
) -> Path:
    """The graph of a network, made in `work` unless it is there from a run before.

    Raises:
        SmoothRTError: the backend cannot build it here.
    """
    network, module = contract(name, subject.dims), subject.modules[name]
    bounds = _bounds(network, subject, options)
    if backend == "inductor":
        from engines.inductor import package_of
        from export.to_inductor import to_inductor

        paths = [package_of(work / f"{name}.pt2", index) for index in range(len(bounds))]
        half = module if all(path.exists() for path in paths) else _in(precision, module, network, subject)
        for path, one in zip(paths, bounds, strict=True):
            ends = {symbol: (least, most) for symbol, (least, _, most) in one.items()}
            if not path.exists():
                to_inductor(half, network, subject.dims, path, precision=precision, device="cuda", symbol_bounds=ends)
        return paths[0]
    onnx = work.parent / f"onnx-{precision}" / name / "model.onnx"
    if not onnx.exists():
        to_onnx(_in(precision, module, network, subject), network, subject.dims, onnx)
    if backend not in TENSORRT:
        return to_ort(onnx, backend)[0] if precision in REWRITTEN.get(backend, ()) else onnx
    from export.to_tensorrt import to_tensorrt

    path = work / f"{name}.engine"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        to_tensorrt(onnx, path, network, bounds, backend=backend, architecture=target(backend))
    return path


def _in(precision: Precision, module: nn.Module, network: Network, subject: Subject) -> nn.Module:
    return module if precision == "fp32" else in_half(module, network, subject.dims, precision)[0]


def opened(
    backend: str, precision: Precision, subject: Subject, name: NetworkName, graph: Path, options: argparse.Namespace
) -> Engine:
    network = contract(name, subject.dims)
    hint = RECIPES[backend][precision][name].hint
    return open_engine(backend, network, graph, hint, _bounds(network, subject, options))
