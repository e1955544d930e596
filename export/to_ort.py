"""ONNX graph -> what ONNX Runtime runs fastest on a processor, beside the graph it came from.

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

__all__ = ["to_ort"]


def to_ort(onnx: Path, apart: bool = True) -> tuple[Path, dict[str, Any]]:
    """Write what runs beside `onnx`, a finished graph with its weights: `RUN_GRAPH`, and the graph of the text.

    Args:
        onnx: the plain graph.
        apart: whether the text may have a graph of its own.

    Returns:
        the graph to open, `onnx` itself where there is nothing to gain, and the hits of each rewrite.

    Raises:
        OSError: the files cannot be written.
    """
    with quiet():
        model = onnx_ir.load(onnx)
        hits = {"fused_attention": fused_attention(model), "split_projection": split_projection(model)}
        text, hits["text_apart"] = text_apart(model) if apart else (None, 0)
        if not any(hits.values()):
            return onnx, hits
        path = onnx.with_name(RUN_GRAPH)
        onnx_ir.save(model, path)
        if text is not None:
            onnx_ir.save(text, text_graph(path))
    return path, hits
