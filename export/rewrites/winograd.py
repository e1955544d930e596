"""3x3 convolutions with fewer multiplications: minimal filtering, as a rewrite of an OpenVINO graph of fixed sides.

A tile of m x m outputs of a 3x3 convolution depends on (m+2) x (m+2) inputs d. With Cook and Toom's matrices it is

    Y = A^T [ (G g G^T) * (B^T d B) ] A          (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks,
                                                  CVPR 2016, eq. 8; * is element by element)

and summed over channels, each of the (m+2)^2 elements is a matrix product of all tiles with weights that are
transformed once, here. F(4x4, 3x3) multiplies 36 times where the direct form does 144 times, F(2x2, 3x3) 16 for 36.

The points of interpolation are those of Barabasz et al. (Error Analysis and Improving the Accuracy of Winograd
Convolution for Deep Neural Networks, 2020): with them the error in fp32 is about that of the direct form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import opset13 as ops

from engines import kernels

__all__ = ["TILES", "cook_toom", "tile", "winograd"]

KERNEL = 3
# By m. Powers of two cost no rounding; half and its negative inverse keep the matrices' entries small.
TILES: dict[int, tuple[Fraction, ...]] = {
    6: (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-1, 2), Fraction(2), Fraction(-2)),
    4: (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2)),
    2: (Fraction(0), Fraction(1), Fraction(-1)),
}
# Tiles of 6x6 pay where the transforms cost next to nothing (docs/experiments/native-kernels.md).
OPERATIONS, NATIVE = (4, 2), (6, 4, 2)
# Measured (docs/experiments/winograd.md). The weights are (m+2)^2 / 9 times as large and are read once for all tiles,
# so few tiles do not pay for them. Multiplications are saved by pair of channels, transforms cost by channel.
LEAST_TILES = 32
LEAST_PAIRS = 80  # inputs * outputs / (inputs + outputs)

Matrix = NDArray[np.float64]


@cache
def cook_toom(size: int) -> tuple[Matrix, Matrix, Matrix]:
    """A^T [m, m+2], G [m+2, 3] and B^T [m+2, m+2] of F(m, 3), the last point at infinity.

    Args:
        size: m, one of `TILES`.
    """
    points = TILES[size]
    outputs = [[*(point**power for point in points), Fraction(power == size - 1)] for power in range(size)]
    kernel, inputs = [], []
    for index, point in enumerate(points):
        others = points[:index] + points[index + 1 :]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        kernel.append([point**power / scale for power in range(KERNEL)])
        inputs.append([*_polynomial(others), Fraction(0)])
    kernel.append([Fraction(0)] * (KERNEL - 1) + [Fraction(1)])
    inputs.append(_polynomial(points))
    return _floats(outputs), _floats(kernel), _floats(inputs)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of the product of (x - root), that of x^0 first."""
    found = [Fraction(1)]
    for root in roots:
        raised = [Fraction(0), *found]
        found = [high - root * low for high, low in zip(raised, [*found, Fraction(0)], strict=True)]
    return found


