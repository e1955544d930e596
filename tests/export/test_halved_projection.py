"""GEGLU's projection in two, in OpenVINO's graphs: the same numbers, and no other cut touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from engines.ov import core
from export.rewrites.halved_projection import halved_projection

GENERATOR = np.random.default_rng(0)


def drawn(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def model(turned: bool = True, axis: int = -1, lengths: tuple[int, int] = (12, 12), read_twice: bool = False) -> Any:
    """x [2, 5, 8] times weights of 24 columns, and a bias, cut in two and multiplied."""
    x = ops.parameter([2, 5, 8], np.float32)
    weight = drawn(24, 8) if turned else drawn(8, 24)
    summed = ops.add(ops.matmul(x, ops.constant(weight), False, turned), ops.constant(drawn(1, 1, 24)))
    if lengths[0] == lengths[1]:
        cut = ops.split(summed, ops.constant(np.int64(axis)), 2)
    else:
        cut = ops.variadic_split(summed, ops.constant(np.int64(axis)), ops.constant(np.array(lengths)))
    results = [ops.result(ops.gelu(cut.output(index), "erf")) for index in range(2)]
    return openvino.Model([*results, *([ops.result(summed)] if read_twice else [])], [x], "geglu")


def answers(graph: Any, x: Any) -> list[Any]:
    found = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])
    return [value.copy() for value in found.values()]


@pytest.mark.parametrize("turned", [True, False])
def test_the_same_numbers_without_the_cut(turned: bool) -> None:
    graph, x = model(turned), drawn(2, 5, 8)
    before = answers(graph, x)
    assert halved_projection(graph) == 1
    assert "Split" not in [node.get_type_name() for node in graph.get_ops()]
    for got, wanted in zip(answers(graph, x), before, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [{"lengths": (8, 16)}, {"read_twice": True}], ids=str)
def test_other_cuts_are_left_alone(other: dict[str, Any]) -> None:
    graph = model(**other)
    kinds = sorted(node.get_type_name() for node in graph.get_ops())
    assert halved_projection(graph) == 0
    assert sorted(node.get_type_name() for node in graph.get_ops()) == kinds
