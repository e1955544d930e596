"""The cache of engines: what is reused, what is built anew and why; one real build, the rest on copies of it."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.bundle import Bundle, Source, digest_json
from engines.staging import staging
from engines.variant import Order, Profile, Span
from smooth_rt import cli
from smooth_rt.build import Built, build_engines, ensure_engines
from smooth_rt.cache import cache_root
from smooth_rt.errors import BundleError, EngineError, InputError, ModelError
from smooth_rt.lora import fuse
from smooth_rt.model import load_model, read_config

BACKENDS = ["onnxruntime"]


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
        networks: object, dims: object, source: Source, orders: list[Order], target: Path, write: object, **rest: object
    ) -> Bundle:
        names = [order.variant.name for order in orders]
        calls.append({"source": source, "orders": orders, "names": names, "target": target, **rest})
        with staging(target) as folder:
            shutil.copytree(first[1].bundle.path, folder, dirs_exist_ok=True)
        return Bundle.open(target)

    monkeypatch.setattr("export.build.build_bundle", build)
    return calls


@pytest.mark.parametrize("inside", [".", "below"])
def test_the_current_folder_is_not_replaced(
    builds: list[dict[str, Any]], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    target = tmp_path / "here"
    (target / inside).mkdir(parents=True)
    monkeypatch.chdir(target / inside)
    with pytest.raises(BundleError, match="the current folder, which a build replaces"):
        ensure_engines(tiny_model, backends=BACKENDS, output=Path("." if inside == "." else ".."))
    assert builds == []


@pytest.mark.parametrize(("said", "given"), [("1M", 2**20), ("0", None), ("12G", 12 * 2**30)])
def test_the_memory_that_a_build_may_take(
    builds: list[dict[str, Any]], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, said: str, given: int | None
) -> None:
    monkeypatch.setenv("SMOOTH_RT_MEMORY", said)
    ensure_engines(tiny_model, backends=BACKENDS)
    assert builds[0]["memory"] == given


def test_memory_that_is_no_amount(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setenv("SMOOTH_RT_MEMORY", "much")
    with pytest.raises(InputError, match=r"SMOOTH_RT_MEMORY=much: no size; give for example 20G or 500M"):
        ensure_engines(tiny_model, backends=BACKENDS)


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
    records = bundle.variants[0].engines
    assert [row["network"] for row in told["engines"]] == [record.network for record in records]
    for row, record in zip(told["engines"], records, strict=True):
        assert record.key.startswith(row["key"])
        assert row["worst_error"] == max(parity.relative for parity in record.parity) <= row["tolerance"]
        assert row["bytes"] == sum((bundle.path / name).stat().st_size for name in (record.file, *record.weights))


def test_export_key_tells_why_two_bundles_differ(
    first: tuple[Path, Built], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = first[1].bundle
    other = shutil.copytree(bundle.path, tmp_path / "other")
    source = bundle.source.model_copy(update={"lora": None})
    built = bundle.variants[0]
    keyed = [
        record.model_copy(update={"key": built.expected_key(record, source, bundle.dims)}) for record in built.engines
    ]
    variants = [built.model_copy(update={"engines": keyed})]
    Bundle.open(other).rewrite(bundle.manifest.model_copy(update={"source": source, "variants": variants}))

    assert cli.main(["engines", "export-key", str(bundle.path), str(other), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["engines"]
    assert [row["key"] for row in rows] == [record.key for record in (*built.engines, *keyed)]
    assert all(row["key"] == digest_json(row["made_of"]) for row in rows)
    one, two = (row["made_of"] for row in (rows[1], rows[1 + len(keyed)]))
    assert {name for name in one if one[name] != two[name]} == {"lora"}
    assert one["lora"][1] == 0.6

    assert cli.main(["engines", "export-key", str(bundle.path), str(other)]) == 0
    told = capsys.readouterr().out
    alike, engines = told.split("engines:")
    # The engines' names say what variant they are; a graph's digest, its weights and its sizes differ by network.
    different = {"lora", "graph", "weights", "bounds"}
    assert "variant.backend" in alike
    assert "model.unet" in alike
    heading = engines.splitlines()[1].split()
    assert heading[:4] == ["bundle", "engine", "network", "key"]
    assert set(heading[4:]) == different
    assert f"1: {bundle.path}" in " ".join(told.split())
    assert rows[0]["key"] not in told
    # Built in another way by a version of this project.
    otherwise = built.model_copy(update={"build_revision": 1})
    keyed = [one.model_copy(update={"key": otherwise.expected_key(one, source, bundle.dims)}) for one in keyed]
    variants = [otherwise.model_copy(update={"engines": keyed})]
    Bundle.open(other).rewrite(bundle.manifest.model_copy(update={"source": source, "variants": variants}))
    assert cli.main(["engines", "export-key", str(bundle.path), str(other), "--json"]) == 0
    told_of = [row["made_of"].get("build_revision") for row in json.loads(capsys.readouterr().out)["engines"]]
    assert told_of == [None] * len(keyed) + [1] * len(keyed)
    assert cli.main(["engines", "export-key", str(tmp_path / "none")]) == 2


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
    assert builds[0]["names"] == ["onnxruntime-fp32"]
    assert builds[0]["keep"] is None
    recorded = builds[0]["source"].lora
    assert (None if recorded is None else recorded.strength) == (None if change == "no LoRA" else strength)


def test_a_scheduler_that_none_can_run_is_refused_before(
    builds: list[dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    for changes in ({"num_train_timesteps": 0}, {"beta_start": "x"}, {"prediction_type": "nosuch"}):
        path.write_text(json.dumps({**json.loads((tiny_model / path.relative_to(folder)).read_text()), **changes}))
        with pytest.raises(ModelError, match=r"^scheduler_config: "):
            ensure_engines(folder, backends=BACKENDS)
    assert builds == []


def test_bundle_of_another_default_size_is_replaced(builds: list[dict[str, Any]], tiny_model: Path, lora: Path) -> None:
    model = load_model(tiny_model)
    model.dims = replace(model.dims, sample_width=16)
    built = ensure_engines(model, lora, 0.6, BACKENDS)
    assert not built.reused
    assert built.reason.endswith(": its default size is not the model's")
    assert builds[0]["keep"] is None
    assert [str(found) for found in builds[0]["orders"][0].profiles] == ["batch 1:1:*, height 8:16:*, width 8:32:*"]


def test_profiles_come_together(builds: list[dict[str, Any]], tiny_model: Path, lora: Path) -> None:
    one, side = Span(min=1, opt=1, max=1), Span(min=16, opt=16, max=16)
    profiles = [Profile(batch=one, height=side, width=side)]
    ensure_engines(tiny_model, lora, 0.6, BACKENDS, profiles=profiles * 2)
    assert [str(found) for found in builds[0]["orders"][0].profiles] == [
        "batch 1:1:*, height 8:16:*, width 8:16:*",
        "batch 1, height 16, width 16",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch", "1"], "profiles: 1 of --batch, 0 of --height, 0 of --width; give all three"),
        (["--batch", "4:1", "--height", "16", "--width", "16"], "--batch=4:1: min, opt and max must rise"),
        (["--batch", "1", "--height", "12", "--width", "16"], "--height=12: 12 is no multiple of 8; the nearest is"),
        (["--precision", "fp8"], "--precision='fp8' is unknown; it is one of fp32, fp16, bf16, int8"),
        (["--precision", "bf16"], "precision 'bf16': onnxruntime is built in fp32, fp16, int8; that is what openvino"),
        (["--kernels", "own"], "--kernels='own' is unknown; it is one of backend, native"),
        (["--kernels", "native"], "--kernels=native: openvino has them, not onnxruntime; name openvino alone"),
    ],
)
def test_sizes_and_precisions_that_cannot_be_built(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert cli.main(["build-engine", "--model", str(tiny_model), "--backend", "onnxruntime", *given]) == 2
    heard = capsys.readouterr().err.strip()
    assert heard.startswith(f"error: {said}")
    assert "\n" not in heard


def test_a_cache_that_cannot_be_written_hinders_no_build_elsewhere(
    builds: list[dict[str, Any]], tiny_model: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(cache_root() / "locks", ignore_errors=True)
    (cache_root() / "locks").write_text("in the place of the folder")
    with caplog.at_level(logging.INFO, "smooth_rt"):
        ensure_engines(tiny_model, lora, 0.6, BACKENDS, tmp_path / "mine")
    assert [call["target"] for call in builds] == [tmp_path / "mine"]
    assert "building without a lock" in caplog.text


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


def test_another_way_of_building_is_replaced(
    builds: list[dict[str, Any]], tiny_model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.bundle.build_revision", lambda _: 7)
    built = ensure_engines(tiny_model, lora, 0.6, BACKENDS)
    assert not built.reused
    assert "revision 0 of its build, this version's is 7" in built.reason
    assert len(builds) == 1


def test_a_bundle_of_another_model_at_the_output_is_replaced(
    builds: list[dict[str, Any]], first: tuple[Path, Built], tiny_model: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(first[1].bundle.path, tmp_path / "mine")
    built = ensure_engines(tiny_model, None, 1.0, BACKENDS, str(output))
    assert not built.reused
    assert "LoRA" in built.reason
    assert [call["target"] for call in builds] == [output]


def test_int8_without_nncf_is_refused_before_a_build_is_said_to_begin(
    builds: list[dict[str, Any]], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "nncf" else real(name, *rest))
    with (
        caplog.at_level(logging.INFO, "smooth_rt"),
        pytest.raises(EngineError, match="NNCF is not installed; run `pip install nncf`"),
    ):
        ensure_engines(tiny_model, backends=["openvino"], precision="int8")
    assert not builds
    assert "building engines" not in caplog.text


def test_a_strength_is_told(first: tuple[Path, Built], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = first[1].bundle
    assert bundle.source.lora is not None
    arguments = ["generate", "--engines", str(bundle.path), "--prompt", "dog", "--num-inference-steps", "2", "--json"]
    assert cli.main([*arguments, "--output", str(tmp_path / "o")]) == 0
    assert json.loads(capsys.readouterr().out)["lora_strength"] == bundle.source.lora.strength


def test_what_cannot_be_built(builds: list[dict[str, Any]], tiny_model: Path, lora: Path) -> None:
    with pytest.raises(InputError, match="none named"):
        ensure_engines(tiny_model, backends=[])
    with pytest.raises(InputError, match="nothing to build"):
        ensure_engines(tiny_model, backends=["eager"])
    for name in ("abacus", "auto"):
        with pytest.raises(InputError, match=f"backend '{name}': there is nothing .*; choose from onnxruntime, "):
            ensure_engines(tiny_model, backends=[name])
    with pytest.raises(InputError, match=r"calibration_prompts=\['a dog'\]: int8 alone is calibrated, not fp32"):
        ensure_engines(tiny_model, backends=BACKENDS, calibration_prompts=["a dog"])
    with pytest.raises(InputError, match="inf"):
        ensure_engines(tiny_model, lora, float("inf"), BACKENDS)
    model = load_model(tiny_model)
    ensure_engines(model, lora, 0.9, BACKENDS)
    with pytest.raises(InputError, match="load it again"):
        ensure_engines(model, lora, 0.9, BACKENDS)
    assert len(builds) == 1
