"""Random draws that depend on nothing but their key: what a checkpoint need not hold, and what stays the same however
many processes share a step."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["keyed_generator"]


def keyed_generator(seed: int, stream: str, *key: int) -> torch.Generator:
    """A CPU generator of `seed`, the stream's name and further numbers, as a step's or a sample's."""
    state = np.random.SeedSequence([seed, *stream.encode(), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(state[0]) << 32 | int(state[1])) & (2**63 - 1))
