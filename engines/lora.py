"""A LoRA kept beside an engine whose weights can be replaced: the weights of its layers at any strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.errors import BundleError, reason

__all__ = ["LORA_FILE", "LoraWeights", "put"]

LORA_FILE = "lora.safetensors"


@dataclass(frozen=True)
class LoraWeights:
    """By name of the UNet network's parameter: the base weight, and the LoRA's two factors with their scale.

    The weight at a strength is always made from the base, so what was set before leaves no trace.
    """

    base: Mapping[str, Tensor]
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    scale: Mapping[str, float]

    def at(self, strength: float) -> dict[str, Tensor]:
        """`base + strength * scale * up @ down`, as `smooth_rt.lora.fuse` computes it, in fp32."""
        found = {}
        for name, base in self.base.items():
            change = self.up[name].float().flatten(1) @ self.down[name].float().flatten(1)
            found[name] = base.clone().add_(change.reshape(base.shape), alpha=strength * self.scale[name])
        return found

    def save(self, path: Path) -> None:
        """Write all of it as one safetensors file.

        Raises:
            OSError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, base in self.base.items():
            tensors |= {f"{name}:base": base, f"{name}:down": self.down[name], f"{name}:up": self.up[name]}
            tensors[f"{name}:scale"] = torch.tensor(self.scale[name], dtype=torch.float64)
        try:
            save_file({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:
            raise OSError(None, reason(error), str(path)) from error

    @classmethod
    def load(cls, path: Path) -> LoraWeights:
        """Read what `save` wrote.

        Raises:
            BundleError: the file is missing or damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {"base": {}, "down": {}, "up": {}, "scale": {}}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    name, _, part = key.rpartition(":")
                    parts[part][name] = file.get_tensor(key)
            scales = {name: float(value) for name, value in parts["scale"].items()}
            if not parts["base"].keys() == parts["down"].keys() == parts["up"].keys() == scales.keys():
                raise ValueError("its parts do not belong together")
            if not scales:
                raise ValueError("it holds no layer")
            for name, base in parts["base"].items():
                down, up = parts["down"][name].flatten(1), parts["up"][name].flatten(1)
                if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != base.flatten(1).shape:
                    raise ValueError(f"{name}: its shapes do not belong together")
                if not base.is_floating_point() or not base.isfinite().all():
                    raise ValueError(f"{name}: its base is no finite floating-point weight")
        except (OSError, SafetensorError, KeyError, ValueError, IndexError, RuntimeError) as error:
            raise BundleError(f"{path}: unreadable ({reason(error)}); run smooth-rt build-engine again") from error
        return cls(parts["base"], parts["down"], parts["up"], scales)


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into a module's parameters of those names, in place."""
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_parameter(name).copy_(weight)
