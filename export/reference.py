"""The torch modules that engines are held to, in the form that a variant's way of holding the LoRA asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from engines.base import Engine
from engines.contract import DERIVED, Dims, Network, NetworkName
from engines.eager import gradient_networks
from engines.lora import LoraWeights, put
from engines.manifest import Parity
from engines.recipes import Recipe
from engines.runtime_lora import RuntimeUnet
from engines.select import open_engine
from engines.variant import Place, Variant
from export.graphs import Case
from export.verify import verify

__all__ = ["Reference"]

STRENGTHS = (0.0, 1.0)  # that replaced weights are compared at


@dataclass(frozen=True)
class Reference:
    """A model's networks, and its LoRA where that is not in their weights.

    Args:
        networks: `engines.eager.torch_networks` of the model; of the base model where there is a `lora`.
        lora: of variants whose LoRA is set as they run.
    """

    networks: Mapping[NetworkName, nn.Module]
    lora: LoraWeights | None = None

    @cached_property
    def _runtime(self) -> nn.Module:
        assert self.lora is not None
        return RuntimeUnet(self.networks["unet"], self.lora)

    def module(self, variant: Variant, name: NetworkName) -> nn.Module:
        """The torch form of a network: `forward` takes the inputs of `variant.network(name, …)`."""
        if name in DERIVED:
            return gradient_networks(self.module(variant, "unet"), [name])[name]
        return self._runtime if variant.takes_strength(name) else self.networks[name]

    def verify(
        self,
        engine: Engine,
        variant: Variant,
        network: Network,
        dims: Dims,
        precision: str,
        seed: int,
        tried: Sequence[Case],
        compared: Callable[[], None] | None = None,
    ) -> list[Parity]:
        """As `verify.verify`, at several strengths of the LoRA where an engine takes any: the worst error of each
        output."""
        module = self.module(variant, network.name)
        found = [
            verify(engine, module, network, dims, precision, seed, tried, compared)
            # What is derived from the UNet shares its weights.
            for _ in _strengths(engine, self.networks["unet"], self._replaced(variant, network.name))
        ]
        return [max(errors, key=lambda one: one.relative) for errors in zip(*found, strict=True)]

    def verify_plain(
        self,
        path: Path,
        variant: Variant,
        network: Network,
        dims: Dims,
        recipe: Recipe,
        places: Mapping[str, Place],
        seed: int,
        case: Case,
        compared: Callable[[], None] | None = None,
    ) -> list[str]:
        """Hold the plain graph at `path`, which others open in the place of a rewritten one, to torch as well.

        Returns:
            each output with its relative error, for the manifest's notes as `plain_graph`.

        Raises:
            as `verify` and `open_engine` do.
        """
        with open_engine(variant.backend, network, path, recipe.hint) as engine:
            engine.places = places
            found = self.verify(engine, variant, network, dims, recipe.precision, seed, [case], compared)
        return [f"{one.output} {one.relative:.1e}" for one in found]

    def rounds(self, variant: Variant, name: NetworkName) -> int:
        """How often `verify` goes through its cases."""
        return 1 if self._replaced(variant, name) is None else len(STRENGTHS)

    def _replaced(self, variant: Variant, name: NetworkName) -> LoraWeights | None:
        """The LoRA whose weights are put into an engine."""
        return self.lora if variant.lora_mode == "refit" and name in ("unet", *DERIVED) else None


def _strengths(engine: Engine, module: nn.Module, lora: LoraWeights | None) -> Iterator[float]:
    """The strengths to compare at; the module holds the base weights again at the end."""
    if lora is None:
        yield 1.0
        return
    try:
        for strength in STRENGTHS:
            weights = lora.at(strength)
            put(module, weights)
            engine.refit(weights)
            yield strength
    finally:
        put(module, lora.base)
