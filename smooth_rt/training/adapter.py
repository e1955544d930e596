"""The PEFT adapter that training changes, and the LoRA that it is at any moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from smooth_rt.errors import InputError
from smooth_rt.lora import Lora, LoraLayer
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig

__all__ = ["add_adapter", "checkpoint_activations", "lora_of"]

NAME = "smooth"


def add_adapter(unet: nn.Module, config: SmoothLoraConfig) -> None:
    """Give the UNet a LoRA of no effect yet, whose weights alone require gradients; drawn by the config's seed.

    Raises:
        InputError: a target module that the UNet has not, or a rank above the width of the widest.
    """
    linear = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise InputError(f"target_modules={target!r}: no linear layer of the UNet ends so; name some, as to_q")
    sides = [min(m.in_features, m.out_features) for name, m in linear.items() if name.endswith(config.target_modules)]
    # A rank above a layer's width buys nothing, and a slip of the keyboard fills the memory.
    if config.rank > max(sides):
        raise InputError(f"rank={config.rank}: give at most {max(sides)}, the width of the model's widest layer")
    torch.manual_seed(config.seed)
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules),
        init_lora_weights="gaussian",
    )
    unet.add_adapter(adapter, NAME)  # type: ignore[operator]


def checkpoint_activations(unet: nn.Module) -> None:
    """Let the UNet compute its activations a second time on the way back instead of keeping them.

    They must be computed as they were, also where that happens after the choice of attention kernels that held then
    has ended.
    """

    def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
        # As `svr.variation` sets it, on any device.
        math_alone = not torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any] | _Again]:
            return nullcontext(), _Again(partial(sdpa_kernel, SDPBackend.MATH)) if math_alone else nullcontext()

        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)

    unet.enable_gradient_checkpointing(gradient_checkpointing_func=checkpointed)  # type: ignore[operator]


class _Again:
    """A context that can be entered more than once: a double backward computes the activations twice."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make = make
        self.entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self.entered.append(self.make())
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


def lora_of(unet: nn.Module, config: SmoothLoraConfig, source: str) -> Lora:
    """The adapter as it stands."""
    state = get_peft_model_state_dict(unet, adapter_name=NAME)
    layers = {
        key.removesuffix(".lora_A.weight"): LoraLayer(
            down=state[key].detach().cpu().clone(),
            up=state[key.replace("lora_A", "lora_B")].detach().cpu().clone(),
            alpha=config.alpha,
        )
        for key in state
        if key.endswith(".lora_A.weight")
    }
    return Lora(layers=layers, source=source, digest="")
