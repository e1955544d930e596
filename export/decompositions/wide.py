"""What is computed in fp32 where a graph is in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide"]


def wide(x: Tensor) -> Tensor:
    """`x`, in fp32 if it was in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
