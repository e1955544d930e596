"""Real graphs and their weights, cut or changed where no manifest tells: refused in one line, in no time."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.contract import Dims, contract
from engines.errors import EngineError
from engines.select import open_engine
from export.graphs import Case, random_inputs

GRAPHS = {"onnxruntime": ("onnxruntime-fp32", "model.onnx"), "openvino": ("openvino-fp32", "openvino_model.xml")}
WEIGHTS = {"onnxruntime": "model.onnx.data", "openvino": "openvino_model.bin"}


@pytest.fixture(params=GRAPHS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(built: Any, backend: str, tmp_path: Path) -> Path:
    """The graph of a network, its weights beside it; a copy."""
    return shutil.copytree(built.bundle.path / GRAPHS[backend][0] / "vae_decoder", tmp_path / "vae_decoder")


def cuts(whole: bytes, count: int) -> list[int]:
    chance = random.Random(len(whole))
    return [0, 1, len(whole.rstrip()) - 1, *(chance.randrange(len(whole)) for _ in range(count))]


def refusal(backend: str, path: Path, dims: Dims) -> str:
    """The one line with which a graph is refused."""
    with pytest.raises(EngineError) as caught:
        open_engine(backend, contract("vae_decoder", dims), path)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_a_cut_graph(backend: str, folder: Path, dims: Dims) -> None:
    path = folder / GRAPHS[backend][1]
    whole = path.read_bytes()
    for size in cuts(whole, 12):
        path.write_bytes(whole[:size])
        assert str(path) in refusal(backend, path, dims)


def test_cut_weights(backend: str, folder: Path, dims: Dims) -> None:
    path, weights = folder / GRAPHS[backend][1], folder / WEIGHTS[backend]
    whole = weights.read_bytes()
    for size in cuts(whole, 4):
        weights.write_bytes(whole[:size])
        assert refusal(backend, path, dims)
    weights.unlink()
    assert refusal(backend, path, dims)


def test_changed_bytes_of_a_graph_are_refused_or_change_nothing_of_its_contract(
    backend: str, folder: Path, dims: Dims
) -> None:
    """Which numbers a graph gives, its digest in the manifest tells; that it is no other network, its opening."""
    path, network = folder / GRAPHS[backend][1], contract("vae_decoder", dims)
    whole = path.read_bytes()
    case = Case({"batch": 1, "height": 8, "width": 8}, 1.0)
    inputs = random_inputs(network, dims, case, torch.Generator().manual_seed(1))
    chance = random.Random(5)
    refused: list[str] = []
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            with open_engine(backend, network, path) as engine:
                found = engine.infer(**inputs)
        except EngineError as error:
            refused.append(str(error))
            continue
        assert {name: tensor.shape for name, tensor in found.items()} == {"sample": (1, 3, 16, 16)}
    assert refused
    assert not [one for one in refused if "\n" in one]
