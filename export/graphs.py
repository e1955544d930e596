"""Each network's shapes for the exporter, and inputs for tracing and for verification, all read from its contract."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from engines.contract import LORA_STRENGTH, TEXT, WRT, Axis, Dims, Network
from engines.variant import Bounds

__all__ = ["Case", "cases", "dynamic_shapes", "example_inputs", "random_inputs"]

# torch.export proves the graph for 1..63: 64 clashes with a guard. The graph itself has a free batch axis.
TRACED_BATCH_MAX = 63
LATENT_SCALES = (1.0, 5.5, 3.0)
STRENGTHS = (1.0, 0.0, 0.6)  # of a LoRA: as trained, none, and one that halves round
TRAIN_TIMESTEPS = 1000  # the timesteps that every Stable Diffusion was trained at: 0..999
# By the row of all. The first one's is a draw, as one that may be alone. Of a UNet's gradients all are: of random
# latents most at 0 are ill-conditioned (export/conditioning.py), so that they would tell nothing.
ENDS = {1: 0, 2: TRAIN_TIMESTEPS - 1}
# Latent cells of a case that gradients of free sizes are verified at: two rows of 32 by 32. Of SD1.5 those took 16 GiB
# on OpenVINO, and one row of 64 by 64 more than 18 (docs/measurements, "Gradient graphs").
GRADIENT_CELLS = 2_048


@dataclass(frozen=True)
class Case:
    """One set of inputs for verification: the size of each symbol, how large latents are (standard deviation), how
    many rows came before, since a LoRA's strengths take turns over all of them and two of them have the first and the
    last timestep, and whether the two halves of the rows differ in their text alone, as guidance makes them."""

    sizes: dict[str, int]
    latent_scale: float
    rows_before: int = 0
    guided: bool = False


def dynamic_shapes(network: Network, module: nn.Module) -> tuple[Any, ...]:
    """For each input in order, the symbolic dimension of each axis that a caller chooses, as torch takes it for
    `module`: one tuple of them all where its `forward` takes any number of inputs.

    A side that must be a multiple of m is the derived dimension m * Dim: diffusers then sees that every halving comes
    out even and takes the branch that hands no sizes to its upsamplers. A shared input has its one row.
    """
    roots = {symbol: Dim(symbol) for symbol in network.symbols if symbol != "batch"}
    roots["batch"] = Dim("batch", min=1, max=TRACED_BATCH_MAX)

    def dimension(axis: Axis) -> Any:
        multiple = axis.of(network.multiples.get(axis.symbol, 1))
        return roots[axis.symbol] if multiple == 1 else multiple * roots[axis.symbol]

    shapes = tuple(
        {index: dimension(axis) for index, axis in enumerate(spec.axes) if isinstance(axis, Axis)}
        if not spec.shared
        else {}
        for spec in network.inputs
    )
    taken = inspect.signature(module.forward).parameters.values()
    return (shapes,) if any(one.kind is one.VAR_POSITIONAL for one in taken) else shapes


def _unit(network: Network) -> int:
    """What latent sides are multiples of."""
    return max(network.multiples.values(), default=1)


def example_inputs(network: Network, dims: Dims) -> tuple[Tensor, ...]:
    """Inputs to trace with: a batch of 2 and unlike sides, so that no axis is taken for another or for a 1.

    Of what one row may serve the whole batch, it is one row: diffusers' own expansion to the batch then stays in the
    graph, and of a full batch of rows it makes the same rows.
    """
    unit = _unit(network)
    side = dims.supported_latent_size[0]
    sizes = {"batch": 2, "height": side + unit, "width": side + 2 * unit}
    inputs = random_inputs(network, dims, Case(sizes, 1.0), torch.Generator().manual_seed(0))
    return tuple(inputs[spec.name][:1] if spec.shared else inputs[spec.name] for spec in network.inputs)


def cases(network: Network, dims: Dims, bounds: Sequence[Bounds] = ()) -> tuple[Case, ...]:
    """What an engine is verified at: every corner of its bounds, the point that it shall be fastest at, and one inside
    where that is on an edge.

    Where a side has no end, batches of 1, 2 and 3; the default size, a larger one and a smaller, unlike sides.
    Gradients of a large model are verified at smaller sizes, of at most `GRADIENT_CELLS`, for the sake of memory.
    Latents of a VAE are `1 / scaling_factor` large (5.5 for SD1.x), those of the UNet about 1: both are covered.
    A UNet is built for calls with and without guidance, so its rows are three at least, one for each of `STRENGTHS`.
    Its first case of two halves comes as guidance makes it as well: an engine may compute what they share once.
    """
    found = [case for one in bounds or [{}] for case in (_corners(network, one) or _spread(network, dims))]
    distinct = list({tuple(case.sizes.items()): case for case in found}.values())
    if network.name == "unet":
        distinct += [replace(case, guided=True) for case in distinct if case.sizes["batch"] % 2 == 0][:1]
    before = itertools.accumulate((case.sizes["batch"] for case in distinct), initial=0)
    return tuple(replace(case, rows_before=rows) for case, rows in zip(distinct, before, strict=False))


def _corners(network: Network, bounds: Bounds) -> list[Case]:
    """The corners, the point to be fastest at and one inside; none if a symbol has no end."""
    ends = [(least, most) for least, _, most in bounds.values() if most is not None]
    if not ends or len(ends) < len(bounds):
        return []
    best = tuple(best for _, best, _ in bounds.values())
    inside = tuple(
        one if least < one < most else _between(least, one, most, network.multiples.get(symbol, 1))
        for symbol, one, (least, most) in zip(bounds, best, ends, strict=True)
    )
    points = dict.fromkeys([*itertools.product(*ends), best, inside])
    scales = itertools.cycle(LATENT_SCALES)
    return [Case(dict(zip(bounds, point, strict=True)), next(scales)) for point in points]


def _between(least: int, best: int, most: int, unit: int) -> int:
    """The multiple of `unit` in the middle; `best` where there is none between the ends."""
    steps = (most - least) // (2 * unit)
    return least + steps * unit if steps else best


def _spread(network: Network, dims: Dims) -> list[Case]:
    (height, width), unit = dims.supported_latent_size, _unit(network)
    other = (height + unit, width + 2 * unit)
    if network.name in WRT and 2 * math.prod(other) > GRADIENT_CELLS:
        height = width = max(unit, min(height, width, math.isqrt(GRADIENT_CELLS // 2) // unit * unit))
        other = (max(unit, height - unit), width)
    smaller = max(unit, width // (2 * unit) * unit)
    sizes = [
        {"batch": 1, "height": height, "width": width},
        {"batch": 2, "height": other[0], "width": other[1]},
        {"batch": 3, "height": height, "width": smaller},
    ]
    return [Case(size, scale) for size, scale in zip(sizes, LATENT_SCALES, strict=True)]


def random_inputs(network: Network, dims: Dims, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs that look like a real run's, by name.

    Token ids span the vocabulary; timesteps are spread over 0..999 (of a UNet the second row of all has 0 and
    the third 999); images lie in -1..1; text embeddings have the unit scale of the text encoder's last layer norm; the
    UNet's latents have unit scale as noised latents do, the VAE decoder's have `case.latent_scale`. A LoRA's strength
    is one of `STRENGTHS`, row by row. Of a guided case the second half of the rows has the first half's, but for the
    text.
    """
    inputs: dict[str, Tensor] = {}
    for spec in network.inputs:
        shape = spec.shape(case.sizes)
        if spec.name == "input_ids":
            inputs[spec.name] = torch.randint(0, dims.vocabulary, shape, generator=generator, dtype=torch.int32)
        elif spec.name == "timestep":
            # One draw from each equal part of 0..999, the first case's alone being anywhere.
            part = TRAIN_TIMESTEPS / shape[0]
            drawn = (torch.arange(shape[0]) + torch.rand(shape, generator=generator, dtype=torch.float32)) * part
            timesteps = drawn.long().clamp(max=TRAIN_TIMESTEPS - 1)
            if network.name == "unet":
                for row in range(shape[0]):
                    timesteps[row] = ENDS.get(case.rows_before + row, timesteps[row])
            inputs[spec.name] = timesteps
        elif spec.name == LORA_STRENGTH:
            turns = range(case.rows_before, case.rows_before + shape[0])
            inputs[spec.name] = torch.tensor([STRENGTHS[turn % len(STRENGTHS)] for turn in turns], dtype=torch.float32)
        elif network.name == "vae_encoder":
            inputs[spec.name] = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        else:
            scale = case.latent_scale if network.name == "vae_decoder" else 1.0
            inputs[spec.name] = scale * torch.randn(shape, generator=generator, dtype=torch.float32)
    if case.guided:
        half = case.sizes["batch"] // 2
        inputs = {name: x if name == TEXT else torch.cat([x[:half]] * 2) for name, x in inputs.items()}
    return inputs
