"""The PyTorch form of each network, and the engine that runs it: the fallback, and what every backend is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import BLOCKS, OF, WRT, Network, NetworkName, derived_contract
from engines.errors import EngineError
from engines.locks import ReadWriteLock
from engines.lora import put

__all__ = [
    "EagerEngine",
    "TextEncoder",
    "Unet",
    "UnetFeatures",
    "UnetVjp",
    "VaeDecoder",
    "VaeEncoder",
    "gradient_networks",
    "pulled_back",
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


class UnetFeatures(nn.Module):
    """The UNet up to the output of one of its up blocks: its inputs -> [B, F, h / d, w / d], where d is 1 for the last
    two blocks and twice as much for each one before. What comes after is neither computed nor held.

    Args:
        unet: the network "unet" in torch, in whatever form. It stays as it is: this is a copy, which shares its
            weights.
        block: a key of `contract.BLOCKS`.
    """

    def __init__(self, unet: nn.Module, block: str) -> None:
        super().__init__()
        # deepcopy takes from the memo what it finds there: the tensors themselves, in new modules.
        self.network: nn.Module = copy.deepcopy(unet, {id(t): t for t in (*unet.parameters(), *unet.buffers())})
        cut: Any = next(one for one in self.network.modules() if isinstance(getattr(one, "up_blocks", None), nn.Module))
        cut.up_blocks = cut.up_blocks[: list(BLOCKS).index(block) + 1]
        cut.conv_norm_out, cut.conv_out = None, nn.Identity()

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        outputs: tuple[Tensor] = self.network(*inputs)
        return outputs


# What the largest number of a cotangent becomes in half precision: about the middle of 2^-4 to 2^14, over which the
# error of fp16 is the same (docs/measurements/2026-11-25-gradients.md).
LARGEST_COTANGENT = 2.0**4


def pulled_back(
    pull: Callable[[Tensor], tuple[Tensor, ...]], cotangent: Tensor, module: nn.Module
) -> tuple[Tensor, ...]:
    """`pull(cotangent)`, in which nothing vanishes where the weights of `module` are in half precision.

    A gradient is linear in its cotangent, row by row. So each row is scaled to the range that fp16 is exact in, and its
    gradients are scaled back in fp32: cotangents of any size have the same relative error.

    Args:
        pull: from the cotangent to the gradients.
        cotangent: float32 [B, C, h, w].
    """
    if all(one.dtype.itemsize > 2 for one in module.parameters()):
        return pull(cotangent)
    # A row of zeros stays one, and so does what is next to nothing.
    largest = cotangent.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    scale = LARGEST_COTANGENT / largest
    grads = pull(cotangent * scale)
    return tuple(grad / scale.reshape(-1, *[1] * (grad.ndim - 1)) for grad in grads)


class UnetVjp(nn.Module):
    """The UNet, or the start of it, and its vector-Jacobian product, by autograd.

    The UNet's inputs in order, then `cotangent`, shaped as the output `y`, and `cotangent_scale` [B] or [1] -> `y` and,
    for each name in `wrt`, the gradient with respect to it of the sum of `y * c`, where
    `c = cotangent + cotangent_scale * y` is held constant.

    With a scale, the gradient of a quadratic loss takes one call, for its cotangent is linear in the `y` of that same
    call: of |a * y + b|^2 it is 2a * b with a scale of 2a^2.

    Args:
        module: the network "unet" in torch, or `UnetFeatures` of it.
        wrt: names of its inputs.
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
        held = cotangent + cotangent_scale[:, None, None, None] * found
        return found, *pulled_back(lambda c: torch.autograd.grad(output, leaves, c), held, self.module)


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


def gradient_networks(unet: nn.Module, names: Collection[NetworkName]) -> dict[NetworkName, nn.Module]:
    """The networks of those names that are made of the UNet, in the form and on the weights of `torch_networks`.

    Args:
        unet: the network "unet" of `torch_networks`.
        names: of `contract.DERIVED`.
    """
    ends = {of: UnetFeatures(unet, of).eval() if of in BLOCKS else unet for of in {OF[name] for name in names}}
    return {name: UnetVjp(ends[OF[name]], WRT[name]).eval() if name in WRT else ends[OF[name]] for name in names}


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
        self._differentiating = ReadWriteLock()
        if network.name == "unet":
            known = {spec.name for spec in (*network.outputs, *network.within)}
            derived = {name: derived_contract(network, name) for name in OF if OF[name] in known}
            self.gradients = {name: partial(self._differentiated, one, module) for name, one in derived.items()}

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:  # noqa: ARG002
        module = self._opened()
        # Not inference_mode: its tensors could take no part in a caller's own autograd or in-place work.
        # Callers hand over and receive CPU tensors, as on every engine; a module being trained may live on a GPU.
        device = next(module.parameters()).device
        # `functional_call` swaps the module's weights while it runs, so two gradients of one module take turns.
        turn = self._differentiating.write() if self.network.name in WRT else nullcontext()
        with torch.no_grad(), turn:
            outputs = module(*(inputs[spec.name].to(device) for spec in self.network.inputs))
        return {
            spec.name: output.cpu().contiguous() for spec, output in zip(self.network.outputs, outputs, strict=True)
        }

    def attentions(self) -> list[Any]:
        found = [module for name, module in self._opened().named_modules() if name.endswith(".attn1")]
        if not found:
            raise EngineError(f"{self.network.name}: this UNet has no self-attention; leave out what asks for it")
        return found

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights into the module's parameters, in place; see `Engine.refit`."""
        with self._lock.write():
            put(self._opened(), weights)

    def _differentiated(self, network: Network, unet: nn.Module) -> EagerEngine:
        """The engine of a network of `gradient_networks`; its weights are this engine's, and so are its locks."""
        engine = EagerEngine(network, gradient_networks(unet, [network.name])[network.name])
        engine._lock, engine._differentiating = self._lock, self._differentiating
        return engine

    def _opened(self) -> nn.Module:
        if self._module is None:
            raise EngineError(self._said_closed)
        return self._module

    def close_impl(self) -> None:
        """Let go of the module; its owner may still hold it."""
        self._module, self.gradients = None, {}
