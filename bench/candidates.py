"""What `python -m bench engines` times on a processor, and the graphs that it takes."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engines.contract import Dims, Network
from engines.kernels import REVISION
from engines.ort import RUN_GRAPH
from engines.variant import Bounds, Convolution, Kernels, Precision
from export.graphs import Case, random_inputs
from export.to_inductor import to_inductor
from export.to_int8 import quantise_at
from export.to_onnx import to_onnx
from export.to_openvino import to_openvino, to_winograd
from export.to_ort import to_ort
from smooth_rt.errors import InputError, SmoothRTError

__all__ = ["CANDIDATES", "Candidate", "asked", "graphs"]

Graph = tuple[str, str, str, str]  # backend, precision, convolution, kernels
PLAIN: Graph = ("onnx", "fp32", "direct", "backend")  # of which the others are made


@dataclass(frozen=True)
class Candidate:
    """What is timed: whether for one size alone, whether 3x3 convolutions were rewritten for it, and whose kernels."""

    backend: str
    precision: Precision
    fixed: bool
    convolution: Convolution = "direct"
    kernels: Kernels = "backend"

    @property
    def made_of(self) -> Graph:
        """What its graph is called among those that are made: bf16 on OpenVINO's kernels is a hint for that of fp32."""
        hinted = (self.backend, self.precision, self.kernels) == ("openvino", "bf16", "backend")
        return self.backend, "fp32" if hinted else self.precision, self.convolution, self.kernels


CANDIDATES: dict[str, Candidate] = {
    "onnxruntime fp32": Candidate("onnxruntime", "fp32", fixed=False),
    "onnxruntime int8": Candidate("onnxruntime", "int8", fixed=False),
    "inductor fp32, one size": Candidate("inductor", "fp32", fixed=True),
    "openvino fp32": Candidate("openvino", "fp32", fixed=False),
    "openvino fp32, one size": Candidate("openvino", "fp32", fixed=True),
    "openvino fp32 winograd, one size": Candidate("openvino", "fp32", fixed=True, convolution="winograd"),
    "openvino bf16, one size": Candidate("openvino", "bf16", fixed=True),
    "openvino int8, one size": Candidate("openvino", "int8", fixed=True),
    "openvino fp32 native, one size": Candidate("openvino", "fp32", fixed=True, kernels="native"),
    "openvino fp32 winograd native, one size": Candidate(
        "openvino", "fp32", fixed=True, convolution="winograd", kernels="native"
    ),
    "openvino bf16 native, one size": Candidate("openvino", "bf16", fixed=True, kernels="native"),
    "openvino int8 native, one size": Candidate("openvino", "int8", fixed=True, kernels="native"),
}


def asked(only: str) -> dict[str, Candidate]:
    """The candidates whose names hold one of the comma-separated `only`; all of them if that is empty.

    Raises:
        InputError: a part is in no name.
    """
    parts = [part.strip() for part in only.split(",") if part.strip()]
    if only and not parts:
        raise InputError(f"--only={only}: names nothing; give parts of {'; '.join(CANDIDATES)}")
    for part in parts:
        if not any(part in name for name in CANDIDATES):
            raise InputError(f"--only={only}: {part!r} is in none of {'; '.join(CANDIDATES)}")
    return {name: one for name, one in CANDIDATES.items() if not parts or any(part in name for part in parts)}


def graphs(
    module: nn.Module,
    network: Network,
    dims: Dims,
    work: Path,
    options: argparse.Namespace,
    one_size: Sequence[Bounds],
    say: Callable[[str], None],
) -> tuple[dict[Graph, Path], dict[Graph, str]]:
    """The graph of each candidate on the processor, made in `work` unless it is there from a run before; and why one
    cannot be made here, such as a package that is not installed."""
    faults: dict[Graph, str] = {}
    onnx = work / "onnx" / "model.onnx"
    fixed = {symbol: (size, size) for symbol, (size, *_) in one_size[0].items()}
    int8, side, images = f"int8-{options.rung}", options.side, options.batch_size
    native = f"native-{REVISION}"  # graphs for the kernels of another revision are not taken for these

    def quantise(path: Path, backend: str, native: str | None = None) -> None:
        # Of random weights nothing can be learnt; a few rows set the scales.
        height, width = dims.supported_latent_size
        sizes = {"batch": 1, "height": height, "width": width}
        generator = torch.Generator().manual_seed(1)
        samples = [random_inputs(network, dims, Case(sizes, 1.0), generator) for _ in range(options.samples)]
        quantise_at(options.rung, onnx, path, network, backend, samples, native)

    # What is made of what, in order: where it lies, what is said meanwhile, and how it is made.
    steps: dict[Graph, tuple[Path, str, Callable[[Path], object]]] = {
        PLAIN: (onnx, "export", lambda path: to_onnx(module, network, dims, path)),
        ("onnxruntime", "fp32", "direct", "backend"): (onnx.with_name(RUN_GRAPH), "rewrite", lambda _: to_ort(onnx)),
        ("openvino", "fp32", "direct", "backend"): (
            work / "fp32" / "openvino_model.xml", "convert", lambda path: to_openvino(onnx, path),
        ),
        ("openvino", "fp32", "winograd", "backend"): (
            work / f"winograd-{side}-{images}" / "openvino_model.xml", "rewrite for winograd",
            lambda path: to_winograd(onnx, path, network, one_size),
        ),
        ("openvino", "int8", "direct", "backend"): (
            work / int8 / "openvino_model.xml", "quantise for openvino", lambda path: quantise(path, "openvino"),
        ),
        ("openvino", "fp32", "direct", "native"): (
            work / f"{native}-fp32" / "openvino_model.xml", "rewrite for native kernels",
            lambda path: to_openvino(onnx, path, native="f32"),
        ),
        ("openvino", "fp32", "winograd", "native"): (
            work / f"{native}-winograd-{side}-{images}" / "openvino_model.xml", "rewrite for winograd's native kernels",
            lambda path: to_winograd(onnx, path, network, one_size, native="f32"),
        ),
        ("openvino", "bf16", "direct", "native"): (
            work / f"{native}-bf16" / "openvino_model.xml", "rewrite for native kernels in bf16",
            lambda path: to_openvino(onnx, path, native="bf16"),
        ),
        ("openvino", "int8", "direct", "native"): (
            work / f"{native}-{int8}" / "openvino_model.xml", "quantise for openvino's native kernels",
            lambda path: quantise(path, "openvino", "bf16"),
        ),
        ("onnxruntime", "int8", "direct", "backend"): (
            work / f"{int8}-onnxruntime" / "model.onnx", "quantise for onnxruntime",
            lambda path: quantise(path, "onnxruntime"),
        ),
        ("inductor", "fp32", "direct", "backend"): (
            work / f"inductor-{side}-{images}" / "model.pt2", "compile by inductor, which takes minutes",
            lambda path: to_inductor(module, network, dims, path, symbol_bounds=fixed),
        ),
    }  # fmt: skip
    wanted = {one.made_of for one in asked(options.only).values()} | {PLAIN}
    for graph, (path, words, make) in steps.items():
        if graph in wanted and not path.exists():
            say(words)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                make(path)
            except SmoothRTError as fault:
                if graph == PLAIN:
                    raise
                faults[graph] = str(fault)
            gc.collect()
    found = {graph: path for graph, (path, _, _) in steps.items()}
    rewritten: Graph = ("onnxruntime", "fp32", "direct", "backend")
    if not found[rewritten].exists():  # there was nothing to rewrite
        found[rewritten] = onnx
    return {graph: path for graph, path in found.items() if graph not in faults}, faults
