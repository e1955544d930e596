"""The PyTorch form of each network, and the engine that runs it: the fallback, and what every backend is held to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import WRT, Network, NetworkName, gradient_contract
from engines.errors import EngineError
from engines.lora import put

__all__ = [
    "EagerEngine",
    "TextEncoder",
    "Unet",
    "UnetVjp",
    "VaeDecoder",
    "VaeEncoder",
    "gradient_networks",
    "torch_networks",
]


class TextEncoder(nn.Module):
    """`input_ids` int32 [B, L] -> `last_hidden_state` [B, L, D], after the final layer norm."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(input_ids, return_dict=True).last_hidden_state,)


class Unet(nn.Module):
    """`sample` [B, C, h, w], `timestep` int64 [B] or [1], `encoder_hidden_states` [B, L, D] -> `noise_pred`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return (self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class UnetVjp(nn.Module):
    """The UNet and its vector-Jacobian product, by autograd.

    The UNet's inputs in order, then `cotangent` [B, C, h, w] and `cotangent_scale` [B] or [1] -> `noise_pred` and, for
    each name in `wrt`, the gradient with respect to it of the sum of `noise_pred * c`, where
    `c = cotangent + cotangent_scale * noise_pred` is held constant.

    With a scale, the gradient of a quadratic loss takes one call, for its cotangent is linear in the `noise_pred` of
    that same call: of |a * noise_pred + b|^2 it is 2a * b with a scale of 2a^2.
    """

    def __init__(self, module: nn.Module, wrt: Collection[str]) -> None:
        super().__init__()
        self.module = module
        self.wrt = tuple(wrt)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        *more, cotangent, cotangent_scale = rest
        # Weights that ask for no gradient: autograd then keeps nothing for theirs.
        weights = {name: one.detach() for name, one in (*self.module.named_parameters(), *self.module.named_buffers())}
        inputs = {"sample": sample.detach(), "encoder_hidden_states": encoder_hidden_states.detach()}
        leaves = [inputs[name].requires_grad_() for name in self.wrt]
        with torch.enable_grad():
            given = (inputs["sample"], timestep, inputs["encoder_hidden_states"], *more)
            (output,) = torch.func.functional_call(self.module, weights, given)
        found = output.detach()
        grads = torch.autograd.grad(output, leaves, cotangent + cotangent_scale[:, None, None, None] * found)
        return found, *grads


class VaeEncoder(nn.Module):
    """`sample` [B, 3, H, W] in -1..1 -> mean and clamped log-variance of the posterior, each [B, C, H/f, W/f]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(sample, return_dict=False)[0]
        return posterior.mean, posterior.logvar


class VaeDecoder(nn.Module):
    """`latent_sample` [B, C, h, w], already divided by the scaling factor -> `sample` [B, 3, f*h, f*w], unclamped."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


def torch_networks(text_encoder: nn.Module, unet: nn.Module, vae: nn.Module) -> dict[NetworkName, nn.Module]:
    """The networks of `engines.contract` as torch modules that share the given weights.

    Each `forward` takes the contract's inputs in the contract's order and returns a tuple of its outputs in order. It
    is the one definition that eager runs, export traces and parity compares with.
    """
    return {
        "text_encoder": TextEncoder(text_encoder).eval(),
        "unet": Unet(unet).eval(),
        "vae_encoder": VaeEncoder(vae).eval(),
        "vae_decoder": VaeDecoder(vae).eval(),
    }


def gradient_networks(unet: nn.Module, names: Collection[NetworkName] = tuple(WRT)) -> dict[NetworkName, nn.Module]:
    """The UNet's gradient networks of those names, in the form and on the weights of `torch_networks`.

    Args:
        unet: the network "unet" of `torch_networks`.
        names: keys of `contract.WRT`.
    """
    return {name: UnetVjp(unet, WRT[name]).eval() for name in names}


class EagerEngine(Engine):
    """Runs a module of `torch_networks` or of `gradient_networks` in the dtype and memory format that its weights have.

    Args:
        network: the contract.
        module: `forward` takes the inputs in order and returns a tuple of the outputs in order.
    """

    backend: ClassVar[str] = "eager"

    def __init__(self, network: Network, module: nn.Module) -> None:
        super().__init__(network)
        self._module: nn.Module | None = module
        if network.name == "unet":
            modules = gradient_networks(module)
            self.gradients = {
                name: partial(EagerEngine, gradient_contract(network, name), one) for name, one in modules.items()
            }

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:  # noqa: ARG002
        if self._module is None:
            raise EngineError(f"{self.network.name}: the eager engine is closed; open it again")
        # Not inference_mode: its tensors could take no part in a caller's own autograd or in-place work.
        # Callers hand over and receive CPU tensors, as on every engine; a module being trained may live on a GPU.
        device = next(self._module.parameters()).device
        with torch.no_grad():
            outputs = self._module(*(inputs[spec.name].to(device) for spec in self.network.inputs))
        return {
            spec.name: output.cpu().contiguous() for spec, output in zip(self.network.outputs, outputs, strict=True)
        }

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights into the module's parameters, in place; see `Engine.refit`."""
        if self._module is None:
            raise EngineError(f"{self.network.name}: the eager engine is closed; open it again")
        put(self._module, weights)

    def close(self) -> None:
        """Let go of the module; its owner may still hold it."""
        self._module, self.gradients = None, {}
        super().close()
