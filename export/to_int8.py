"""fp32 graph -> int8 by NNCF: weights and what flows into a layer, but for the layers that images would suffer by.

How far one call is from fp32 says little about an image: an error that is the same in both halves of guidance cancels
in their difference, and one that is not is multiplied by the scale. So images decide. The layers that are never
quantised cost next to nothing; of the rest, whole kinds are left in floating point, one more at each rung of `LADDER`,
until images sampled on the graph are close enough to those of the torch module.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from engines.contract import Network, NetworkName
from engines.errors import EngineError, ParityError, reason
from engines.manifest import CALIBRATED_ON
from export.quiet import quiet

__all__ = ["ENOUGH_DB", "LADDER", "Calibration", "check_installed", "quantise_at", "quantise_onnx", "quantise_openvino"]

LOG = logging.getLogger("smooth_rt")

# The median PSNR of images to fp32's at which a rung of the ladder is taken: 30 dB, and one for other prompts.
ENOUGH_DB = 31.0
# By the end of a weight's name. On the default model and OpenVINO's native kernels everything in int8 gave 30.9 dB,
# without cross-attention's queries 31.5, without all queries and keys 32.1.
ALWAYS = r"time_|conv_in|conv_out|attn2\.to_[kv]"
LADDER: tuple[tuple[str, str | None], ...] = (
    ("all", None),
    ("cross-attention's queries in floating point", r"attn2\.to_q"),
    ("attention's queries and keys in floating point", r"to_[qk]\.|to_[qk]$"),
    ("attention in floating point", r"attn[12]\."),
    ("attention and proj_in, proj_out in floating point", r"attn[12]\.|proj_(in|out)"),
    ("convolutions alone in int8", r"attn[12]\.|proj_(in|out)|ff\."),
)
# Whether the scales of what flows are symmetric about 0. On OpenVINO that is faster, since there is no offset to take
# away, and the default model's images are closer: 31.8 dB for 31.0 with everything in int8.
PRESETS = {"openvino": "PERFORMANCE", "onnxruntime": "MIXED"}
SUBSET = 128  # rows that NNCF looks at
_LAYERS = ("Conv", "MatMul", "Gemm")


class Calibration(Protocol):
    """What a quantiser asks of real runs of the model."""

    @property
    def prompts(self) -> Sequence[str]:
        """One a run, for the manifest."""

    def samples(self, network: NetworkName) -> Sequence[dict[str, Tensor]]:
        """Inputs that the network had, one row each, images and timesteps mixed."""

    def psnr(self, network: Network, graph: Path, backend: str) -> float:
        """The median PSNR in dB of images sampled with `graph` in the network's place, to those without it."""


def check_installed() -> None:
    """Raise EngineError unless NNCF is here: a build asks before its first stage, which may be long before the last."""
    if importlib.util.find_spec("nncf") is None:
        raise EngineError(
            "precision 'int8': NNCF is not installed; run `pip install nncf` (in a checkout -c constraints.txt)"
        )


def quantise_openvino(
    onnx: Path,
    path: Path,
    network: Network,
    calibration: Calibration,
    say: Callable[[str], None] = lambda _: None,
    native: str | None = None,
) -> dict[str, Any]:
    """Convert `onnx` and write `path` (.xml, its weights beside it) in int8; `say` is told what goes on.

    Args:
        native: as in `to_openvino.native_kernels`; images are judged with them.

    Returns:
        what was chosen, for the manifest.

    Raises:
        EngineError: NNCF is not installed, or cannot quantise the graph.
        ParityError: no rung of the ladder gives images that are close enough.
        OSError: the files cannot be written.
    """
    return _climb(onnx, path, network, "openvino", calibration, say, native)


