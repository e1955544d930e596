"""Gradients by the text at one latent: what depends on no text is computed once, the numbers are the graph's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import Model
from openvino import opset13 as ops
from torch import Tensor

from engines.contract import TEXT, Dims, contract
from engines.ov import OvEngine, core
from engines.rounds import CachedRequest, split

ROWS, SIDE = 2, 4


@pytest.fixture
def path(dims: Dims, tmp_path: Path) -> Path:
    """A gradient in its contract's shapes alone: something of the latent, of the text, and of both."""
    latent, text = [-1, dims.latent_channels, -1, -1], [-1, dims.tokens, dims.text_width]
    shapes = {"sample": latent, "timestep": [-1], TEXT: text, "cotangent": latent, "cotangent_scale": [-1]}
    given = {}
    for name, shape in shapes.items():
        given[name] = ops.parameter(shape, openvino.Type.i64 if name == "timestep" else openvino.Type.f32, name)
        given[name].output(0).set_names({name})
    axes = ops.constant(np.array([1, 2, 3], np.int64))
    steps = ops.unsqueeze(ops.convert(given["timestep"], "f32"), axes)
    of_latent = ops.tanh(given["sample"] * ops.sin(steps))
    read = ops.reduce_mean(of_latent, axes, keep_dims=False)
    of_both = ops.unsqueeze(read, ops.constant(np.array([1, 2], np.int64))) * ops.exp(given[TEXT])
    mean = ops.reduce_mean(of_both, ops.constant(np.array([1, 2], np.int64)), keep_dims=False)
    grown = ops.unsqueeze(mean * given["cotangent_scale"], axes)
    results = {"noise_pred": of_latent * grown + given["cotangent"], f"grad_{TEXT}": of_both + ops.sin(given[TEXT])}
    for name, node in results.items():
        node.output(0).set_names({name})
    openvino.save_model(Model(list(results.values()), list(given.values()), "toy"), tmp_path / "model.xml", False)
    return tmp_path / "model.xml"


def drawn(dims: Dims, generator: torch.Generator) -> dict[str, Tensor]:
    latent, text = (ROWS, dims.latent_channels, SIDE, SIDE), (ROWS, dims.tokens, dims.text_width)
    return {
        "sample": torch.randn(latent, generator=generator),
        "timestep": torch.randint(0, 1000, (ROWS,), generator=generator),
        TEXT: torch.randn(text, generator=generator),
        "cotangent": torch.randn(latent, generator=generator),
        "cotangent_scale": torch.rand(ROWS, generator=generator),
    }


def test_the_numbers_are_the_graphs_and_the_latents_part_is_computed_where_it_changes(
    path: Path, dims: Dims, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ran: list[int] = []
    plain = CachedRequest.infer

    def watched(self: CachedRequest, arrays: Any, **how: bool) -> Any:
        before = self._held.get("sample")
        found = plain(self, arrays, **how)
        ran.append(self._held["sample"] is not before)
        return found

    monkeypatch.setattr(CachedRequest, "infer", watched)
    inputs = drawn(dims, generator)
    changes: list[tuple[str, ...]] = [
        (),
        (TEXT,),
        ("cotangent", "cotangent_scale"),
        ("sample", TEXT),
        ("timestep",),
        (),
    ]
    with OvEngine(contract("unet_vjp_text", dims), path) as engine:
        for names in changes:
            inputs |= {name: drawn(dims, generator)[name] for name in names}
            found = engine.infer(**inputs)
            wanted = whole({name: tensor.numpy() for name, tensor in inputs.items()})
            for name, got in found.items():
                assert float((got - torch.from_numpy(wanted[name])).abs().max()) < 1e-6
        # A caller may write over what it gave.
        inputs["sample"] += 1
        found = engine.infer(**inputs)
        wanted = whole({name: tensor.numpy() for name, tensor in inputs.items()})
        assert float((found["noise_pred"] - torch.from_numpy(wanted["noise_pred"])).abs().max()) < 1e-6
    assert ran == [True, False, False, True, True, False, True]


def test_what_depends_on_the_text_is_not_in_the_first_part(path: Path) -> None:
    model = core().read_model(str(path))
    model.reshape(
        {port.get_any_name(): [2 if size.is_dynamic else size for size in port.partial_shape] for port in model.inputs}
    )
    first, rest = split(model)
    assert {name for port in first.inputs for name in port.get_names()} == {"sample", "timestep"}
    kinds = [node.get_type_name() for node in first.get_ordered_ops()]
    assert ("Exp" in kinds, "Sin" in kinds, "Tanh" in kinds) == (False, True, True)
    kinds = [node.get_type_name() for node in rest.get_ordered_ops()]
    assert ("Exp" in kinds, "Tanh" in kinds) == (True, False)
    assert len(rest.inputs) == 3 + len(first.outputs)
