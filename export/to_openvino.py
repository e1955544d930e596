"""ONNX graph -> OpenVINO IR in fp32."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import openvino

from engines.errors import EngineError, reason
from export.quiet import quiet

__all__ = ["to_openvino"]


def to_openvino(onnx: Path, path: Path) -> None:
    """Convert the graph at `onnx` and write `path` (.xml) with its weights beside it (.bin), not compressed to fp16.

    Raises:
        EngineError: OpenVINO cannot convert the graph.
        OSError: the files cannot be written; ENOSPC if the disk is full.
    """
    try:
        with quiet():
            model = openvino.convert_model(str(onnx))
    except Exception as error:
        raise EngineError(f"{onnx.stem}: openvino cannot convert it ({reason(error, -1)}); leave it out") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        # OpenVINO says "iostream error" whatever the cause.
        weights = onnx.with_name(f"{onnx.name}.data")
        size = weights.stat().st_size if weights.exists() else onnx.stat().st_size
        full = shutil.disk_usage(path.parent).free < size
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