def quantise_onnx(
    onnx: Path, path: Path, network: Network, calibration: Calibration, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Write `path` (.onnx) in int8, as QuantizeLinear and DequantizeLinear; as `quantise_openvino`."""
    return _climb(onnx, path, network, "onnxruntime", calibration, say)


def quantise_at(
    rung: int,
    onnx: Path,
    path: Path,
    network: Network,
    backend: str,
    rows: Sequence[Mapping[str, Tensor]],
    native: str | None = None,
    hear: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Quantise as one rung of `LADDER` says, whatever becomes of images.

    Args:
        rung: its index.
        onnx: the graph in fp32.
        path: what is written.
        network: its contract.
        backend: "openvino" or "onnxruntime".
        rows: inputs of real runs, one row each; the first `SUBSET` are looked at.
        native: for OpenVINO, as in `to_openvino.native_kernels`.
        hear: called at each row that NNCF takes.

    Returns:
        the number of layers in int8, the weights of those that were left out, and what `native_kernels` did.

    Raises:
        EngineError: NNCF is not installed or does not load, or cannot quantise the graph.
        OSError: the files cannot be written.
    """
    check_installed()
    try:
        import nncf
        from nncf.onnx.quantization.backend_parameters import BackendParameters
    except ImportError as error:
        mend = "run `pip install --force-reinstall nncf`"
        raise EngineError(f"precision 'int8': NNCF is installed and does not load ({reason(error)}); {mend}") from error
    layers = _layers(onnx)
    out = [node for node, weight in layers.items() if _stays(weight, LADDER[rung][1])]
    # As OpenVINO renames them, and `halved_projection`.
    names = [f"{node}{suffix}" for node in out for suffix in ("", "/WithoutBiases", "_0", "_1")]

    def taken(row: Any) -> Any:
        hear()
        return row

    data = nncf.Dataset([{name: tensor.numpy() for name, tensor in row.items()} for row in rows[:SUBSET]], taken)
    try:
        with quiet(), _levels_kept(), _opened(onnx, backend, native) as (model, folder, halved):
            nncf.set_log_level(logging.ERROR)
            parameters = nncf.AdvancedQuantizationParameters(
                backend_params={} if folder is None else {BackendParameters.EXTERNAL_DATA_DIR: str(folder)}
            )
            model = nncf.quantize(
                model,
                data,
                preset=nncf.QuantizationPreset[PRESETS[backend]],
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=min(SUBSET, len(rows)),
                ignored_scope=nncf.IgnoredScope(names=names, validate=False),
                advanced_parameters=parameters,
            )
    except Exception as error:
        raise EngineError(f"{network.name}: NNCF cannot quantise it ({reason(error)}); leave int8 out") from error
    hits = _write(model, path, backend, onnx, native) | halved
    return {"quantised": len(layers) - len(out), "left_out": sorted(layers[node] or node for node in out), **hits}


@contextlib.contextmanager
def _levels_kept() -> Iterator[None]:
    """NNCF sets the level of the root logger's handlers, which are everybody's."""
    before = [(handler, handler.level) for handler in logging.root.handlers]
    try:
        yield
    finally:
        for handler, level in before:
            handler.setLevel(level)


@contextlib.contextmanager
def _opened(onnx: Path, backend: str, native: str | None) -> Iterator[tuple[Any, Path | None, dict[str, int]]]:
    """The model that NNCF takes, the folder of its weights where they are not in it, and what was rewritten before."""
    if backend == "openvino":
        import openvino

        from export.rewrites.halved_projection import halved_projection

        model = openvino.convert_model(str(onnx))
        yield model, None, {} if native is None else {"halved_projection": halved_projection(model)}
        return
    import onnx as onnx_library

    # Copied: onnx refuses weights that have several links, as those of a build on the way have. They stay in their
    # file, since more than 2 GB of them fit into no message of protobuf.
    with tempfile.TemporaryDirectory(prefix=".quantise-", dir=onnx.parent) as name:
        folder = Path(name).absolute()
        for part in onnx.parent.glob(f"{onnx.name}*"):
            shutil.copyfile(part, folder / part.name)
        yield onnx_library.load(str(folder / onnx.name), load_external_data=False), folder, {}


def _write(model: Any, path: Path, backend: str, onnx: Path, native: str | None) -> dict[str, int]:
    if backend == "openvino":
        from export.to_openvino import save

        return save(model, path, onnx.stat().st_size, native=native)
    import onnx as onnx_library

    weights = path.with_name(f"{path.name}.data")
    for old in (path, weights):  # of a rung before; onnx would write behind its end
        old.unlink(missing_ok=True)
    onnx_library.save_model(model, str(path), save_as_external_data=True, location=weights.name, size_threshold=1024)
    return {}


def _climb(
    onnx: Path,
    path: Path,
    network: Network,
    backend: str,
    calibration: Calibration,
    say: Callable[[str], None],
    native: str | None = None,
) -> dict[str, Any]:
    """Quantise rung after rung until images are close enough."""
    say(f"{network.name}: sampling images in fp32 to calibrate on")
    rows = calibration.samples(network.name)
    tried: list[str] = []
    for rung, (what, _) in enumerate(LADDER):
        now = f"{network.name}: quantise for {backend}, {what}"
        say(now)
        # Again at each row: it takes minutes, of which a log gets a line now and then.
        notes = quantise_at(rung, onnx, path, network, backend, rows, native, partial(say, now))
        say(f"{network.name}: sampling images in int8, {what}")
        found = calibration.psnr(network, path, backend)
        tried.append(f"{what}: {found:.1f} dB")
        LOG.info("%s in int8 for %s, %s", network.name, backend, tried[-1])
        if found >= ENOUGH_DB:
            return {**notes, "rung": rung, "tried": tried, CALIBRATED_ON: [*calibration.prompts]}
    raise ParityError(
        f"{network.name}: {backend} in int8 gives images of {found:.1f} dB to fp32's, under {ENOUGH_DB:g}; not "
        "published, choose bf16 or calibrate on prompts of your own (--calibration-prompts)"
    )


def _stays(weight: str | None, kinds: str | None) -> bool:
    """Whether a layer of that weight stays in floating point. One of no weight multiplies two things that flow."""
    return weight is None or any(re.search(kind, weight) for kind in (ALWAYS, kinds) if kind is not None)


def _layers(path: Path) -> dict[str, str | None]:
    """The weight of each node that multiplies, by the node's name; None where it multiplies two things that flow."""
    import onnx as onnx_library

    try:
        graph = onnx_library.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise EngineError(f"{path}: not an ONNX graph ({reason(error)}); export it again") from error
    weights = {tensor.name for tensor in graph.initializer}
    return {
        node.name: next((name for name in node.input if name in weights), None)
        for node in graph.node
        if node.op_type in _LAYERS
    }
