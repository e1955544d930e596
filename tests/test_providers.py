"""Engines of ONNX Runtime for a GPU, from the build to the pipeline; a provider of the CPU plays the GPU's."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import select
from engines.bundle import Bundle
from engines.errors import BundleError
from engines.providers import PROVIDERS, Provider
from smooth_rt import SmoothPipeline, cli
from smooth_rt.build import ensure_engines, prove_engines
from smooth_rt.cache import Entry, make_room, prune
from smooth_rt.commands import models
from smooth_rt.model import load_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu/test_onnxruntime.py")


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Built where there is no GPU, the CPU's variant beside it."""
    folder = tmp_path_factory.mktemp("made") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        backends = ["onnxruntime-cuda", "onnxruntime"]
        return ensure_engines(tiny_model, backends=backends, output=folder).bundle


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    monkeypatch.setitem(PROVIDERS, "cuda", Provider("CPUExecutionProvider", "onnxruntime-gpu", device="cpu"))


def test_one_exported_graph_serves_both(bundle: Bundle) -> None:
    built = {one.variant.name: one for one in bundle.variants}
    assert set(built) == {"onnxruntime-fp32", "onnxruntime-cuda-fp32-cuda"}
    here, there = built["onnxruntime-fp32"], built["onnxruntime-cuda-fp32-cuda"]
    assert (here.proved, there.proved) == (True, False)
    for ours, theirs in zip(here.engines, there.engines, strict=True):
        # What runs may be rewritten, for each in its way, and lies beside the exported graph.
        exported, other = ((bundle.path / one.file).with_name("model.onnx") for one in (ours, theirs))
        assert exported.samefile(other)
        assert ours.key != theirs.key
        for path in (*ours.weights, *theirs.weights):
            if path.endswith(".data"):  # onnx refuses those of several links
                assert (bundle.path / path).stat().st_nlink == 1
    assert (bundle.path / there.variant.name / "model_index.json").is_file()


def test_it_is_not_used_where_it_cannot_run_nor_before_it_was_proved(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="was built for cuda, a GPU, and torch finds none here"):
        bundle.engine("unet", "onnxruntime-cuda")
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    with pytest.raises(BundleError, match=r"nothing proves it yet; run `smooth-rt engines verify --parity .*` here"):
        bundle.engine("unet", "onnxruntime-cuda")
    said = models._unproved(bundle)
    assert said is not None
    assert re.fullmatch(r"onnxruntime-cuda-fp32\S*; run `smooth-rt engines verify --parity \S+` on a machine .*", said)


def test_proved_where_it_runs_and_then_used(
    bundle: Bundle, tiny_model: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    told: list[tuple[str, int, int]] = []
    found = prove_engines(bundle, load_model(tiny_model), progress=lambda *step: told.append(step))
    assert not any(isinstance(one, str) for one in found.values())
    # What is done grows with every comparison, and each engine takes several.
    done = [one for _, one, _ in told]
    assert (done[0], done == sorted(done), told[-1][1]) == (0, True, told[-1][2])
    assert len({what for what, *_ in told}) * 2 < told[-1][2] == len(set(done)) - 1
    opened = Bundle.open(bundle.path)
    assert all(one.proved for one in opened.variants)
    assert models._unproved(opened) is None
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    images = []
    for name, provider in (("onnxruntime", "cuda"), ("onnxruntime", None)):
        with SmoothPipeline.from_engines(opened, name, provider=provider) as pipe:
            images.append(pipe("dog", generator=torch.Generator().manual_seed(0), **settings).latents)
            assert pipe.engine == ("onnxruntime-cuda" if provider else "onnxruntime")
    # Two forms of one graph in fp32, two steps: rounding alone.
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_the_command_line_names_it(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = ["generate", "--prompt", "dog", "--engines", str(bundle.path), "--output", str(tmp_path / "out")]
    build = ["build-engine", "--output", str(tmp_path / "b")]
    for arguments, said in [
        ([*generate, "--engine", "onnxruntime", "--provider", "cuda"], "onnxruntime-cuda runs on a CUDA GPU and torch"),
        ([*generate, "--engine", "openvino", "--provider", "cuda"], "is one of onnxruntime's, and the engine is"),
        ([*generate, "--provider", "rocm"], "--provider=rocm: unknown; choose from cpu, cuda, tensorrt, tensorrt-rtx"),
        ([*build, "--backend", "openvino", "--provider", "cuda"], "--provider=cuda: is one of onnxruntime's; name it"),
        ([*build, "--backend", "onnx", "--provider", "cuda", "--precision", "int8"], "cuda is built in fp32, fp16"),
        ([*build, "--backend", "onnxruntime-tensorrt"], "precision 'fp32': onnxruntime-tensorrt is built in fp16"),
    ]:  # fmt: skip
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "out").exists()


def test_what_was_compiled_counts_and_goes_by_age_or_with_its_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one = tmp_path / "bundles" / "one"
    one.parent.mkdir()
    shutil.copytree(bundle.path, one)
    keys = [record.key for record in bundle.variants[0].engines[:3]]
    size = 10 * sum(file.stat().st_size for file in one.rglob("*") if file.is_file())
    parts = [tmp_path / "compiled" / f"{key}-sm89" for key in (*keys, "0" * 64)]
    for age, path in enumerate(parts):
        path.mkdir(parents=True)
        with (path / "engine").open("wb") as file:
            file.truncate(size)
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(one, (1e9 - 2.5, 1e9 - 2.5))
    assert make_room(5 * size) == []
    assert make_room(5 * size // 2 + size, keep=one) == [Entry(parts[3], size, None, None)]
    assert make_room(0, keep=one) == []  # neither the bundle that was just built, nor what is its own
    # The bundle is older than what was compiled for it, which goes with it.
    assert {entry.path for entry in make_room(2 * size)} == {one, *parts[:3]}
    assert not list((tmp_path / "compiled").iterdir())


def test_what_was_compiled_for_no_bundle_is_pruned(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "one").symlink_to(bundle.path)
    key = bundle.variants[0].engines[0].key
    for name in (f"{key}-sm89", f"{'0' * 64}-sm89"):
        (tmp_path / "compiled" / name).mkdir(parents=True)
    assert prune() == []
    assert [path.name for path in (tmp_path / "compiled").iterdir()] == [f"{key}-sm89"]
