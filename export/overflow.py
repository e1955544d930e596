"""What outgrows fp16: the parts of a module whose values, or whose attention's scores, come near the end of its range.

A layer's output is seen as it leaves the layer. The scores of an attention, `scale * q k^T`, leave none: torch computes
them within one operator and keeps them small there, and the exported graph has them as a tensor of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from engines.errors import EngineError

__all__ = ["large_parts"]

HEADROOM = 1 / 8  # of fp16's range: what goes beyond stays in fp32


def large_parts(module: nn.Module, inputs: Sequence[Tensor]) -> list[str]:
    """The smallest parts of the module that hold what comes near the end of fp16's range, and hand on what does not.

    A layer whose output is large is no such part by itself: its output would leave it in fp16. The block around it is.
    An attention whose scores are large is one: they do not leave it.

    Args:
        module: in fp32.
        inputs: what it is run on.

    Returns:
        names of submodules.

    Raises:
        EngineError: the module's own output is large.
    """
    limit = torch.finfo(torch.float16).max * HEADROOM
    outputs: list[str] = []
    scores = _Scores(limit)

    def entered(name: str) -> Any:
        return lambda *_: scores.within.append(name)

    def left(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            scores.within.pop()
            tensors = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(one, Tensor) and float(one.detach().abs().max()) > limit for one in tensors):
                outputs.append(name)

        return look

    hooks: list[Any] = []
    for name, one in module.named_modules():
        if name:
            hooks += [one.register_forward_pre_hook(entered(name)), one.register_forward_hook(left(name))]
    try:
        with torch.no_grad(), scores:
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    parts = []
    for name in dict.fromkeys([*outputs, *scores.large]):
        around = name
        while around in outputs:
            around = around.rpartition(".")[0]
        if not around:
            raise EngineError(f"{name}: its values outgrow fp16 and leave the network so; choose bf16 or fp32")
        parts.append(around)
    return list(dict.fromkeys(parts))


class _Scores(TorchFunctionMode):
    """Looks at the scores of each attention that is computed.

    Args:
        limit: above it they are large.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self._limit = limit
        self.within = [""]  # the modules that are running, the innermost last
        self.large: list[str] = []  # those in which scores were large

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
            scale = named.get("scale") or named["query"].shape[-1] ** -0.5
            largest = max(_largest_scores(named["query"], named["key"]), default=0.0)
            if scale * largest > self._limit:
                self.large.append(self.within[-1])
        return func(*args, **(kwargs or {}))


def _largest_scores(query: Tensor, key: Tensor) -> Iterator[float]:
    """The largest of each head's |q k^T|, a head at a time: the table of them all is large itself."""
    for q, k in zip(query.flatten(0, -3), key.flatten(0, -3), strict=True):
        yield float((q @ k.transpose(0, 1)).abs().max())
