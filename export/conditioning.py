"""How well a gradient can be known in a precision, item by item, whatever computes it.

Here and there a UNet's gradient is ill-conditioned: where the softmax of an attention is nearly saturated, or along a
path that the model never saw, a rounding of what flows between its layers changes the gradient by a tenth or by all
of it. In such an item no engine of that precision agrees with torch in fp32, nor does torch's own autograd in it; so
an error there tells of the item, and not of the engine (docs/measurements/2026-11-25-gradients.md).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engines.contract import Network

__all__ = ["DRAWS", "MORE_DRAWS", "Conditioning", "item_errors"]

# Of what is inherent in an item this many times is let pass: of the largest of six draws. In half precision torch's own
# autograd in fp16 was at most 1.9 times as far off, in 144 items of the default model. In fp32 a layer's sums, which
# each engine takes in an order of its own, are off by more than the one rounding of a draw; torch's own error, by
# float64, is one draw more, which may be a lucky one: OpenVINO was 15 times as far off as that, and 4 times as far as
# the largest of six.
ROUNDING = 10
HALF_ROUNDING = 4
DRAWS = 6
# Such draws have a long tail: in one item the median of 40 was 0.020 and the largest 0.29. So before an engine is
# refused by six, there are this many.
MORE_DRAWS = 30
SEED = 5
UNITS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # the largest relative change by a rounding


class Conditioning:
    """What the precision of a graph keeps of the outputs of a torch module, at given inputs.

    Args:
        module: the torch form of a network, in fp32 on the CPU; it stays as it is.
        network: its contract.
        precision: of the graph.
    """

    def __init__(self, module: nn.Module, network: Network, precision: str) -> None:
        self._module, self._network = module, network
        self._unit = UNITS[precision]
        self._single = precision == "fp32"
        self._double: nn.Module | None = None

    def allowance(
        self, inputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], each: int, draws: int = DRAWS
    ) -> dict[str, Tensor]:
        """By output, the relative L2 error [B] that an engine may have of each item, however small its tolerance.

        It is a multiple of how far the fp32 outputs move when what flows into the network and out of each of its
        layers, on the way forwards and back, is changed by no more than a rounding in that precision; in fp32 of
        torch's own error, by float64, where that is more.

        Args:
            inputs: float32 [B, ...], by name.
            wanted: the module's outputs of them.
            each: rows of a call of the module.
            draws: of such changes; the largest counts. The first ones are the same for any number.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for row in range(0, len(next(iter(wanted.values()))), each):
            rows = slice(row, row + each)
            generator = torch.Generator().manual_seed(SEED)
            given = [inputs[spec.name][rows] for spec in self._network.inputs]
            moved = [self._disturbed(given, generator) for _ in range(draws)]
            if self._single:
                moved.append(self._exact(given))
            for name, of in wanted.items():
                errors = [item_errors(one[name], of[rows]) for one in moved]
                found[name].append((ROUNDING if self._single else HALF_ROUNDING) * torch.stack(errors).amax(0))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _exact(self, given: list[Tensor]) -> dict[str, Tensor]:
        """The outputs in float64."""
        self._double = self._double or copy.deepcopy(self._module).double()
        return self._named(self._double(*(one.double() if one.is_floating_point() else one for one in given)))

    def _disturbed(self, given: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The outputs, each layer's result changed by up to a rounding; autograd changes its gradient by as much."""
        unit = self._unit

        def changed(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value * (1 + unit * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float32) - 1))

        layers = [one for one in self._module.modules() if next(one.children(), None) is None]
        hooks = [layer.register_forward_hook(lambda _, __, output: changed(output)) for layer in layers]
        try:
            return self._named(self._module(*map(changed, given)))
        finally:
            for one in hooks:
                one.remove()

    def _named(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {spec.name: output for spec, output in zip(self._network.outputs, outputs, strict=True)}


def item_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """The relative L2 error of each item [B], in float64."""
    difference, norms = (one.double().flatten(1).norm(dim=1) for one in (got.double() - wanted, wanted))
    # An output of zeros alone is met by zeros alone.
    return torch.where(norms > 0, difference / norms.clamp(min=1e-300), difference)
