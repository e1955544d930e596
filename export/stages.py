"""From a torch module to the graph of one variant: which stages it takes, and what they share on the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from engines.contract import NETWORKS, WRT, Dims, Network, NetworkName
from engines.errors import EngineError, InputError
from engines.inductor import package_of
from engines.recipes import RECIPES, native_hint
from engines.select import ONNX, TENSORRT, architecture, backend_version, gpu
from engines.variant import LORA_MODES, Bounds, Order, Precision, Variant
from export.places import find_places
from export.to_int8 import Calibration
from export.to_onnx import to_onnx
from export.to_ort import REWRITTEN, to_ort

__all__ = ["Graph", "Stages", "cannot_build"]

Notes = dict[str, int | str | list[str]]


@dataclass(frozen=True)
class Graph:
    """A finished graph, its weights beside it, and what its build noted. `plain` is the one that others open, where
    that is another one."""

    path: Path
    notes: Notes = field(default_factory=dict)
    plain: Path | None = None


class Stages:
    """The stages of a build. A graph that several variants come from is made once and kept until `forget`.

    Args:
        folder: for graphs on the way.
        dims: the model's sizes.
        calibration: real runs of the model; int8 alone asks for them.
        begin: called with what is being done, the kind of step that it is, and the network.
        detail: called with what goes on within what was begun, and how much of that is done.
        timing_caches: a folder that keeps TensorRT's from build to build, one for each version and architecture.
        ready: a bundle of the same source. Graphs in fp32 that were exported and verified before are taken from it.
    """

    def __init__(
        self,
        folder: Path,
        dims: Dims,
        calibration: Calibration | None,
        begin: Callable[[str, str, NetworkName], None],
        ready: Path | None = None,
        detail: Callable[[str, float], None] = lambda *_: None,
        timing_caches: Path | None = None,
    ) -> None:
        self._folder = folder
        self._ready = ready
        self._islands: dict[Path, list[str]] = {}
        self._dims = dims
        self._real_runs = calibration
        self._begin = begin
        self._detail = detail
        self._timing_caches = timing_caches

    @staticmethod
    def plan(orders: Sequence[Order], network: NetworkName) -> list[str]:
        """The kinds of the steps that a network's build begins."""
        orders = [order for order in orders if network in order.networks]
        wanted = [(o.variant, RECIPES[o.variant.backend][o.variant.precision][network].precision) for o in orders]
        graphs = {(variant.takes_strength(network), _exported(variant, precision)) for variant, precision in wanted}
        exported = [precision for _, precision in graphs if precision is not None]
        conversions = [found[1] for one in wanted if (found := _conversion(*one)) is not None]
        return [*(_export_kind(precision, network) for precision in exported), *conversions]

    def build(
        self,
        network: Network,
        module: nn.Module,
        variant: Variant,
        precision: Precision,
        bounds: Sequence[Bounds],
        folder: Path,
        replaceable: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Graph:
        """Build the graph of `network` for `variant`, itself in `precision`, into `folder`.

        Args:
            replaceable: by the torch parameter's name, the weights that are replaced at run time. A backend that has to
                know them at the build is told.

        Raises:
            EngineError: the network cannot be exported or converted.
            OSError: the files cannot be written.
        """
        exported = _exported(variant, precision)
        onnx = None if exported is None else self._onnx(network, module, exported)
        conversion = _conversion(variant, precision)
        if conversion is not None:
            what, kind = conversion
            size = "" if onnx is None else f" ({_layers(onnx):,} layers)"
            self._begin(f"{network.name}: {what} {variant.name}{size}", kind, network.name)
        if variant.backend in ONNX and onnx is not None:
            take = _take if variant.backend == "onnxruntime" else shutil.copyfile
            graph = self._as_onnx(network, precision, onnx, folder / "model.onnx", take)
            if precision in REWRITTEN.get(variant.backend, ()) and network.name in NETWORKS:
                # Weights that are put in later lie in one graph.
                path, hits = to_ort(graph.path, variant.backend, apart=variant.lora_mode != "refit")
                return Graph(path, {**graph.notes, **hits}, None if path == graph.path else graph.path)
            return graph
        if variant.backend == "openvino" and onnx is not None:
            return self._as_openvino(network, variant, precision, onnx, bounds, folder / "openvino_model.xml")
        if variant.backend == "inductor":
            return self._as_inductor(network, module, variant, precision, bounds, folder / "model.pt2")
        if variant.backend in TENSORRT and onnx is not None:
            return self._as_tensorrt(network, variant, precision, onnx, bounds, folder / "model.engine", replaceable)
        raise EngineError(f"engine {variant.backend!r}: this version does not build it")

    def exported(self, network: Network, precision: Precision) -> Path:
        """The ONNX graph that the network's graph in that precision came from. Variants in which a network has the same
        inputs share it."""
        inputs = "-".join(spec.name for spec in network.inputs)
        return self._folder / network.name / inputs / ("fp32" if precision == "int8" else precision) / "model.onnx"

    def forget(self) -> None:
        """Remove the graphs on the way; those of the next network follow."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _onnx(self, network: Network, module: nn.Module, precision: Precision) -> Path:
        path = self.exported(network, precision)
        if not path.exists():
            what = f"{network.name}: export" + ("" if precision == "fp32" else f" in {precision}")
            self._begin(what, _export_kind(precision, network.name), network.name)
            ready = self._ready_made(network)
            if precision == "fp32" and ready is not None:
                path.parent.mkdir(parents=True)
                for part in ready.glob("model.onnx*"):
                    _take(part.resolve(), path.parent / part.name)
            elif precision == "fp32":
                to_onnx(module, network, self._dims, path)
            else:
                to_onnx(self._half(network, module, precision), network, self._dims, path)
        return path

    def _half(self, network: Network, module: nn.Module, precision: Precision) -> nn.Module:
        """The module in half precision; its islands are kept for the manifest."""
        from export.half import in_half

        half, self._islands[self.exported(network, precision)] = in_half(module, network, self._dims, precision)
        return half

    def _noted(self, network: Network, precision: Precision) -> Notes:
        return {} if precision == "fp32" else {"fp32_islands": self._islands[self.exported(network, precision)]}

    def _ready_made(self, network: Network) -> Path | None:
        """Where the network's graph in fp32 lies: in a variant that is the exported graphs as they are."""
        if self._ready is None:
            return None
        for mode in LORA_MODES:
            plain = Variant(backend="onnxruntime", precision="fp32", lora_mode=mode, architecture=architecture())
            folder = self._ready / plain.name / network.name
            if plain.network(network.name, self._dims) == network and folder.is_dir():
                return folder
        return None

    def _as_onnx(
        self, network: Network, precision: Precision, onnx: Path, path: Path, take: Callable[[Path, Path], Any]
    ) -> Graph:
        if precision == "int8":
            from export.to_int8 import quantise_onnx

            return Graph(path, quantise_onnx(onnx, path, network, self._real(), self._within))
        # The CPU's variant and a GPU's have one graph; weights of several links onnx would refuse.
        for part in onnx.parent.iterdir():
            take(part, path.parent / part.name)
        return Graph(path, self._noted(network, precision))

    def _as_openvino(
        self,
        network: Network,
        variant: Variant,
        precision: Precision,
        onnx: Path,
        bounds: Sequence[Bounds],
        path: Path,
    ) -> Graph:
        from export.to_openvino import to_openvino, to_winograd  # a build for another backend needs no openvino

        native = native_hint(variant, network.name)
        if precision == "int8":
            from export.to_int8 import quantise_openvino

            return Graph(path, quantise_openvino(onnx, path, network, self._real(), self._within, native))
        if variant.convolution == "winograd":
            return Graph(path, {**to_winograd(onnx, path, network, bounds, native)})
        refit = variant.lora_mode == "refit"
        return Graph(path, {**to_openvino(onnx, path, compress=precision == "fp16", native=native, whole=refit)})

    def _as_tensorrt(
        self,
        network: Network,
        variant: Variant,
        precision: Precision,
        onnx: Path,
        bounds: Sequence[Bounds],
        path: Path,
        replaceable: Mapping[str, Tensor],
    ) -> Graph:
        from export.to_tensorrt import to_tensorrt

        facts = to_tensorrt(
            onnx,
            path,
            network,
            bounds,
            backend=variant.backend,
            architecture=variant.architecture,
            refittable=[place.name for place in find_places(path, onnx, variant.backend, replaceable).values()],
            timing_cache=None if self._timing_caches is None else self._timing_caches / _cache_name(variant),
            # A phase says nothing of the whole build.
            progress=lambda phase, done, total: self._detail(f"{network.name}: {phase} {done}/{total}", 0.0),
        )
        return Graph(path, facts.notes() | self._noted(network, precision))

    def _as_inductor(
        self,
        network: Network,
        module: nn.Module,
        variant: Variant,
        precision: Precision,
        bounds: Sequence[Bounds],
        path: Path,
    ) -> Graph:
        from export.to_inductor import to_inductor

        device = "cpu" if variant.architecture.startswith("cpu-") else "cuda"
        if precision != "fp32":
            module = self._half(network, module, precision)
        for index, one in enumerate(bounds):
            ends = {symbol: (least, most) for symbol, (least, _, most) in one.items()}
            package = package_of(path, index)
            if index:
                self._detail(
                    f"{network.name}: compile {variant.name}, size {index + 1} of {len(bounds)}", index / len(bounds)
                )
            to_inductor(module, network, self._dims, package, precision=precision, device=device, symbol_bounds=ends)
        return Graph(path, {"packages": len(bounds), **self._noted(network, precision)})

    def _within(self, what: str) -> None:
        self._detail(what, 0.0)  # of which nobody knows how much it is

    def _real(self) -> Calibration:
        if self._real_runs is None:
            raise InputError("precision 'int8': needs real runs of the model to be calibrated on; none were given")
        return self._real_runs


def cannot_build(variant: Variant) -> str | None:
    """None if the backend's tools for building `variant` are here, else one line: what is missing, what mends it.

    Raises:
        InputError: the backend builds nothing for the variant's architecture.
        EngineError: this project's kernels are asked for and cannot be compiled here.
    """
    if variant.kernels == "native":
        from engines import kernels

        kernels.library()
    if variant.backend == "inductor":
        from export.to_inductor import cannot_build as cannot_compile

        return cannot_compile("cpu" if variant.architecture.startswith("cpu-") else "cuda")
    if variant.backend == "tensorrt" and gpu() is None:
        return "engines are built on the GPU that runs them, and torch finds none here; tensorrt-rtx builds without one"
    if variant.backend in TENSORRT and variant.lora_mode == "refit" and gpu() is None:
        return (
            "weights are made replaceable on the GPU alone (without one its compiler fails), and torch finds none "
            "here; build with --lora-mode fused or runtime"
        )
    if variant.backend == "tensorrt-rtx":
        from export.to_tensorrt import capabilities

        capabilities(variant.backend, variant.architecture)
    return None


def _cache_name(variant: Variant) -> str:
    return f"{variant.backend}-{backend_version(variant.backend)}-{variant.architecture}.cache"


def _exported(variant: Variant, precision: Precision) -> Precision | None:
    """The precision of the ONNX graph that a network comes from; None for one that is built without ONNX."""
    if variant.backend == "inductor":
        return None
    # OpenVINO rounds fp32 weights itself, and quantising starts from what is exact.
    return "fp32" if variant.backend == "openvino" or precision == "int8" else precision


def _export_kind(precision: Precision, network: NetworkName) -> str:
    if network in WRT:
        return "export gradient"
    return "export" if precision == "fp32" else "export in half"


def _conversion(variant: Variant, precision: Precision) -> tuple[str, str] | None:
    """What is done to a graph after its export, for people, and the kind of step that it is."""
    if precision == "int8":
        return "quantise", "int8"
    if variant.backend == "inductor":
        return "compile", "inductor"
    if variant.backend in ONNX:
        return None
    return "convert to", "tensorrt" if variant.backend in TENSORRT else variant.backend


def _layers(onnx: Path) -> int:
    import onnx as onnx_library

    return len(onnx_library.load(str(onnx), load_external_data=False).graph.node)


def _take(file: Path, place: Path) -> None:
    """Put a finished file where it belongs; another variant may need it, too."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
