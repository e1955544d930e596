"""int8 by NNCF: what is quantised, what is left out, and that images decide how much."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from engines.contract import Dims, Network, NetworkName, contract
from engines.errors import EngineError, ParityError
from engines.select import open_engine
from export.graphs import Case, random_inputs
from export.to_int8 import ENOUGH_DB, LADDER, quantise_at, quantise_onnx, quantise_openvino
from export.verify import TOLERANCES, verify

pytest.importorskip("nncf", reason="quantises; pip install 'smooth-rt[int8]'")

FILES = {"openvino": "openvino_model.xml", "onnxruntime": "model.onnx"}


def rows(dims: Dims, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    case = Case({"batch": 1, "height": 8, "width": 8}, 1.0)
    return [random_inputs(contract("unet", dims), dims, case, generator) for _ in range(count)]


class Judge:
    """Stands for real runs: hands out rows, and says of each graph in turn what it is told to."""

    prompts = ("one", "two")

    def __init__(self, dims: Dims, verdicts: Sequence[float]) -> None:
        self.verdicts = list(verdicts)
        self.judged: list[Path] = []
        self.rows = rows(dims)

    def samples(self, network: NetworkName) -> list[dict[str, Tensor]]:
        assert network == "unet"
        return self.rows

    def psnr(self, network: Network, graph: Path, backend: str) -> float:
        with open_engine(backend, network, graph) as engine:
            engine.infer(**self.rows[0])
        self.judged.append(graph)
        return self.verdicts[len(self.judged) - 1]


@pytest.fixture(scope="module")
def exported(built: Any) -> Path:
    path: Path = built.bundle.path / "onnxruntime-fp32" / "unet" / "model.onnx"
    return path


@pytest.mark.parametrize("backend", FILES)
def test_a_quantised_unet_is_near_and_holds_int8(
    exported: Path,
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    tmp_path: Path,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("export.to_openvino.native_attention", lambda _, bf16: 5 if bf16 else 0)  # runs no kernel
    network = contract("unet", dims)
    path = tmp_path / FILES[backend]
    notes = quantise_at(0, exported, path, network, backend, rows(dims), native="bf16")
    assert notes.get("native_attention") == (5 if backend == "openvino" else None)
    assert notes["quantised"] > 20
    assert any("time_embedding" in name for name in notes["left_out"])
    assert any("conv_in" in name for name in notes["left_out"])
    assert not any("attn1.to_q" in name for name in notes["left_out"])
    if backend == "onnxruntime":
        kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    else:
        assert 'element_type="i8"' in path.read_text()
    with open_engine(backend, network, path) as engine:
        parity = verify(engine, networks["unet"], network, dims, "int8", 3)
    assert 1e-3 < parity[0].relative < TOLERANCES["int8"]


@pytest.mark.slow
def test_the_ladder_leaves_out_more_at_each_rung(exported: Path, dims: Dims, tmp_path: Path) -> None:
    left = [
        set(
            quantise_at(rung, exported, tmp_path / FILES["openvino"], contract("unet", dims), "openvino", rows(dims))[
                "left_out"
            ]
        )
        for rung in (0, len(LADDER) - 1)
    ]
    assert left[0] < left[1]
    assert not any(name.endswith("conv1.weight") for name in left[1])


@pytest.mark.slow
@pytest.mark.parametrize(("quantise", "backend"), [(quantise_openvino, "openvino"), (quantise_onnx, "onnxruntime")])
def test_images_decide_which_rung_is_taken(
    exported: Path, dims: Dims, tmp_path: Path, quantise: Any, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Judge(dims, [ENOUGH_DB - 5, ENOUGH_DB])
    told: list[str] = []
    with caplog.at_level(logging.INFO, "smooth_rt"):
        notes = quantise(exported, tmp_path / FILES[backend], contract("unet", dims), judge, told.append)
    assert len(dict.fromkeys(told)) == 5  # the calibration; at each rung, what is quantised and the images
    assert (notes["rung"], notes["calibrated_on"]) == (1, ["one", "two"])
    assert notes["tried"] == ["all: 26.0 dB", f"{LADDER[1][0]}: 31.0 dB"]
    assert len(judge.judged) == 2
    assert f"unet in int8 for {backend}, all: 26.0 dB" in caplog.text


@pytest.mark.slow
def test_what_no_rung_can_help_is_not_published(
    exported: Path, dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.to_int8.LADDER", LADDER[:1])
    with pytest.raises(ParityError, match=r"unet: openvino in int8 gives images of 12\.0 dB .* choose bf16") as caught:
        quantise_openvino(exported, tmp_path / FILES["openvino"], contract("unet", dims), Judge(dims, [12.0]))
    assert "\n" not in str(caught.value)


def test_without_nncf(exported: Path, dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EngineError, match=r"NNCF is not installed; run `pip install nncf`"):
        quantise_at(0, exported, tmp_path / "x.xml", contract("unet", dims), "openvino", rows(dims))


def test_an_nncf_that_does_not_load(
    exported: Path, dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf.onnx.quantization.backend_parameters", None)
    with pytest.raises(
        EngineError, match=r"NNCF is installed and does not load .*; run `pip install --force-reinstall"
    ):
        quantise_at(0, exported, tmp_path / "x.xml", contract("unet", dims), "openvino", rows(dims))


def test_a_graph_that_is_none(dims: Dims, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(EngineError, match=r"model\.onnx: not an ONNX graph"):
        quantise_at(0, tmp_path / "model.onnx", tmp_path / "x.xml", contract("unet", dims), "openvino", rows(dims))


@pytest.mark.slow
def test_it_is_silent(exported: Path, dims: Dims, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantise_at(0, exported, tmp_path / FILES["openvino"], contract("unet", dims), "openvino", rows(dims))
    assert capfd.readouterr() == ("", "")
