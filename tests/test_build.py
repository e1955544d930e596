"""The cache of engines: what is reused, what is built anew and why; one real build, the rest on copies of it."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from smooth_rt.errors import BundleError, EngineError, InputError
from smooth_rt.lora import fuse
from smooth_rt.model import load_model, read_config
from smooth_rt.pipeline import SmoothPipeline

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


def test_a_bundle_of_more_backends_serves_fewer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one = ensure_engines(tiny_model, backends=["openvino"])
    both = ensure_engines(tiny_model, backends=["onnxruntime"])
    assert (one.reused, both.reused) == (False, False)
    assert "onnxruntime-fp32 is not built" in both.reason
    assert both.bundle.path == one.bundle.path
    assert set(both.bundle.backends) == {"onnxruntime", "openvino"}
    for names in (["openvino"], ["onnxruntime"], ["openvino", "onnxruntime"]):
        assert ensure_engines(tiny_model, backends=names).reused


def test_a_bundle_grows_and_what_was_in_it_is_not_built_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    one = ensure_engines(tiny_model, backends=["onnxruntime"])
    graphs = [file.path for file in one.bundle.manifest.files if "model.onnx" in file.path]
    before = {path: (one.bundle.path / path).stat().st_ino for path in graphs}

    def no_export(*_: object) -> None:
        raise AssertionError("the graphs are there already")

    monkeypatch.setattr("export.stages.to_onnx", no_export)
    more = ensure_engines(tiny_model, backends=["openvino"], precision="bf16")
    assert [built.variant.name for built in more.bundle.variants] == ["onnxruntime-fp32", "openvino-bf16"]
    assert more.bundle.variants[0] == one.bundle.variants[0]
    assert {path: (more.bundle.path / path).stat().st_ino for path in graphs} == before
    exact = ensure_engines(tiny_model, backends=["openvino"]).bundle
    assert exact.find("openvino").variant.precision == "fp32"
    assert exact.find("openvino", "bf16").engine("unet").hint == "bf16"
    # onnx refuses weights that have several links.
    assert (exact.path / "onnxruntime-fp32/unet/model.onnx.data").stat().st_nlink == 1
    # The graphs of both precisions are the same ones: they are on the disk once.
    places = [f"openvino-{name}/unet/openvino_model.bin" for name in ("fp32", "bf16")]
    assert len({(exact.path / place).stat().st_ino for place in places}) == 1
    assert Bundle.open(exact.path).manifest == exact.manifest


def test_profiles_come_together(builds: list[dict[str, Any]], tiny_model: Path, lora: Path) -> None:
    one = profile(1, 16)
    ensure_engines(tiny_model, lora, 0.6, BACKENDS, profiles=[one])
    assert [str(found) for found in builds[0]["orders"][0].profiles] == [
        "batch 1:1:*, height 8:16:*, width 8:16:*",
        "batch 1, height 16, width 16",
    ]


def test_engines_of_one_size(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    built = ensure_engines(tiny_model, backends=["openvino"], profiles=[profile(1, 24)])
    assert ensure_engines(tiny_model, backends=["openvino"]).reused  # who names no size takes what there is
    with (
        SmoothPipeline.from_engines(built.bundle) as pipe,
        SmoothPipeline.from_pretrained(tiny_model, engine="eager") as eager,
    ):
        assert pipe.size == (24, 24)
        for guidance in (1.0, 7.5):  # of one row a call, and of two
            made, wanted = (
                one(["dog", "red apple"], num_inference_steps=3, height=24, width=24, guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(0), output_type="pt").images
                for one in (pipe, eager)
            )  # fmt: skip
            torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
        assert pipe("dog", num_inference_steps=1).images[0].size == (24, 24)
        with pytest.raises(InputError, match=r"height 16, width 16 lies outside .*--height 16:24:24 --width 16:24:24"):
            pipe("dog", height=16, width=16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch", "1"], "profiles: 1 of --batch, 0 of --height, 0 of --width; give all three"),
        (["--batch", "4:1", "--height", "16", "--width", "16"], "--batch=4:1: min, opt and max must rise"),
        (["--batch", "1", "--height", "12", "--width", "16"], "--height=12: 12 is no multiple of 8; the nearest is"),
        (["--precision", "fp8"], "--precision='fp8' is unknown; it is one of fp32, fp16, bf16, int8"),
        (["--precision", "bf16"], "precision 'bf16': onnxruntime is built in fp32, fp16, int8; that is what openvino"),
    ],
)
def test_sizes_and_precisions_that_cannot_be_built(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert cli.main(["build-engine", "--model", str(tiny_model), "--backend", "onnxruntime", *given]) == 2
    heard = capsys.readouterr().err.strip()
    assert heard.startswith(f"error: {said}")
    assert "\n" not in heard


def profile(batch: int, side: int) -> Profile:
    one, sides = Span(min=batch, opt=batch, max=batch), Span(min=side, opt=side, max=side)
    return Profile(batch=one, height=sides, width=sides)


def test_of_two_that_want_the_same_one_builds_and_the_other_waits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path / "cache"))
    graphs = ensure_engines(tiny_model, backends=BACKENDS, output=tmp_path / "graphs").bundle.path / "onnxruntime-fp32"
    waits = tmp_path / "one waits"
    ask = (
        "import logging, pathlib, shutil, time; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from export import stages\n"
        "from smooth_rt.build import ensure_engines\n"
        f"waits = pathlib.Path({str(waits)!r})\n"
        "class Told(logging.Handler):\n"
        "    def emit(self, record):\n"
        "        if 'waiting: ' in record.getMessage(): waits.touch()\n"
        "logging.getLogger().addHandler(Told())\n"
        "def copied(module, network, dims, path):\n"
        "    while not waits.exists(): time.sleep(0.05)\n"  # an export that lasts until the other one is there
        "    path.parent.mkdir(parents=True)\n"
        "    for suffix in ('', '.data'):\n"
        f"        shutil.copy(f'{graphs}/{{network.name}}/model.onnx{{suffix}}', f'{{path}}{{suffix}}')\n"
        "stages.to_onnx = copied\n"
        f"built = ensure_engines({str(tiny_model)!r}, backends=['onnxruntime'])\n"
        "print(built.reused)"
    )
    home = str(Path(cli.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ask], cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert sorted(out.strip() for out, _ in said) == ["False", "True"]
    waited = next(err for out, err in said if out.strip() == "True")
    assert "waiting: another process is building" in waited
    assert "reusing engines" in waited


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
    for name in ("abacus",):
        with pytest.raises(EngineError, match=name):
            ensure_engines(tiny_model, backends=[name])
    with pytest.raises(InputError, match="inf"):
        ensure_engines(tiny_model, lora, float("inf"), BACKENDS)
    model = load_model(tiny_model)
    ensure_engines(model, lora, 0.9, BACKENDS)
    with pytest.raises(InputError, match="load it again"):
        ensure_engines(model, lora, 0.9, BACKENDS)
    assert len(builds) == 1
