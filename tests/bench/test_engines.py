"""The UNet on every engine, and starts and switches: what is refused, and a whole run on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import engines, starts
from smooth_rt import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["engines", "--repeats", "0"], "--repeats=0: give a whole number of at least 1"),
        (["engines", "--rung", "x"], "bench: argument --rung: invalid int value: 'x'; see --help"),
        (["engines", "--model", "nothing/here.safetensors"], "nothing/here.safetensors: no such folder or file"),
        (["starts", "--num-inference-steps", "0"], "--num-inference-steps=0: give a whole number of at least 1"),
    ],
)
def test_what_is_refused_in_a_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    heard = capsys.readouterr().err.strip().splitlines()[-1]
    assert heard.startswith(f"error: {said}")


@pytest.mark.slow
def test_every_candidate_is_there_and_near(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="int8 is one of them; pip install 'smooth-rt[int8]'")
    output = tmp_path / "figures.json"
    options = ["--model", str(tiny_model), "--side", "16", "--repeats", "2", "--rung", "0", "--work", str(tmp_path)]
    engines.main([*options, "--output", str(output)])
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {engines.PEER, f"{engines.PEER}, again", *engines.CANDIDATES}
    assert all(row["seconds"] >= row["fastest"] > 0 and row["speedup"] > 0 for row in rows.values())
    assert rows["openvino fp32"]["error"] < 1e-4 < rows["openvino int8, one size"]["error"] < 0.5
    assert found["floor_s"] > 0


@pytest.mark.slow
def test_a_second_start_and_a_switch_are_faster_than_a_build(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    starts.main(["--engine", "openvino", "--num-inference-steps", "2", "--output", str(output)])
    (row,) = json.loads(output.read_text())
    assert row["second_start"] > 1
    assert row["refit"] > 1
    assert row["runtime_s"] < row["refit_s"] / 10
    assert row["runtime_call_s"] > 0 < row["fused_call_s"]
