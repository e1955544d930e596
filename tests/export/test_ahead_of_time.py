"""A bundle of engines for another machine: built whole, reused, kept, and used only once it was proved there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.bundle import Bundle
from engines.contract import NETWORKS
from engines.errors import BundleError
from engines.recipes import build_revision
from smooth_rt import cli
from smooth_rt.build import ensure_engines
from smooth_rt.cache import examine, prune

pytest.importorskip("tensorrt_rtx", reason="builds the engines; pip install 'smooth-rt[tensorrt-rtx]'")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they are proved at once")


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ensure_engines(tiny_model, backends=["tensorrt-rtx"], gpu_arch="sm89", precision="fp16").bundle


def test_it_is_whole_and_says_what_it_is_for(bundle: Bundle) -> None:
    (built,) = Bundle.open(bundle.path).variants
    assert built.variant.name == "tensorrt-rtx-fp16-sm89"
    assert str(built.profiles[0]) == "batch 1:1:4, height 16, width 16"
    assert not built.proved
    assert built.build_revision == build_revision(built.variant) > 0
    assert all(int(str(record.notes["layers"])) > 50 for record in built.engines)
    assert all("fp32_islands" in record.notes for record in built.engines)


def test_it_is_reused_and_not_pruned_where_it_was_built(
    bundle: Bundle, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(bundle.path.parents[1]))
    assert ensure_engines(tiny_model, backends=["tensorrt-rtx"], gpu_arch="sm89", precision="fp16").reused
    assert examine(bundle.path).fault is None
    assert prune() == []


def test_it_is_not_used_before_it_was_proved(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match=r"was built for sm89, a GPU, and torch finds none here; rebuild it with"):
        bundle.engine("unet", "tensorrt-rtx")
    monkeypatch.setattr("engines.bundle.runs_here", lambda _: None)
    with pytest.raises(BundleError, match=r"nothing proves it yet; run `smooth-rt engines verify --parity .*` here"):
        bundle.engine("unet", "tensorrt-rtx")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_of_the_model_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path / "cache"))
    build = ["build-engine", "--backend", "tensorrt-rtx", "--gpu-arch", "sm89", "--precision", precision, "--json"]
    folder = tmp_path / "bundle"
    for reused in (False, True):
        assert cli.main([*build, "--output", str(folder)]) == 0
        assert json.loads(capsys.readouterr().out)["reused"] is reused
    (built,) = Bundle.open(folder, verify=True).variants
    assert {record.network for record in built.engines} == set(NETWORKS)
    assert built.engine("unet").notes["layers"] > 500
    assert cli.main(["engines", "inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["engines"]
    assert all(row["bytes"] > 100_000 and row["worst_error"] is None for row in told)
    # Nothing proves it here, so that it runs nowhere yet.
    run = ["generate", "--prompt", "red apple", "--engines", str(folder), "--engine", "tensorrt-rtx"]
    assert cli.main([*run, "--output", str(tmp_path / "out")]) == 2
    assert "runs on a CUDA GPU and torch finds none here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_architecture_among_backends_of_the_cpu(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    monkeypatch.setattr("smooth_rt.build._build", lambda *given: asked.extend(given[3]) or sys.exit(3))
    build = ["build-engine", "--model", str(tiny_model), "--lora", "none", "--backend"]
    for named in ("sm89", "rtx"):
        with pytest.raises(SystemExit):
            cli.main([*build, "openvino,tensorrt-rtx", "--gpu-arch", named])
    names = [order.variant.name for order in asked]
    assert names == ["openvino-fp32", "tensorrt-rtx-fp32-sm89", "openvino-fp32", "tensorrt-rtx-fp32-rtx"]
    assert cli.main([*build, "openvino", "--gpu-arch", "sm89"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu-arch=sm89: openvino is built for the CPU here; leave it")


def test_verify_says_what_cannot_be_compared_here(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engines", "verify", str(bundle.path), "--parity", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["parity"]
    assert row["engine"] == "tensorrt-rtx-fp16-sm89"
    assert "torch finds none here" in row["note"]
    assert not Bundle.open(bundle.path).variants[0].proved