def _floats(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return np.array([[float(entry) for entry in row] for row in rows])


def tile(
    rows: int, inputs: int, outputs: int, height: int, width: int, sides: Sequence[int] = OPERATIONS
) -> int | None:
    """The tile's side that a convolution of these sizes gains from most: that with the fewest multiplications, the
    smallest of equals. None where the direct form is as fast.

    Args:
        rows: of the batch; `inputs` and `outputs`: channels; `height` and `width`: of the output.
        sides: to choose from.
    """
    if inputs * outputs < LEAST_PAIRS * (inputs + outputs):
        return None
    tiles = {m: -(-height // m) * -(-width // m) for m in sides}
    able = [m for m in sorted(sides) if rows * tiles[m] >= LEAST_TILES]
    return min(able, key=lambda m: tiles[m] * (m + KERNEL - 1) ** 2, default=None)


def winograd(model: Any, shapes: Mapping[str, Sequence[int]], rows: int, native: bool = False) -> Counter[int]:
    """Replace the convolutions of `model` that gain by it, in place; how many, by the side of the tile.

    Taken are 3x3 convolutions of stride 1 that keep height and width, with constant weights.

    Args:
        model: an `openvino.Model` that is computed in fp32: in fewer bits the transforms lose what they gain.
        shapes: of the inputs, by name. The sides are fixed by them from now on; the batch may stay free, -1.
        rows: of the batch, for which the gain is reckoned.
        native: whether the transforms are made by this project's own kernels (engines/native/winograd.hpp) or by
            OpenVINO's operations, some 75 a convolution.

    Raises:
        EngineError: the kernels cannot be compiled here.
    """
    form, sides = (_by_kernels, NATIVE) if native else (_by_operations, OPERATIONS)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    hits: Counter[int] = Counter()
    for node in model.get_ordered_ops():
        size = _size(node, rows, sides)
        if size is None:
            continue
        fresh = form(node.input_value(0), _constant(node).data, size)
        fresh.get_node().set_friendly_name(node.get_friendly_name())
        fresh.get_tensor().set_names(node.output(0).get_names())  # by which the result can be asked for
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(fresh)
        hits[size] += 1
    if hits:
        model.validate_nodes_and_infer_types()
    return hits


def _size(node: Any, rows: int, sides: Sequence[int]) -> int | None:
    """The side of the tile for a node that shall be replaced, else None."""
    if node.get_type_name() != "Convolution":
        return None
    shape = node.output(0).get_partial_shape()
    outputs, inputs, *kernel = node.input_value(1).get_partial_shape()
    once = all(
        list(values) == [1, 1]
        for values in (node.get_strides(), node.get_dilations(), node.get_pads_begin(), node.get_pads_end())
    )
    fixed = len(kernel) == 2 and not any(axis.is_dynamic for axis in (*list(shape)[1:], outputs, inputs, *kernel))
    if not (once and fixed) or [axis.get_length() for axis in kernel] != [KERNEL] * 2 or _constant(node) is None:
        return None
    height, width = (axis.get_length() for axis in list(shape)[2:])
    return tile(rows, inputs.get_length(), outputs.get_length(), height, width, sides)


def _constant(node: Any) -> Any:
    """The constant that holds a convolution's weights in fp32; None if they are computed or stored otherwise."""
    source = node.input_value(1).get_node()
    fp32 = source.get_type_name() == "Constant" and source.get_element_type().get_type_name() == "f32"
    return source if fp32 else None


def _by_kernels(source: Any, weights: NDArray[np.float32], size: int) -> Any:
    """As `_by_operations`."""
    outputs, _, inputs = cook_toom(size)
    height, width = (axis.get_length() for axis in list(source.get_partial_shape())[2:])
    sides = {"height": height, "width": width}
    create = kernels.operations().create
    cells = create("WinogradInput", [source], {"matrix": inputs.ravel().tolist(), "rows": len(inputs), **sides})
    weighed = _transformed(weights, size)
    products = [
        ops.matmul(cell, ops.constant(weight, shared_memory=True), False, True).output(0)
        for cell, weight in zip(cells.outputs(), weighed.reshape(-1, *weighed.shape[2:]), strict=True)
    ]
    return create(
        "WinogradOutput", products, {"matrix": outputs.ravel().tolist(), "rows": len(outputs), **sides}
    ).output(0)


def _by_operations(source: Any, weights: NDArray[np.float32], size: int) -> Any:
    """The output [N, K, H, W] of the convolution of `source` [N, C, H, W] with `weights` [K, C, 3, 3].

    Within, channels come last, so that every step works on whole rows of channels. Each product has a constant of its
    own: so OpenVINO packs them when it opens the graph, not at each call.
    """
    outputs, _, inputs = cook_toom(size)
    channels, height, width = (axis.get_length() for axis in list(source.get_partial_shape())[1:])
    results = weights.shape[0]
    down, across = -(-height // size), -(-width // size)
    side = size + KERNEL - 1

    # One more tile than there are, for the two inputs that a tile shares with the next one.
    last = ops.transpose(source, _ints(0, 2, 3, 1))
    below, right = down * size - height + size - 1, across * size - width + size - 1
    padded = ops.pad(last, _ints(0, 1, 1, 0), _ints(0, below, right, 0), "constant", _number(0.0))
    cut = ops.reshape(padded, _ints(-1, down + 1, size, (across + 1) * size * channels), False)
    lines = [
        ops.reshape(_slice(cut, 1, i, size, down), _ints(-1, down, across + 1, size, channels), False)
        for i in range(side)
    ]
    products = []
    for over, weighed in zip(inputs, _transformed(weights, size), strict=True):
        line = _combined(over, lines)
        cells = [_slice(line, 2, j, size, across) for j in range(side)]
        row = [_combined(along, cells) for along in inputs]
        products.append(
            [
                ops.matmul(cell, ops.constant(weight, shared_memory=True), False, True)
                for cell, weight in zip(row, weighed, strict=True)
            ]
        )
    shape = _ints(-1, down, 1, across * size, results)
    parts = []
    for over in outputs:
        line = [_combined(over, column) for column in zip(*products, strict=True)]
        parts.append(ops.reshape(ops.concat([_combined(along, line) for along in outputs], 3), shape, False))
    whole = ops.reshape(ops.concat(parts, 2), _ints(-1, down * size, across * size, results), False)
    if (down * size, across * size) != (height, width):
        whole = ops.slice(whole, _ints(0, 0), _ints(height, width), _ints(1, 1), _ints(1, 2))
    return ops.transpose(whole, _ints(0, 3, 1, 2)).output(0)


def _transformed(weights: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """G g G^T of weights [K, C, 3, 3]: [m+2, m+2, K, C], reckoned in fp64 and rounded once."""
    _, kernel, _ = cook_toom(size)
    results, channels = weights.shape[:2]
    side = size + KERNEL - 1
    both = np.kron(kernel, kernel)
    taps = weights.transpose(2, 3, 0, 1).reshape(KERNEL * KERNEL, results * channels)
    found = np.empty((side * side, results * channels), dtype=np.float32)
    step = 2**18  # columns at a time: in fp64 all of them would take as much memory as several layers
    for start in range(0, taps.shape[1], step):
        found[:, start : start + step] = both @ taps[:, start : start + step].astype(np.float64)
    return found.reshape(side, side, results, channels)


def _slice(tensor: Any, axis: int, offset: int, size: int, count: int) -> Any:
    """Element `offset` of each of `count` tiles along `axis`, whose next axis counts the cells of a tile."""
    tiles, cell = divmod(offset, size)
    axes = _ints(axis, axis + 1)
    return ops.slice(tensor, _ints(tiles, cell), _ints(tiles + count, cell + 1), _ints(1, 1), axes)


def _combined(factors: NDArray[np.float64], tensors: Sequence[Any]) -> Any:
    """The sum of the tensors times their factors; those of factor 0 are left out."""
    total = None
    for factor, tensor in zip(factors, tensors, strict=True):
        if factor == 0:
            continue
        if total is None:
            total = tensor if factor == 1 else ops.multiply(tensor, _number(factor))
        elif factor == 1:
            total = ops.add(total, tensor)
        elif factor == -1:
            total = ops.subtract(total, tensor)
        else:
            total = ops.add(total, ops.multiply(tensor, _number(factor)))
    return total


def _ints(*values: int) -> Any:
    return ops.constant(np.array(values, dtype=np.int64))


def _number(value: float) -> Any:
    return ops.constant(np.float32(value))
