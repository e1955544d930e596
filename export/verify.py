"""Is a built graph the torch module? Every output, on fresh random inputs of several sizes, against fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import DERIVED, WRT, Dims, Network
from engines.eager import EagerEngine
from engines.errors import InputError, ModelError, ParityError
from engines.manifest import LARGEST_TOLERANCE, Parity
from export.conditioning import DRAWS, MORE_DRAWS, Conditioning, item_errors
from export.graphs import Case, cases, random_inputs

__all__ = ["TOLERANCES", "verify"]

# The greatest relative L2 error of one item of a batch, by precision of the graph.
TOLERANCES: dict[str, float] = {
    # The same arithmetic in another order: single-precision rounding (6e-8) grows to about 1e-6 through a UNet
    # (measured 1e-6 to 3e-6 on SD1.5), so 1e-4 leaves room for ill-conditioned weights. What must be caught lies far
    # above: bf16 by accident shows as 2e-2, a wrong branch or layout as 1.
    "fp32": 1e-4,
    # Ten bits of mantissa: a rounding is 5e-4, and a UNet of some hundred layers gathers a few thousandths.
    "fp16": 2e-2,
    # Seven bits: a rounding is 4e-3. Measured 2e-2 on SD1.5 with random weights.
    "bf16": 1e-1,
    # Eight bits for values and weights. What a step's error does to an image is seen in the image alone, so this
    # holds off what is broken; `smooth-rt engines verify --images` tells the rest. Measured 6e-2 on the default model
    # and 5e-2 on SD1.5 with random weights.
    "int8": 2.5e-1,
}
# Latent cells of a call of the torch module: one image of 512 pixels, of which SD1.5's VAE takes a GiB. Its rows are
# independent, so that a batch goes in parts and the engine alone needs the memory for the whole.
CELLS_PER_CALL = 4_096
# Of a gradient's item that is ill-conditioned, more is let pass: `Conditioning.allowance`. Where that is beyond this,
# the precision keeps so little of the item that it says nothing of an engine: one that gives zeros is 1 off.
JUDGED = LARGEST_TOLERANCE
# So of each gradient at least this share of the items must be judged; more are drawn until it is, this many times.
SHARE = 1 / 3
ROUNDS = 4


def verify(
    engine: Engine,
    module: nn.Module,
    network: Network,
    dims: Dims,
    precision: str,
    seed: int,
    tried: Sequence[Case] = (),
    compared: Callable[[], None] | None = None,
) -> list[Parity]:
    """Compare `engine` with `module` in fp32; one Parity for each output, the worst over all cases.

    A gradient's item is held to what the graph's precision can keep of it, and left out where that is next to nothing;
    then the cases are gone through again, on other inputs, until a third of all items was judged.

    Args:
        engine: opened through the same classes that users run.
        module: the torch form of the network, with fp32 weights on the CPU.
        network: the contract.
        dims: the model's sizes.
        precision: of the graph; it chooses the tolerance.
        seed: of the inputs.
        tried: the cases; none stands for `graphs.cases`, those that a bundle is built with.
        compared: called after each case.

    Raises:
        ParityError: an output is over its tolerance or not finite, or the precision keeps too little of the model's own
            gradient; the message names it, the error and the sizes.
        ModelError: the torch module itself gives numbers that are not finite.
        InputError: no tolerance is known for `precision`.
    """
    if precision not in TOLERANCES:
        raise InputError(f"precision {precision!r}: unknown; choose from {', '.join(TOLERANCES)}")
    generator = torch.Generator().manual_seed(seed)
    comparison = _Comparison(engine, module, network, precision)
    tried = tried or cases(network, dims)
    for turn in range(ROUNDS):
        for case in tried:
            comparison.add(case, random_inputs(network, dims, case, generator))
            if compared is not None and turn == 0:
                compared()
        if not comparison.unjudged():
            break
    return comparison.result()


class _Comparison:
    """An engine beside the torch module, case by case."""

    def __init__(self, engine: Engine, module: nn.Module, network: Network, precision: str) -> None:
        self._engine, self._network, self._precision = engine, network, precision
        self._reference = EagerEngine(network, module)
        self._gradients = [spec.name for spec in network.outputs[1:]] if network.name in WRT else []
        self._conditioning = Conditioning(module, network, precision) if self._gradients else None
        self._worst: dict[str, Parity] = {}
        self._judged = dict.fromkeys((spec.name for spec in network.outputs), 0)
        self._items = self._cases = 0

    def add(self, case: Case, inputs: dict[str, Tensor]) -> None:
        """Compare every output at `inputs`."""
        each = _rows(case)
        wanted, got = _in_parts(self._reference.infer, inputs, each), self._engine.infer(**inputs)
        self._check_finite(wanted, got, case)
        tolerance = TOLERANCES[self._precision]
        errors = {name: item_errors(got[name], wanted[name]) for name in self._judged}
        limits = {name: torch.full_like(found, tolerance) for name, found in errors.items()}
        # What is over is held against what the precision keeps; and what is still over, against more draws of that.
        for draws in (DRAWS, MORE_DRAWS):
            over = any(bool(self._over(errors[name], limits[name]).any()) for name in self._gradients)
            if over and self._conditioning is not None:
                allowed = self._conditioning.allowance(inputs, wanted, each, draws)
                limits |= {name: limits[name].maximum(allowed[name]) for name in self._gradients}
        for name, found in errors.items():
            largest = float((got[name].double() - wanted[name].double()).abs().max())
            self._judge(name, found, limits[name], largest, case)
        self._cases += 1
        self._items += len(next(iter(errors.values())))

    @staticmethod
    def _over(errors: Tensor, limits: Tensor) -> Tensor:
        """Which items judge against the engine."""
        return (errors > limits) & (limits <= JUDGED)

    def unjudged(self) -> list[str]:
        """The gradients of which too few items were judged."""
        return [name for name in self._gradients if self._judged[name] < SHARE * self._items]

    def result(self) -> list[Parity]:
        """One a output.

        Raises:
            ParityError: a gradient could not be judged.
        """
        if self.unjudged():
            raise ParityError(
                f"{self._network.name}: rounding in {self._precision} leaves next to nothing of the model's own "
                f"{', '.join(self.unjudged())}; {self._mend}"
            )
        return [
            parity.model_copy(update={"cases": self._cases, "unjudged": self._items - self._judged[name]})
            for name, parity in self._worst.items()
        ]

    def _check_finite(self, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], case: Case) -> None:
        name = self._network.name
        for output in self._judged:
            if not wanted[output].isfinite().all():
                raise ModelError(
                    f"{name}: the torch module's {output} is not finite ({self._at(case)}); its weights are damaged"
                )
            if not got[output].isfinite().all():
                raise ParityError(
                    f"{name}: {self._engine.backend}'s {output} is not finite ({self._at(case)}) and torch's is; "
                    f"{self._mend}"
                )

    def _judge(self, name: str, errors: Tensor, limits: Tensor, largest: float, case: Case) -> None:
        """Hold the items of an output to their limits; those that tell nothing are passed over."""
        kept = limits <= JUDGED
        self._judged[name] += int(kept.sum())
        # The item that is furthest over its limit, or nearest to it.
        item = int(torch.where(kept, errors / limits, -1.0).argmax())
        if not kept[item]:
            return
        relative, tolerance = float(errors[item]), float(limits[item])
        if relative > tolerance:
            raise ParityError(
                f"{self._network.name}: {self._engine.backend}'s {name} differs from torch's by {relative:.1e} "
                f"({self._at(case)}), tolerance {tolerance:.0e}; {self._mend}"
            )
        sizes = {symbol: case.sizes[symbol] for symbol in self._network.symbols}
        before = self._worst.get(name)
        if before is None or relative > before.relative:
            parity = Parity(output=name, relative=relative, max_abs=largest, tolerance=tolerance, cases=1, worst=sizes)
        else:
            parity = before
        largest = largest if before is None else max(largest, before.max_abs)
        self._worst[name] = parity.model_copy(update={"max_abs": largest})

    def _at(self, case: Case) -> str:
        return ", ".join(f"{symbol} {case.sizes[symbol]}" for symbol in self._network.symbols)

    @property
    def _mend(self) -> str:
        mend = "choose another backend" if self._precision == "fp32" else "choose another backend or --precision fp32"
        return mend + (", or leave --gradients out" if self._network.name in DERIVED else "")


def _rows(case: Case) -> int:
    """Of a call of the torch module."""
    cells = math.prod(size for symbol, size in case.sizes.items() if symbol in ("height", "width"))
    return max(1, CELLS_PER_CALL // cells)


def _in_parts(run: Callable[..., dict[str, Tensor]], inputs: Mapping[str, Tensor], each: int) -> dict[str, Tensor]:
    """What `run` gives for all rows, `each` rows a call."""
    rows = len(next(iter(inputs.values())))
    found = [run(**{name: one[row : row + each] for name, one in inputs.items()}) for row in range(0, rows, each)]
    return {name: torch.cat([outputs[name] for outputs in found]) for name in found[0]}
