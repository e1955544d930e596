"""The torch form of a UNet whose LoRA takes its strength as it runs: an input more, and no weight that changes.

Each layer of the LoRA computes `base(x) + up(strength * down(x))`, in which `up` holds the LoRA's scale: what fusing
gives, but for rounding, and the base model's own numbers at strength 0. The strength is a row's own, so the rows of one
call may differ in it.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from engines.errors import ModelError
from engines.lora import LoraWeights

__all__ = ["RuntimeUnet"]

# Of the call that runs: layers are handed nothing but what flows between them. Each thread has its own.
_STRENGTH: ContextVar[Tensor] = ContextVar("lora_strength")


class RuntimeUnet(nn.Module):
    """`engines.eager.Unet` with one input more, `lora_strength` [B] or [1]: 1 is the LoRA as trained, 0 is none.

    Args:
        unet: the base model's `Unet`. It stays as it is: this is a copy, which shares its weights.
        lora: of layers of `unet`.

    Raises:
        ModelError: a layer is a convolution in groups, whose change is no pair of convolutions.
    """

    def __init__(self, unet: nn.Module, lora: LoraWeights) -> None:
        super().__init__()
        # deepcopy takes from the memo what it finds there: the tensors themselves, in new modules.
        self.network: nn.Module = copy.deepcopy(unet, {id(t): t for t in (*unet.parameters(), *unet.buffers())})
        for name in lora.base:
            path = name.removesuffix(".weight")
            parent, _, own = path.rpartition(".")
            layer = _Layer(path, self.network.get_submodule(path), lora.down[name], lora.scale[name] * lora.up[name])
            setattr(self.network.get_submodule(parent), own, layer)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, lora_strength: Tensor
    ) -> tuple[Tensor]:
        # To the batch, as diffusers does with the timestep, so that a graph takes one row as well as a batch of them.
        token = _STRENGTH.set(lora_strength.expand(sample.shape[0]))
        try:
            outputs: tuple[Tensor] = self.network(sample, timestep, encoder_hidden_states)
        finally:
            _STRENGTH.reset(token)
        return outputs


class _Layer(nn.Module):
    """A linear layer or a convolution, [B, ..., in] or [B, in, h, w], and the LoRA's change of it."""

    def __init__(self, path: str, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        rank = len(down)
        if isinstance(base, nn.Conv2d):
            if base.groups != 1:
                raise ModelError(f"{path}: a convolution in {base.groups} groups; build with --lora-mode fused")
            rows, columns = base.kernel_size
            options: dict[str, Any] = {
                name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")
            }
            self.down: nn.Module = nn.Conv2d(
                base.in_channels, rank, (rows, columns), **options, bias=False, device="meta"
            )
            self.up: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False, device="meta")
        else:
            weight = base.get_parameter("weight")
            self.down = nn.Linear(weight.shape[1], rank, bias=False, device="meta")
            self.up = nn.Linear(rank, weight.shape[0], bias=False, device="meta")
        for module, tensor in ((self.down, down), (self.up, up)):
            # Of a linear layer files may hold convolutions of 1x1, and the other way about.
            values = tensor.detach().float().reshape(module.get_parameter("weight").shape)
            module.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        strength = _STRENGTH.get()
        # On the few numbers between the two: the least work, and at 0 an exact 0.
        between: Tensor = self.down(x)
        between = between * strength.to(between.dtype).reshape(-1, *[1] * (between.ndim - 1))
        changed: Tensor = self.base(x) + self.up(between)
        return changed
