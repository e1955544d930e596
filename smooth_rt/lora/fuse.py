"""Fuse a LoRA into a UNet: W += strength * alpha / r * up @ down, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engines.lora import LoraWeights
from engines.torch_modes import default_modes
from smooth_rt.errors import ModelError
from smooth_rt.lora.read import Lora, LoraLayer
from smooth_rt.ranges import check

if TYPE_CHECKING:
    from smooth_rt.model import Model

__all__ = ["fuse", "fuse_to_folder", "fused_with", "lora_weights"]

MARK = "smooth_rt_fused"


@default_modes()
def fuse(unet: nn.Module, lora: Lora, strength: float = 1.0) -> None:
    """Add `lora` to the weights of `unet` in place, once: a second LoRA needs a freshly loaded model.

    The UNet is changed only when every layer of the LoRA fits.

    Args:
        unet: a UNet2DConditionModel as loaded, in fp32.
        strength: 1.0 is the LoRA as trained, 0.0 leaves the model as it was; from -100 to 100.

    Raises:
        InputError: `strength` is out of its range.
        ModelError: a key matches nothing in the UNet or its shape does not fit (the line names the key), the UNet is
            not in fp32, a sum is beyond fp32, or a LoRA was fused into it before.
    """
    check(lora_strength=strength)
    if fused_with(unet) is not None:
        raise ModelError(f"{lora.source}: this UNet has a LoRA fused in already; load the model again")
    modules = dict(unet.named_modules())
    targets = [(_target(modules, path, layer, lora.source), layer) for path, layer in lora.layers.items()]
    with torch.no_grad():
        for weight, layer in targets:
            if not torch.isfinite(_fused(weight, layer, strength)).all():
                raise ModelError(
                    f"{lora.source}: {layer.key} at strength {strength:g} gives weights beyond fp32; "
                    "lower --lora-strength or take another LoRA"
                )
        for weight, layer in targets:
            weight.copy_(_fused(weight, layer, strength))
    setattr(unet, MARK, (lora.digest, strength))


@default_modes()
def lora_weights(unet: nn.Module, lora: Lora) -> LoraWeights:
    """The base weights of the layers that `lora` changes, and its factors, for engines whose weights are replaced.

    Args:
        unet: as loaded, in fp32; it is left as it is.
        lora: as `read_lora` returns it.

    Raises:
        ModelError: as `fuse`.
    """
    if fused_with(unet) is not None:
        raise ModelError(f"{lora.source}: this UNet has a LoRA fused in already; load the model again")
    modules = dict(unet.named_modules())
    # As the network of `engines.eager.Unet` calls them.
    base = {
        f"unet.{path}.weight": _target(modules, path, layer, lora.source).detach().clone()
        for path, layer in lora.layers.items()
    }
    layers = {f"unet.{path}.weight": layer for path, layer in lora.layers.items()}
    return LoraWeights(
        base,
        {name: layer.down for name, layer in layers.items()},
        {name: layer.up for name, layer in layers.items()},
        {name: layer.scale for name, layer in layers.items()},
    )


def fused_with(unet: nn.Module) -> tuple[str, float] | None:
    """Digest and strength of the LoRA that `fuse` added to `unet`, or None."""
    return getattr(unet, MARK, None) if MARK in vars(unet) else None


def fuse_to_folder(model: Model, lora: Lora, strength: float, output: Path) -> Path:
    """Fuse into `model` (which is changed) and write the whole as a diffusers folder, or nothing.

    Raises:
        InputError: `output` holds something already, lies under a file or cannot be written.
        ModelError: as `fuse`.
    """
    fuse(model.unet, lora, strength)
    model.save(output)
    return output


def _fused(weight: Tensor, layer: LoraLayer, strength: float) -> Tensor:
    change = layer.up.float().flatten(1) @ layer.down.float().flatten(1)
    return weight.add(change.reshape(weight.shape), alpha=strength * layer.scale)


def _target(modules: dict[str, nn.Module], path: str, layer: LoraLayer, source: str) -> Tensor:
    key = layer.key or path
    module = modules.get(path)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise ModelError(f"{source}: {key} matches no linear layer or convolution of this UNet; the LoRA is another's")
    weight = module.weight
    if weight.dtype != torch.float32:
        raise ModelError(f"{source}: this UNet is in {weight.dtype}; LoRAs are fused into fp32 weights")
    flat = (weight.shape[0], weight[0].numel())
    fits = (layer.up.flatten(1).shape[1], layer.down.flatten(1).shape[0]) == (layer.rank, layer.rank)
    fits = fits and (layer.up.shape[0], layer.down.flatten(1).shape[1]) == flat
    # A convolution's down must have the kernel's own shape, not only as many numbers.
    if fits and layer.down.ndim == 4:
        fits = layer.down.shape[1:] == (weight.shape[1:] if weight.ndim == 4 else (flat[1], 1, 1))
    if not fits:
        shapes = f"{list(layer.down.shape)} and {list(layer.up.shape)}"
        raise ModelError(
            f"{source}: {key} and its pair are {shapes}, the weight is {list(weight.shape)}; not this UNet's"
        )
    return weight
