"""The cache of engines: what is reused, what is built anew and why; one real build, the rest on copies of it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.bundle import Bundle, Source
from engines.staging import staging
from smooth_rt import cli
from smooth_rt.build import Built, build_engines, cache_root, ensure_engines
from smooth_rt.errors import BundleError, EngineError, InputError
from smooth_rt.lora import Lora, LoraLayer, fuse, write_lora
from smooth_rt.model import load_model, read_config

BACKENDS = ["onnxruntime"]
PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    return write_lora(Lora({PATH: layer}, "", ""), tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture(scope="module")
def first(tiny_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Built]]:
    """A cache with one bundle in it, built for real."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(root))
        yield root, ensure_engines(tiny_model, lora, 0.6, BACKENDS)


@pytest.fixture
def builds(first: tuple[Path, Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A cache of one's own that holds the first bundle; the arguments of every further build, which copies it."""
    root = shutil.copytree(first[0], tmp_path / "cache")
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(root))
    calls: list[dict[str, Any]] = []

    def build(
        networks: object, dims: object, source: Source, backends: list[str], target: Path, write: object, **rest: object
    ) -> Bundle:
        calls.append({"networks": networks, "source": source, "backends": backends, "target": target, **rest})
        with staging(target) as folder:
            shutil.copytree(first[1].bundle.path, folder, dirs_exist_ok=True)
        return Bundle.open(target)

    monkeypatch.setattr("export.build.build_bundle", build)
    return calls


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SMOOTH_RT_CACHE")
    assert cache_root().name == "smooth-rt"


def test_a_cache_that_is_a_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("SMOOTH_RT_CACHE", str(root))
        with pytest.raises(InputError, match=rf"SMOOTH_RT_CACHE={root}: .*file is not a folder"):
            cache_root()


def test_first_build(first: tuple[Path, Built], tiny_model: Path, lora: Path) -> None:
    root, built = first
    assert not built.reused
    assert "not built yet" in built.reason
    assert built.bundle.path.parent == root / "bundles"
    assert [path.name for path in (root / "bundles").iterdir()] == [built.bundle.path.name]
    model = load_model(tiny_model)
    source = built.bundle.source
    assert (source.model, source.digests) == (str(tiny_model), model.digests)
    assert source.lora is not None
    assert (source.lora.source, source.lora.strength) == (str(lora), 0.6)
    assert read_config(built.bundle.path / "config").scaling_factor == model.vae.config.scaling_factor


def test_inspect_tells_each_graph_on_a_line(
    first: tuple[Path, Built], lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = first[1].bundle
    assert cli.main(["engines", "inspect", str(bundle.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["manifest"], told["lora"]) == (str(bundle.path / "manifest.json"), f"{lora} at 0.6")
    assert [row["network"] for row in told["engines"]] == [record.network for record in bundle.manifest.engines]
    for row, record in zip(told["engines"], bundle.manifest.engines, strict=True):
        assert record.key.startswith(row["key"])
        assert row["worst_error"] == max(parity.relative for parity in record.parity) <= row["tolerance"]
        assert row["bytes"] == sum((bundle.path / name).stat().st_size for name in (record.file, *record.weights))


def test_the_engine_computes_the_fused_model(first: tuple[Path, Built], tiny_model: Path, lora: Path) -> None:
    from smooth_rt.lora import read_lora

    model = load_model(tiny_model)
    generator = torch.Generator().manual_seed(3)
    sample, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 12, 32)))
    timestep = torch.tensor([7, 900])
    with first[1].bundle.engine("unet", "onnxruntime") as engine:
        found = engine.infer(sample=sample, timestep=timestep, encoder_hidden_states=context)["noise_pred"]
    base = model.unet(sample, timestep, context).sample
    fuse(model.unet, read_lora(lora), 0.6)
    fused = model.unet(sample, timestep, context).sample
    assert (found - fused).norm() / fused.norm() < 1e-4
    assert (found - base).norm() / base.norm() > 1e-2


def test_same_wishes_reuse(
    builds: list[dict[str, Any]], tiny_model: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "smooth_rt"):
        built = ensure_engines(tiny_model, lora, 0.6, BACKENDS)
    assert built.reused
    assert "reusing engines" in caplog.text
    elsewhere = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert ensure_engines(load_model(elsewhere), lora, 0.6, [*BACKENDS, *BACKENDS]).reused
    assert build_engines(tiny_model, lora, 0.6, BACKENDS, built.bundle.path).path == built.bundle.path
    assert builds == []


@pytest.mark.parametrize("change", ["strength", "no LoRA", "scheduler"])
def test_other_wishes_build_elsewhere(
    builds: list[dict[str, Any]], first: tuple[Path, Built], tiny_model: Path, lora: Path, tmp_path: Path, change: str
) -> None:
    model, adapter, strength = tiny_model, lora, 0.6
    if change == "strength":
        strength = 0.7
    elif change == "scheduler":
        model = shutil.copytree(tiny_model, tmp_path / "model")
        path = model / "scheduler" / "scheduler_config.json"
        path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    built = ensure_engines(model, None if change == "no LoRA" else adapter, strength, BACKENDS)
    assert not built.reused
    assert len(builds) == 1
    assert builds[0]["target"].name != first[1].bundle.path.name
    assert builds[0]["backends"] == BACKENDS
    assert builds[0]["precision"] == "fp32"
    recorded = builds[0]["source"].lora
    assert (None if recorded is None else recorded.strength) == (None if change == "no LoRA" else strength)


def test_a_bundle_of_more_backends_serves_fewer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one = ensure_engines(tiny_model, backends=["openvino"])
    both = ensure_engines(tiny_model, backends=["onnxruntime"])
    assert (one.reused, both.reused) == (False, False)
    assert "not built for onnxruntime" in both.reason
    assert both.bundle.path == one.bundle.path
    assert set(both.bundle.backends) == {"onnxruntime", "openvino"}
    for names in (["openvino"], ["onnxruntime"], ["openvino", "onnxruntime"]):
        assert ensure_engines(tiny_model, backends=names).reused


def test_a_backend_that_left_the_machine_is_not_built_again(
    builds: list[dict[str, Any]], tiny_model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "not installed"
    monkeypatch.setattr("engines.select.availability", lambda name: missing if name == "onnxruntime" else None)
    ensure_engines(tiny_model, lora, 0.6, ["openvino"])
    assert [call["backends"] for call in builds] == [["openvino"]]


def flip_a_byte(bundle: Path) -> None:
    path = max(bundle.rglob("*.onnx*"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_file(bundle: Path) -> None:
    next(bundle.rglob("*.onnx")).unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file])
def test_a_damaged_bundle_is_replaced(
    builds: list[dict[str, Any]],
    tiny_model: Path,
    lora: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = next((cache_root() / "bundles").iterdir())
    damage(target)
    with pytest.raises(BundleError):
        Bundle.open(target)
    with caplog.at_level(logging.INFO, "smooth_rt"):
        built = ensure_engines(tiny_model, lora, 0.6, BACKENDS)
    assert not built.reused
    assert built.reason in caplog.text
    assert [call["target"] for call in builds] == [target]
    assert Bundle.open(target).source == built.bundle.source
    assert ensure_engines(tiny_model, lora, 0.6, BACKENDS).reused


def test_another_backend_version_is_replaced(
    builds: list[dict[str, Any]], tiny_model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.bundle.backend_version", lambda _: "99.0")
    built = ensure_engines(tiny_model, lora, 0.6, BACKENDS)
    assert not built.reused
    assert "99.0" in built.reason
    assert len(builds) == 1


def test_a_bundle_of_another_model_at_the_output_is_replaced(
    builds: list[dict[str, Any]], first: tuple[Path, Built], tiny_model: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(first[1].bundle.path, tmp_path / "mine")
    built = ensure_engines(tiny_model, None, 1.0, BACKENDS, output)
    assert not built.reused
    assert "LoRA" in built.reason
    assert [call["target"] for call in builds] == [output]


def test_what_cannot_be_built(builds: list[dict[str, Any]], tiny_model: Path, lora: Path) -> None:
    with pytest.raises(InputError, match="none named"):
        ensure_engines(tiny_model, backends=[])
    with pytest.raises(InputError, match="nothing to build"):
        ensure_engines(tiny_model, backends=["eager"])
    for name in ("tensorrt", "abacus"):
        with pytest.raises(EngineError, match=name):
            ensure_engines(tiny_model, backends=[name])
    with pytest.raises(InputError, match="inf"):
        ensure_engines(tiny_model, lora, float("inf"), BACKENDS)
    model = load_model(tiny_model)
    ensure_engines(model, lora, 0.9, BACKENDS)
    with pytest.raises(InputError, match="load it again"):
        ensure_engines(model, lora, 0.9, BACKENDS)
    assert len(builds) == 1
