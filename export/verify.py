"""Is a built graph the torch module? Every output, on fresh random inputs of several sizes, against fp32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from engines.base import Engine
from engines.contract import DERIVED, WRT, Dims, Network
from engines.eager import EagerEngine
from engines.errors import InputError, ModelError, ParityError
from engines.manifest import Parity
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
# Here and there a gradient is ill-conditioned: torch's own in fp32 lies up to 1e-2 from its own in float64 on the
# default model, where most lie within 1e-5. Of such an item this many times torch's own error is let pass.
ROUNDING = 10


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
        ParityError: an output is over its tolerance or not finite; the message names it, the error and the sizes.
        ModelError: the torch module itself gives numbers that are not finite.
        InputError: no tolerance is known for `precision`.
    """
    if precision not in TOLERANCES:
        raise InputError(f"precision {precision!r}: unknown; choose from {', '.join(TOLERANCES)}")
    tolerance = TOLERANCES[precision]
    generator = torch.Generator().manual_seed(seed)
    reference = EagerEngine(network, module)
    found: dict[str, Parity] = {}
    double: nn.Module | None = None
    tried = tried or cases(network, dims)
    for case in tried:
        inputs = random_inputs(network, dims, case, generator)
        wanted = _in_parts(reference.infer, inputs, case)
        got = engine.infer(**inputs)
        exact: dict[str, Tensor] = {}
        for spec in network.outputs:
            limits = torch.full((len(wanted[spec.name]),), tolerance, dtype=torch.float64)
            if network.name in WRT and bool((_errors(got[spec.name], wanted[spec.name]) > tolerance).any()):
                double = double or copy.deepcopy(module).double()
                exact = exact or _in_parts(partial(_outputs, double, network), inputs, case)
                limits = limits.maximum(ROUNDING * _errors(wanted[spec.name], exact[spec.name]))
            parity = _compare(
                engine, network, spec.name, got[spec.name], wanted[spec.name], limits, case.sizes, precision
            )
            before = found.get(spec.name)
            if before is None:
                found[spec.name] = parity.model_copy(update={"cases": len(tried)})
                continue
            worse = parity if parity.relative > before.relative else before
            largest = max(parity.max_abs, before.max_abs)
            found[spec.name] = worse.model_copy(update={"cases": len(tried), "max_abs": largest})
        if compared is not None:
            compared()
    return list(found.values())


def _in_parts(run: Callable[..., dict[str, Tensor]], inputs: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """What `run` gives for all of a case's rows, a few rows a call."""
    rows = case.sizes["batch"]
    cells = math.prod(size for symbol, size in case.sizes.items() if symbol in ("height", "width"))
    each = max(1, CELLS_PER_CALL // cells)
    found = [run(**{name: one[row : row + each] for name, one in inputs.items()}) for row in range(0, rows, each)]
    return {name: torch.cat([outputs[name] for outputs in found]) for name in found[0]}


def _errors(got: Tensor, wanted: Tensor) -> Tensor:
    """The relative L2 error of each item."""
    difference, norms = (one.double().flatten(1).norm(dim=1) for one in (got.double() - wanted, wanted))
    # An output of zeros alone is met by zeros alone.
    return torch.where(norms > 0, difference / norms.clamp(min=1e-300), difference)


def _outputs(module: nn.Module, network: Network, **inputs: Tensor) -> dict[str, Tensor]:
    """Of a module in float64."""
    given = (inputs[spec.name] for spec in network.inputs)
    outputs = module(*(one.double() if one.is_floating_point() else one for one in given))
    return {spec.name: output for spec, output in zip(network.outputs, outputs, strict=True)}


def _compare(
    engine: Engine,
    network: Network,
    name: str,
    got: Tensor,
    wanted: Tensor,
    limits: Tensor,
    sizes: dict[str, int],
    precision: str,
) -> Parity:
    at = ", ".join(f"{symbol} {sizes[symbol]}" for symbol in network.symbols)
    mend = "choose another backend" if precision == "fp32" else "choose another backend or --precision fp32"
    mend += ", or leave --gradients out" if network.name in DERIVED else ""
    if not wanted.isfinite().all():
        raise ModelError(f"{network.name}: the torch module's {name} is not finite ({at}); its weights are damaged")
    if not got.isfinite().all():
        raise ParityError(
            f"{network.name}: {engine.backend}'s {name} is not finite ({at}) and torch's is; not published, {mend}"
        )
    errors = _errors(got, wanted)
    # Of the item that is furthest over its tolerance, or nearest to it.
    item = int((errors / limits).argmax())
    relative, tolerance = float(errors[item]), float(limits[item])
    if relative > tolerance:
        raise ParityError(
            f"{network.name}: {engine.backend}'s {name} differs from torch's by {relative:.1e} ({at}), tolerance "
            f"{tolerance:.0e}; not published, {mend}"
        )
    return Parity(
        output=name,
        relative=relative,
        max_abs=float((got.double() - wanted.double()).abs().max()),
        tolerance=tolerance,
        cases=1,
        worst={symbol: sizes[symbol] for symbol in network.symbols},
    )
