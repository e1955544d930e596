"""TF32 off, for what is to be computed in fp32: a GPU's ten bits of mantissa are those of fp16."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["no_tf32"]

_LOCK = threading.RLock()  # torch's settings are those of the process


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Products and convolutions of float32 are computed in it; afterwards torch's settings are as they were. Threads
    wait for each other.

    torch takes TF32 for convolutions unless told otherwise. It has an older and a newer way to tell it, and fails to
    read the one where the other was used: so the older is taken where it can be read, and the newer elsewhere.
    """
    with _LOCK:
        cudnn: Any = torch.backends.cudnn
        matmul: Any = torch.backends.cuda.matmul
        newer = (cudnn.conv, cudnn.rnn, matmul)
        before = [one.fp32_precision for one in newer]
        try:
            older = cudnn.allow_tf32, matmul.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:
            older = None
        try:
            if older is None:
                cudnn.conv.fp32_precision = matmul.fp32_precision = "ieee"
            else:
                cudnn.allow_tf32 = False
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            if older is not None:
                cudnn.allow_tf32 = older[0]
                torch.set_float32_matmul_precision(older[2])
            for one, precision in zip(newer, before, strict=True):
                one.fp32_precision = precision
