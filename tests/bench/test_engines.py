"""The UNet on every engine, and starts and switches: what is refused, and a whole run on a small model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import candidates, engines, gpu, gpu_candidates, starts
from bench.apart import apart
from engines.contract import Dims, contract
from engines.recipes import RECIPES
from engines.variant import Bounds
from smooth_rt import cli
from smooth_rt.errors import EngineError, InputError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["engines", "--repeats", "0"], "--repeats=0: give a whole number from 1 to 10000"),
        (
            ["engines", "--repeats", "1" + 20 * "0"],
            "--repeats=100000000000000000000: give a whole number from 1 to 10000",
        ),
        (["engines", "--samples", "1000000000"], "--samples=1000000000: give a whole number from 1 to 10000"),
        (["engines", "--batch-size", "1000000"], "--batch-size=1000000: give a whole number from 1 to 10000"),
        (
            ["engines", "--only", "openvino, nvidia"],
            "--only=openvino, nvidia: 'nvidia' is in none of onnxruntime fp32; ",
        ),
        (["engines", "--only", ","], "--only=,: names nothing; give parts of onnxruntime fp32; "),
        (["engines", "--rung", "99"], "--rung=99: give a whole number from 0 to "),
        (["engines", "--rung", "-1"], "--rung=-1: give a whole number from 0 to "),
        (["engines", "--side", "65"], "--side=65: give a multiple of "),
        (["engines", "--output", "tests"], "bench: argument --output: tests: is a folder; name a file"),
        (
            ["engines", "--work", "README.md"],
            "bench: argument --work: README.md: README.md is a file, not a folder; name another folder; see ",
        ),
        (["--quick", "--output", ""], "bench: argument --output: empty; name a folder"),
        (["starts", "--output", " "], "bench: argument --output: empty; name a file"),
        (["gradients", "--side", "-8"], "--side=-8: give a whole number of pixels"),
        (["engines", "--rung", "x"], "bench: argument --rung: invalid int value: 'x'; see --help"),
        (["engines", "--model", "nothing/here.safetensors"], "nothing/here.safetensors: no such folder or file"),
        (["engines", "--model", ""], "--model='': empty; give a path or a name"),
        (["gradients", "--model="], "--model='': empty; give a path or a name"),
        (["gradients", "--repeats", "0"], "--repeats=0: give a whole number from 1 to 10000"),
        (
            ["gradients", "--task", "vjp,x"],
            "bench: argument --task: 'x' is unknown; name one or more of vjp, null-text; see ",
        ),
        (["gradients", "--task", ""], "bench: argument --task: empty; name one or more of vjp, null-text; see "),
        (["gradients", "--gradients", ","], "bench: argument --gradients: empty; name one or more of text, sample, "),
        (
            ["gradients", "--engine", "inductor"],
            "bench: argument --engine: 'inductor' is unknown; name one or more of onnxruntime, onnxruntime-cuda, ",
        ),
        (["gradients", "--task", "vjp,null-text", "--image", "no.png"], "no.png: no such file; name an image"),
        (
            ["gradients", "--task", "null-text", "--num-inference-steps", "1001"],
            "--num-inference-steps=1001: give a whole number from 1 to ",
        ),
        (["gradients", "--task", "null-text", "--model", "sd15"], "--task=null-text: sd15 has random weights"),
        (["gpu", "--repeats", "0"], "--repeats=0: give a whole number from 1 to 10000"),
        (["gpu", "--batch-sizes", "0"], "bench: argument --batch-sizes: '0' is not a list of whole numbers"),
        (["starts", "--num-inference-steps", "0"], "--num-inference-steps=0: give a whole number from 1 to 10000"),
        (["starts", "--num-inference-steps", "1001"], "--num-inference-steps=1001: give a whole number from 1 to "),
        (["starts", "--engine", ""], "bench: argument --engine: empty; name one or more of onnxruntime, "),
        (["starts", "--engine", "onnxruntime,nosuch"], "bench: argument --engine: 'nosuch' is unknown; name one or "),
        (["starts", "--lora="], "--lora='': empty; give a path or a name"),
    ],
)
def test_what_is_refused_in_a_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("began to work")

    for place in ("engines.matrix_rates", "gradients._graph", "null_text.build_engines", "starts.apart"):
        monkeypatch.setattr(f"bench.{place}", work)
    assert cli.main(["bench", *arguments]) == 2
    heard = capsys.readouterr().err.strip().splitlines()[-1]
    assert heard.startswith(f"error: {said}")


@pytest.mark.parametrize("kind", ["engines", "gpu", "gradients", "starts"])
def test_a_fault_is_shown_whole_with_debug(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("bench.options.check_count", fault)
    assert cli.main(["bench", kind, "--debug"]) == 1
    heard = capsys.readouterr().err
    assert heard.startswith("Traceback")
    assert heard.splitlines()[-1].startswith("error: RuntimeError: a fault; ")


def test_each_engine_is_started_once(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    measured: list[str] = []

    def refused(_: object, backend: str) -> None:
        measured.append(backend)
        if len(measured) == 2:
            raise InputError("far enough")

    monkeypatch.setattr(starts, "measured", refused)
    with pytest.raises(InputError, match="far enough"):
        starts.main(["--model", str(tiny_model), "--engine", "openvino, onnxruntime,openvino"])
    assert measured == ["openvino", "onnxruntime"]


def test_what_failed_apart_is_told_in_its_own_words() -> None:
    arguments = ["--job", "first", "--model", "no/such/model", "--lora", "none"]
    with pytest.raises(EngineError, match=r"^failed \(no/such/model: no such folder or file"):
        apart("bench.starts", [*arguments, "--engine", "onnxruntime"], "failed ({})".format)


@pytest.mark.parametrize("arguments", [["--quick", "--output", "b"], ["starts", "--output", "b/figures.json"]])
def test_no_figures_go_into_a_bundle(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b" / "config").mkdir(parents=True)
    (tmp_path / "b" / "manifest.json").write_text("{}")
    assert cli.main(["bench", *arguments]) == 2
    heard = capsys.readouterr().err.strip().splitlines()[-1]
    assert heard.startswith("error: bench: argument --output: b: lies in the bundle ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_asked_for_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gpu"]) == 2
    heard = capsys.readouterr().err.strip().splitlines()[-1]
    assert heard == (
        "error: bench gpu: torch finds no CUDA GPU here; run it where there is one, or `bench engines` here"
    )
    able, left_out = gpu_candidates.runnable(gpu_candidates.CANDIDATES)
    # inductor runs on a processor too.
    assert set(able) == {"inductor fp16", "inductor bf16"}
    assert len(left_out) == len(gpu_candidates.CANDIDATES) - len(able)


def test_what_cannot_be_built_on_a_gpu_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise InputError("gpu_arch=sm90: tensorrt-rtx builds for others")

    monkeypatch.setattr(gpu_candidates, "runnable", lambda _: ({"tensorrt-rtx fp16": ("tensorrt-rtx", "fp16")}, []))
    monkeypatch.setattr(gpu_candidates, "built", refused)
    options = argparse.Namespace(batch_size=1, side=16)
    found, left_out = engines._on_gpu(torch.nn.Identity(), Any, tmp_path, options, lambda _: None)  # type: ignore[arg-type]
    assert (found, left_out) == (
        {}, ["tensorrt-rtx fp16 is left out: gpu_arch=sm90: tensorrt-rtx builds for others"]
    )  # fmt: skip


def test_each_candidate_has_a_graph_for_the_hint_that_it_is_run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[Path, Any] = {}

    def write(*given: Any, **named: Any) -> None:
        for path in (one for one in given if isinstance(one, Path) and not one.exists()):
            path.write_text("")
            made[path] = named.get("native")

    for name in ("to_onnx", "to_openvino", "to_winograd", "to_ort", "to_inductor"):
        monkeypatch.setattr(candidates, name, write)
    monkeypatch.setattr(candidates, "quantise_at", lambda *given: write(given[2], native=given[6]))
    options = argparse.Namespace(only="", rung=0, side=16, batch_size=1, samples=0)
    dims = Dims(77, 768, 49408, 4, 3, 8, 8, 64)
    size: Bounds = {"batch": (1, 1, 1)}
    found, faults = candidates.graphs(
        torch.nn.Identity(), contract("unet", dims), dims, tmp_path, options, [size], lambda _: None
    )
    assert faults == {}
    for one in candidates.CANDIDATES.values():
        hint = RECIPES[one.backend][one.precision]["unet"].hint
        assert made[found[one.made_of]] == (hint if one.kernels == "native" else None)


@pytest.mark.slow
def test_gradients_are_compared_timed_and_inverted_with(
    cache: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gradients.json"
    arguments = ["--model", str(tiny_model), "--side", "16", "--batch-sizes", "1,2", "--repeats", "1"]
    # Two networks of the same inputs, of which each has a graph of its own.
    arguments += ["--gradients", "text,sample", "--task", "vjp,null-text", "--num-inference-steps", "2"]
    assert cli.main(["bench", "gradients", *arguments, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    wanted = {"unet_vjp_text": "grad_encoder_hidden_states", "unet_vjp_sample": "grad_sample"}
    assert {(row["network"], row["engine"]) for row in found["rows"]} == {
        (network, engine) for network in wanted for engine in ("eager", "onnxruntime")
    }
    for row in found["rows"]:
        assert set(row["errors"]) == {"noise_pred", wanted[row["network"]]}
        assert all(0 < error < 1e-2 for error in row["errors"].values())
        assert all(0 < error < 1e-4 for error in row["median_errors"].values())
        assert row["peak_memory_bytes"] > 2**27
        assert set(row["seconds"]) == {"1", "2"}
    eager, engine = found["null_text"]
    assert eager["gradients"] == engine["gradients"] == 20
    assert abs(eager["psnr_db"] - engine["psnr_db"]) < 0.1
    assert "Null-text inversion" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_samplings_are_timed_and_compared(tiny_model: Path, tmp_path: Path) -> None:
    """What runs on a GPU, on the CPU: the same loop, pipeline, peers and table."""
    options = argparse.Namespace(model=str(tiny_model), side=16, batch_sizes=(1, 2), steps=2, repeats=1)
    subject = gpu._subject(str(tiny_model))
    rows, facts = gpu.measure(
        subject, {"on the cpu": ("onnxruntime", "fp32")}, options, tmp_path, "cpu", lambda _: None
    )
    assert [(row.name, row.batch) for row in rows] == [
        (name, batch) for name in ("eager fp32", "eager fp16", "on the cpu") for batch in (1, 2)
    ]
    by_name = {row.name: row for row in rows}
    assert (by_name["eager fp32"].error, by_name["on the cpu"].fault) == (0.0, None)
    assert by_name["on the cpu"].error < 1e-3  # type: ignore[operator]
    assert 0 < by_name["eager fp16"].error < 0.2  # type: ignore[operator]
    assert facts["tflop_an_image"] > 0
    gpu._print(rows, {**facts, "floor_s_measured": 1.0}, options)


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
def test_starts_and_switches_on_every_engine_that_replaces_weights(
    tiny_model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    arguments = ["--model", str(tiny_model), "--lora", str(lora), "--num-inference-steps", "2"]
    starts.main([*arguments, "--output", str(output)])
    rows = json.loads(output.read_text())
    assert [row.pop("engine") for row in rows] == ["onnxruntime", "openvino"]
    for row in rows:
        assert {f"{job}_s" for job in starts.JOBS} < set(row)
        assert all(figure > 0 for figure in row.values())
    told = capsys.readouterr().out
    assert all(what in told for what, *_ in starts._FIGURES)


@pytest.mark.slow
def test_a_second_start_and_a_switch_are_faster_than_a_build(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    starts.main(["--engine", "openvino", "--num-inference-steps", "2", "--output", str(output)])
    (row,) = json.loads(output.read_text())
    assert row["second_start"] > 1
    assert row["refit"] > 1
    assert row["runtime_s"] < row["refit_s"] / 10
    assert row["runtime_call_s"] > 0 < row["fused_call_s"]
