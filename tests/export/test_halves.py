"""OpenVINO's UNet in a call with guidance: what both halves share is computed once, and the numbers are torch's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

import engines.ov
from engines.contract import TEXT, Dims, NetworkName, contract
from engines.halves import first_half, shared
from engines.ov import OvEngine
from export.graphs import Case, cases, random_inputs

SIZES = {"batch": 4, "height": 8, "width": 12}


@pytest.fixture
def path(built: Any) -> Path:
    records = {one.network: one for one in built.bundle.find("openvino").engines}
    return Path(built.bundle.path / records["unet"].file)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def given(dims: Dims, generator: torch.Generator, guided: bool = True) -> dict[str, Tensor]:
    return random_inputs(contract("unet", dims), dims, Case(SIZES, 1.0, guided=guided), generator)


def counted(opened: OvEngine) -> tuple[int, int]:
    """How many forms there are for plain calls and for calls of two halves."""
    assert opened._halved is not None
    return len(opened._requests._opened), len(opened._halved._opened)


def test_a_guided_call_is_torchs_and_computes_half(
    path: Path, networks: Mapping[NetworkName, nn.Module], dims: Dims, generator: torch.Generator
) -> None:
    with OvEngine(contract("unet", dims), path) as engine:
        for guided, forms in ((True, (0, 1)), (False, (1, 1))):
            inputs = given(dims, generator, guided)
            with torch.no_grad():
                (wanted,) = networks["unet"](*inputs.values())
            assert relative(engine.infer(**inputs)["noise_pred"], wanted) < 1e-5
            assert counted(engine) == forms
        request, taken = engine._form(None, given(dims, generator))
        assert {name: len(tensor) for name, tensor in taken.items()} == {"sample": 2, "timestep": 2, TEXT: 4}
        assert request is engine._halved._form(tuple(sorted(SIZES.items())))


def test_every_backend_is_verified_by_such_a_call(dims: Dims, generator: torch.Generator) -> None:
    network = contract("unet", dims)
    fixed = [{symbol: (size, size, size) for symbol, size in SIZES.items()}]
    for bounds in ([], fixed):
        guided = [case for case in cases(network, dims, bounds) if case.guided]
        assert len(guided) == 1
        inputs = random_inputs(network, dims, guided[0], generator)
        half = first_half(inputs)
        assert half is not None
        assert not torch.equal(*inputs[TEXT].chunk(2))
    assert not any(case.guided for case in cases(contract("vae_decoder", dims), dims))


@pytest.mark.parametrize("name", ["sample", "timestep"])
def test_halves_that_differ_are_told(name: str, dims: Dims, generator: torch.Generator) -> None:
    inputs = given(dims, generator)
    assert first_half(inputs) is not None
    inputs[name] = inputs[name].clone()
    inputs[name][-1] += 1
    assert first_half(inputs) is None


def test_an_odd_number_of_rows_has_no_halves(dims: Dims, generator: torch.Generator) -> None:
    assert first_half({name: tensor[:3] for name, tensor in given(dims, generator).items()}) is None


def test_of_a_large_unet_one_form_a_size_is_held(
    path: Path, dims: Dims, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.ov, "OWN_BELOW", 0)
    bounds = [{symbol: (size, size, size) for symbol, size in SIZES.items()}]
    with OvEngine(contract("unet", dims), path, bounds) as engine:
        assert counted(engine) == (0, 0)
        for guided, forms in ((True, (0, 1)), (False, (1, 0)), (True, (0, 1))):
            engine.infer(**given(dims, generator, guided))
            assert counted(engine) == forms
    with OvEngine(contract("unet", dims), path) as engine:
        engine.infer(**given(dims, generator))
        assert engine._halved is not None
        assert list(engine._halved._opened.values()) == [None]  # of free sizes nothing is shared


def test_other_weights_open_anew_what_was_used_last(path: Path, dims: Dims, generator: torch.Generator) -> None:
    with OvEngine(contract("unet", dims), path) as engine:
        for guided, forms in ((True, (0, 1)), (False, (1, 0)), (True, (0, 1))):
            engine.infer(**given(dims, generator, guided))
            engine.refit_impl({})
            assert counted(engine) == forms


def test_what_is_no_half_is_refused() -> None:
    def graph(rows: int, cells: int) -> openvino.Model:
        sample, text = ops.parameter([rows, 4], name="sample"), ops.parameter([rows, 4], name=TEXT)
        for node in (sample, text):
            node.output(0).set_names({node.get_friendly_name()})
        joined = ops.reshape(sample, ops.constant([cells, rows * 4 // cells]), False)
        joined.set_friendly_name("joined")
        flat = ops.reshape(text, ops.constant([cells, rows * 4 // cells]), False)
        return openvino.Model([ops.result(ops.add(joined, flat))], [sample, text], "unet")

    with pytest.raises(ValueError, match=r"joined is \[1, 4\] for half of the rows and \[1, 8\] for all"):
        shared(graph(1, 1), graph(2, 1))
