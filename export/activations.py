"""What one call of a network holds beside its weights at its largest, found without running it.

The torch module is run on the "meta" device, where tensors have sizes and no numbers, and the storages that are alive
are summed up operator by operator. That takes a second for Stable Diffusion 1.5 at any size.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.contract import Network

__all__ = ["held_at_most", "without_numbers"]


def without_numbers(module: nn.Module) -> nn.Module:
    """A copy of `module` on the "meta" device, for `held_at_most`; it takes no memory to speak of."""
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    empty = {id(one): nn.Parameter(one.detach().to("meta"), requires_grad=False) for one in tensors}
    # deepcopy takes from the memo what it finds there.
    copied: nn.Module = copy.deepcopy(module, dict(empty))
    return copied


def held_at_most(module: nn.Module, network: Network, sizes: Mapping[str, int], fused: bool = False) -> int:
    """Bytes that a call of these sizes has alive at once, the weights and inputs left out.

    Args:
        module: as `without_numbers` gives it.
        network: its contract.
        sizes: of each symbol.
        fused: whether attention of several heads is computed block by block. Otherwise its products, the cells squared
            for each head, are whole in memory, twice at a time.
    """
    inputs = [
        torch.empty(spec.shape(sizes), dtype=getattr(torch, spec.dtype), device="meta") for spec in network.inputs
    ]
    alive = _Alive([*module.parameters(), *module.buffers(), *inputs])
    with torch.no_grad(), _Fused() if fused else nullcontext(), alive:
        module(*inputs)
    return alive.most


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the storages that operators make, for as long as each lives; `most` is the greatest sum."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {one.untyped_storage()._cdata for one in known}
        self._now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._known:
                self._known.add(key)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class _Fused(TorchFunctionMode):
    """Attention of several heads without its products."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention and args[0].shape[1] > 1:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))
