"""The stages in order: ONNX, OpenVINO, verification, manifest. A bundle appears whole and verified, or not at all."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from engines.bundle import MANIFEST, Bundle
from engines.contract import NETWORKS, Dims, Network, NetworkName, contract
from engines.errors import EngineError, InputError
from engines.manifest import EngineRecord, FileRecord, Manifest, Parity, Source, digest_file
from engines.select import HINTS, architecture, availability, backend_version, open_engine
from engines.staging import staging
from export.graphs import profile
from export.to_onnx import to_onnx
from export.verify import TOLERANCES, verify

__all__ = ["Progress", "build_bundle"]

# Called with what is being done, how many steps are done and how many there are.
Progress = Callable[[str, int, int], None]

VERIFY_SEED = 20231207  # of the inputs of verification, unlike the example inputs' seed
_GRAPH_SHARE = 1.1  # graph files and rounding, over the weights' bytes
_MADE_WITH = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "diffusers", "transformers")


def build_bundle(
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    source: Source,
    backends: Sequence[str],
    target: Path,
    write_config: Callable[[Path], None],
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Bundle:
    """Export every network, convert, verify every output on every backend, and publish the bundle at `target`.

    Args:
        networks: `engines.eager.torch_networks` of the model, fused, fp32, on the CPU.
        dims: the model's sizes.
        source: where the weights came from, for the manifest and the key.
        backends: of "onnxruntime", "openvino"; at least one.
        target: the bundle's folder; a bundle that stands there is replaced at the end, and kept if the build fails.
        write_config: writes what the pipeline needs into the folder it is given.
        precision: of the graphs; "fp32".
        progress: called before each step.

    Raises:
        InputError: no backend, an unknown precision, or networks that are not the contract's, or not fp32.
        EngineError: a backend is unknown or cannot run here, or a network cannot be exported or converted.
        ParityError: a graph differs from its torch module; nothing is published.
        ModelError: a torch module gives numbers that are not finite.
        BundleError: `target` cannot be written, is somebody's folder, or the disk is full.
    """
    backends = tuple(dict.fromkeys(backends))
    _check(networks, backends, precision)
    steps = _Steps(progress, 2 + len(NETWORKS) * (1 + ("openvino" in backends) + len(backends)))
    with staging(target, needed=_needed(networks, backends)) as folder:
        build = _Build(dims, source, backends, precision, folder, steps)
        steps.begin("configuration")
        (folder / "config").mkdir()
        write_config(folder / "config")
        records: list[EngineRecord] = []
        for name in NETWORKS:
            records += build.network(contract(name, dims), networks[name])
        steps.begin("manifest")
        manifest = Manifest(
            dims=dims,
            source=source,
            precision=precision,
            engines=records,
            files=[build.file(path) for path in sorted(folder.rglob("*")) if path.is_file()],
            made_with=_versions(),
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    steps.begin("done")
    return Bundle.open(target, verify=False)


class _Steps:
    """Counts the build's steps for the progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = -1

    def begin(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def _check(networks: dict[NetworkName, nn.Module], backends: Sequence[str], precision: str) -> None:
    if precision not in TOLERANCES:
        raise InputError(f"precision {precision!r}: unknown; choose from {', '.join(TOLERANCES)}")
    if not backends:
        raise InputError("backends: none given; name onnxruntime, openvino or both")
    for backend in backends:
        reason = availability(backend)
        if reason is not None:
            raise EngineError(f"engine {backend!r}: {reason}")
        if backend == "eager":
            raise InputError("backends: eager runs the torch modules and is not built; name onnxruntime or openvino")
    if set(networks) != set(NETWORKS):
        raise InputError(f"networks: {', '.join(networks)} given; a bundle holds {', '.join(NETWORKS)}")
    for name, module in networks.items():
        for key, parameter in module.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_cpu:
                raise InputError(
                    f"{name}: {key} is {parameter.dtype} on {parameter.device}; load it in float32 on the CPU"
                )


def _needed(networks: dict[NetworkName, nn.Module], backends: Sequence[str]) -> int:
    """Bytes on disk at the fullest moment: the weights once a backend, and once as ONNX on the way to OpenVINO."""
    tensors = {id(t): t for module in networks.values() for t in (*module.parameters(), *module.buffers())}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return int(_GRAPH_SHARE * weights * len({*backends, "onnxruntime"}))


@dataclass
class _Build:
    """What the stages of one build share."""

    dims: Dims
    source: Source
    backends: Sequence[str]
    precision: str
    folder: Path
    steps: _Steps
    files: dict[Path, FileRecord] = field(default_factory=dict)

    def network(self, network: Network, module: nn.Module) -> list[EngineRecord]:
        """Export, convert and verify one network; its records."""
        onnx = self.folder / "onnx" / f"{network.name}.onnx"
        graphs = {"onnxruntime": onnx, "openvino": self.folder / "openvino" / f"{network.name}.xml"}
        self.steps.begin(f"{network.name}: export")
        to_onnx(module, network, self.dims, onnx)
        gc.collect()  # the exporter's reference cycles hold a copy of the weights
        if "openvino" in self.backends:
            from export.to_openvino import to_openvino  # a build for onnxruntime alone needs no openvino

            self.steps.begin(f"{network.name}: convert to openvino")
            to_openvino(onnx, graphs["openvino"])
            gc.collect()
        if "onnxruntime" not in self.backends:
            shutil.rmtree(onnx.parent)
        records = []
        for backend in self.backends:
            self.steps.begin(f"{network.name}: verify {backend}")
            with open_engine(backend, network, graphs[backend], HINTS[backend]) as engine:
                parity = verify(engine, module, network, self.dims, self.precision, VERIFY_SEED)
            records.append(self.record(network, backend, graphs[backend], parity))
        return records

    def record(self, network: Network, backend: str, graph: Path, parity: list[Parity]) -> EngineRecord:
        """The manifest's record of one verified graph."""
        beside = graph.with_name(f"{graph.name}.data") if backend == "onnxruntime" else graph.with_suffix(".bin")
        # A network that is small enough has all its weights in the graph itself.
        weights = [self.file(beside)] if beside.exists() else []
        record = EngineRecord(
            network=network.name,
            backend=backend,
            backend_version=backend_version(backend),
            architecture=architecture(),
            precision=self.precision,
            hint=HINTS[backend],
            profile=profile(network),
            file=self.file(graph).path,
            graph=self.file(graph).sha256,
            weights={file.path: file.sha256 for file in weights},
            key="",
            parity=parity,
        )
        return record.model_copy(update={"key": record.expected_key(self.source, self.dims)})

    def file(self, path: Path) -> FileRecord:
        """The record of a finished file; each is read once."""
        if path not in self.files:
            name = path.relative_to(self.folder).as_posix()
            self.files[path] = FileRecord(path=name, size=path.stat().st_size, sha256=digest_file(path))
        return self.files[path]


def _versions() -> dict[str, str]:
    found = {}
    for distribution in _MADE_WITH:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found
