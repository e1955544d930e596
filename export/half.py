"""Torch module -> the same in fp16 or bf16, with islands of fp32 where a measurement asks for them.

Precision lives in the graph: TensorRT 11 has no flag for it, so what is exported must compute in half already. What
suffers by it, if anything does, depends on the weights: statistics of norms, the timestep's embedding, values that
outgrow fp16 (VAE decoders are known for it, and give black images). So each is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.contract import Dims, Network, undifferentiated
from engines.eager import UnetVjp
from engines.errors import EngineError, InputError
from engines.variant import Precision
from export.conditioning import item_errors
from export.graphs import Case, random_inputs
from export.overflow import large_parts

__all__ = ["DTYPES", "ISLANDS", "Cast", "channels_last", "converted", "in_half"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Kinds of modules that may be left in fp32, by what they are called in the manifest.
ISLANDS: dict[str, tuple[str, ...]] = {
    "norms": ("GroupNorm", "LayerNorm"),
    "timestep embedding": ("TimestepEmbedding",),
}
WORTH = 1.1  # how many times larger the error must be without an island
SEED = 11


def in_half(module: nn.Module, network: Network, dims: Dims, precision: Precision) -> tuple[nn.Module, list[str]]:
    """A copy of `module` that computes in `precision`, and the islands in it, each by kind or by a module's name.

    Inputs and outputs stay the contract's. The fp32 weights are not copied; those in half take half their space.

    Args:
        module: a module of `engines.eager.torch_networks` or of `gradient_networks`, in fp32 on the CPU. The islands of
            a gradient are those that its own errors ask for.
        network: its contract.
        dims: the model's sizes.
        precision: "fp16" or "bf16".

    Raises:
        InputError: another precision.
        EngineError: the numbers are not finite, whatever is left in fp32.
    """
    if precision not in ("fp16", "bf16"):
        raise InputError(f"precision {precision!r}: a module is converted to fp16 or bf16")
    dtype = DTYPES[precision]
    forward, inputs = module, list(_inputs(network, dims).values())
    if isinstance(module, UnetVjp):
        forward, inputs = module.module, list(_rows(network, dims).values())
    given = inputs[: len(undifferentiated(network).inputs)] if isinstance(module, UnetVjp) else inputs
    large = large_parts(forward, given) if dtype is torch.float16 else []

    def built(kinds: Sequence[str]) -> nn.Module:
        half = _built(forward, dtype, kinds, large)
        return UnetVjp(half, module.wrt).eval() if isinstance(module, UnetVjp) else half

    with torch.no_grad():
        wanted = module(*inputs)
    kinds = [kind for kind, types in ISLANDS.items() if any(type(m).__name__ in types for m in module.modules())]
    full = _error(built(kinds), inputs, wanted)
    if not full < float("inf"):
        raise EngineError(f"{network.name}: not finite in {precision}, even with norms in fp32; choose bf16 or fp32")
    kept = [kind for kind in kinds if _error(built([k for k in kinds if k != kind]), inputs, wanted) > WORTH * full]
    return built(kept), [*kept, *large]


def converted(module: nn.Module, dtype: torch.dtype, keep: Sequence[nn.Module] = ()) -> nn.Module:
    """A copy in `dtype`. A tensor that needs no conversion is shared with `module`.

    Args:
        keep: modules whose tensors stay as they are.
    """
    kept = {id(tensor) for one in keep for tensor in (*one.parameters(), *one.buffers())}
    return _copied(
        module, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() and id(tensor) not in kept else tensor
    )


def channels_last(module: nn.Module) -> nn.Module:
    """A copy whose convolutions' weights are laid out channels-last; all others are shared with `module`."""
    return _copied(module, lambda one: one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one)


def _copied(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy on changed tensors. Each is changed on its own, so that there is never a second copy of them all."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = change(tensor).detach()
        memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    # deepcopy takes from the memo what it finds there, and copies the modules around.
    return copy.deepcopy(module, memo)


class Cast(nn.Module):
    """The contract's float32 outside, `dtype` inside."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cast = (tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in inputs)
        return tuple(output.float() for output in self.module(*cast))


class _Island(nn.Module):
    """fp32 inside, `dtype` outside."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = self.module(*(_lifted(x) for x in inputs), **{name: _lifted(x) for name, x in named.items()})
        if isinstance(output, tuple):
            return tuple(self._lowered(one) for one in output)
        return self._lowered(output)

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._lowered(one) for one in value)
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _lifted(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _built(module: nn.Module, dtype: torch.dtype, kinds: Sequence[str], names: Sequence[str]) -> nn.Module:
    types = {name for kind in kinds for name in ISLANDS[kind]}
    islands = [name for name, one in module.named_modules() if name in names or type(one).__name__ in types]
    islands = [name for name in islands if not any(name.startswith(f"{other}.") for other in islands)]
    half = converted(module, dtype, [module.get_submodule(name) for name in islands])
    for name in islands:
        parent, _, own = name.rpartition(".")
        setattr(half.get_submodule(parent), own, _Island(half.get_submodule(name), dtype))
    return Cast(half, dtype).eval()


def _error(module: nn.Module, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of the worst output, the relative error; in the mean over its rows, in which one that is ill-conditioned, as a
    gradient's may be, counts no more than others."""
    with torch.no_grad():
        got = module(*inputs)
    if not all(bool(output.isfinite().all()) for output in got):
        return float("inf")
    errors = [item_errors(g, w).clamp(min=1e-12) for g, w in zip(got, wanted, strict=True)]
    return max(float(one.log().mean().exp()) for one in errors)


def _inputs(network: Network, dims: Dims) -> dict[str, Tensor]:
    """Two rows at the model's own size; a VAE's latents as large as those of SD1.x."""
    return _drawn(network, dims, 2, dims.supported_latent_size)


def _rows(network: Network, dims: Dims) -> dict[str, Tensor]:
    """More rows of half the size, for a gradient: it takes more memory, and its error differs more from row to row."""
    unit = dims.latent_multiple
    height, width = (max(unit, side // 2 // unit * unit) for side in dims.supported_latent_size)
    return _drawn(network, dims, 8, (height, width))


def _drawn(network: Network, dims: Dims, rows: int, size: tuple[int, int]) -> dict[str, Tensor]:
    sizes = {"batch": rows, "height": size[0], "width": size[1]}
    return random_inputs(network, dims, Case(sizes, 5.5), torch.Generator().manual_seed(SEED))
