"""What tells tensors from others by their values, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["digest_tensors"]


def digest_tensors(tensors: Mapping[str, Tensor], head: str = "") -> str:
    """A sha256 of names, types, shapes and bytes, after a `head`. The order of the tensors does not matter.

    A safetensors file has no such digest of its own, and does not see a flipped bit.
    """
    digest = hashlib.sha256(head.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
