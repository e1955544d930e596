"""ONNX graph -> OpenVINO IR."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import openvino

from engines.contract import Network
from engines.errors import EngineError, reason
from engines.variant import Bounds
from export.quiet import quiet
from export.rewrites.exact_timesteps import exact_timesteps
from export.rewrites.halved_projection import halved_projection
from export.rewrites.native import native_attention
from export.rewrites.own_weights import own_weights
from export.rewrites.winograd import winograd

__all__ = ["fewer_multiplications", "native_kernels", "rewrite", "save", "to_openvino", "to_winograd"]

_RULES = (exact_timesteps, own_weights)
_COUNTED = re.compile(r"([A-Z]\w*)_\d+")  # a node's kind, or of a folded one the kind it had


def to_openvino(
    onnx: Path,
    path: Path,
    compress: bool = False,
    change: Callable[[openvino.Model], object] | None = None,
    native: str | None = None,
    whole: bool = False,
) -> dict[str, int]:
    """Convert the graph at `onnx` and write `path` (.xml) with its weights beside it (.bin).

    Args:
        onnx: the graph, its weights beside it.
        path: of the IR.
        compress: whether weights are stored in fp16, half as large; the precision hint says what they are computed in.
        change: changes the graph before it is written, beside `rewrite`.
        native, whole: as in `native_kernels`.

    Returns:
        how often each rule of `rewrite` and of `native_kernels` found something to change, for the manifest.

    Raises:
        EngineError: OpenVINO cannot convert the graph, or this project's kernels cannot be compiled here.
        OSError: the files cannot be written; ENOSPC if the disk is full.
    """
    try:
        with quiet():
            model = openvino.convert_model(str(onnx))
            if change is not None:
                change(model)
    except EngineError:  # of the change, in words of its own
        raise
    except Exception as error:
        raise EngineError(
            f"{path.parent.name}: openvino cannot convert it ({reason(error, -1)}); leave it out"
        ) from error
    weights = onnx.with_name(f"{onnx.name}.data")
    return save(
        model, path, weights.stat().st_size if weights.exists() else onnx.stat().st_size, compress, native, whole
    )


def rewrite(model: openvino.Model) -> dict[str, int]:
    """Change in a graph what OpenVINO would compute wrongly; how often each rule that found something changed it."""
    hits = {rule.__name__: rule(model) for rule in _RULES}
    return {name: count for name, count in hits.items() if count}


def native_kernels(model: openvino.Model, native: str | None, whole: bool = False) -> dict[str, int]:
    """Give layers of a graph to kernels of this project, and cut what would be copied, in place; how often each rule
    found something to change.

    Args:
        native: the hint, "f32" or "bf16", that the graph is computed in; None leaves every layer to OpenVINO.
        whole: whether weights must stay in one piece, for others to be put in their places.
    """
    if native is None:
        return {}
    hits = {"native_attention": native_attention(model, bf16=native == "bf16")}
    return hits if whole else hits | {"halved_projection": halved_projection(model)}


def to_winograd(
    onnx: Path, path: Path, network: Network, bounds: Sequence[Bounds], native: str | None = None
) -> dict[str, int]:
    """As `to_openvino`, with 3x3 convolutions that take fewer multiplications; how many, by the side of the tile
    ("winograd_4x4"), among what it returns.

    The rewritten graph is what is written: so its transformed weights, twice as large in all, are mapped from the file
    by every process that opens it, none transforms them, and the digests say what runs.

    Args:
        network: whose graph it is.
        bounds: of one height and one width, as `recipes.check_convolution` has them; batches may differ.
    """
    hits: Counter[int] = Counter()

    def change(model: openvino.Model) -> None:
        hits.update(fewer_multiplications(model, network, bounds, native is not None))

    others = to_openvino(onnx, path, change=change, native=native)
    return {**{f"winograd_{size}x{size}": count for size, count in sorted(hits.items())}, **others}


def fewer_multiplications(
    model: openvino.Model, network: Network, bounds: Sequence[Bounds], native: bool = False
) -> Counter[int]:
    """What `to_winograd` does to a graph, in place; the transforms by this project's kernels if `native`."""
    sizes = {symbol: -1 if symbol == "batch" else best for symbol, (_, best, _) in bounds[0].items()}
    shapes = {spec.name: spec.shape(sizes) for spec in network.inputs}
    return winograd(model, shapes, max(one["batch"][1] for one in bounds), native)


def _number(model: openvino.Model) -> None:
    """Number the nodes without a name of their own by their places: OpenVINO counts them by the process, and the same
    graph would be another file in each build."""
    for index, node in enumerate(model.get_ordered_ops()):
        counted = _COUNTED.fullmatch(node.get_friendly_name())
        if counted:
            node.set_friendly_name(f"{counted[1]}.{index}")


def save(
    model: openvino.Model,
    path: Path,
    size: int,
    compress: bool = False,
    native: str | None = None,
    whole: bool = False,
) -> dict[str, int]:
    """Rewrite a graph and write it, an IR of about `size` bytes, at `path` (.xml); how often each rule changed it.

    Raises:
        OSError: it cannot be written; ENOSPC if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hits = rewrite(model) | native_kernels(model, native, whole)
    _number(model)
    try:
        openvino.save_model(model, str(path), compress_to_fp16=compress)
    except RuntimeError as error:
        # OpenVINO says "iostream error" whatever the cause.
        full = shutil.disk_usage(path.parent).free < size
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    return hits
