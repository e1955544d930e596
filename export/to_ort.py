"""ONNX graph -> what ONNX Runtime runs fastest, beside the graph it came from.

On a processor every rewrite was measured to pay. CUDA's provider gets one of them, attention as one node: it has that
in fp16, too, and else holds each table of scores whole, 8.6 GB in fp16 for 16 images of SD1.5 at 512 pixels with
guidance. Of the others, one is for how a processor adds a bias; and where inputs are bound to a device, the text has no
graph of its own. Nothing of this was run on a GPU yet.

The plain graph stays where it is: it is what others open, and what engines of other backends are made from. The graphs
that are written here hold no weights of their own and refer to those of the plain one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir

from engines.ort import RUN_GRAPH, text_graph
from export.quiet import quiet
from export.rewrites.fused_attention import fused_attention
from export.rewrites.split_projection import split_projection
from export.rewrites.text_apart import text_apart

__all__ = ["REWRITTEN", "to_ort"]

# By backend, the precisions in which its provider computes what the rewrites make.
REWRITTEN: dict[str, tuple[str, ...]] = {"onnxruntime": ("fp32",), "onnxruntime-cuda": ("fp32", "fp16")}


def to_ort(onnx: Path, backend: str = "onnxruntime", apart: bool = True) -> tuple[Path, dict[str, Any]]:
    """Write what runs beside `onnx`, a finished graph with its weights: `RUN_GRAPH`, and the graph of the text.

    Args:
        onnx: the plain graph.
        backend: a key of `REWRITTEN`.
        apart: whether the text may have a graph of its own.

    Returns:
        the graph to open, `onnx` itself where there is nothing to gain, and the hits of each rewrite.

    Raises:
        OSError: the files cannot be written.
    """
    with quiet():
        model = onnx_ir.load(onnx)
        hits, text = {"fused_attention": fused_attention(model)}, None
        if backend == "onnxruntime":
            hits["split_projection"] = split_projection(model)
            text, hits["text_apart"] = text_apart(model) if apart else (None, 0)
        if not any(hits.values()):
            return onnx, hits
        path = onnx.with_name(RUN_GRAPH)
        onnx_ir.save(model, path)
        if text is not None:
            onnx_ir.save(text, text_graph(path))
    return path, hits
