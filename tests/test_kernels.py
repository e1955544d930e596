"""Who computes a layer, as it is asked for: by the command line, in Python, and of a bundle. No kernel runs here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle
from engines.contract import NETWORKS, WRT, Dims
from engines.errors import EngineError, InputError
from engines.manifest import Manifest, Source, VariantRecord
from engines.recipes import RECIPES, check_kernels, native_hint
from engines.select import architecture
from engines.variant import Kernels, Precision, Variant
from smooth_rt import cli
from smooth_rt.pipeline import SmoothPipeline

Asked = list[dict[str, Any]]


def variant(precision: Precision, kernels: Kernels = "native") -> Variant:
    """Of OpenVINO on this machine."""
    return Variant(
        backend="openvino", precision=precision, lora_mode="fused", architecture=architecture(), kernels=kernels
    )


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Asked]:
    """Has a function raise where it would begin; lists what it was called with by name."""

    def stop(place: str) -> Asked:
        asked: Asked = []

        def begin(*given: Any, **named: Any) -> None:
            asked.append({**named, "given": given})
            raise EngineError("far enough")

        monkeypatch.setattr(place, begin)
        return asked

    return stop


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], "backend"),
        (["--kernels", "native", "--backend", "openvino", "--precision", "int8", "--lora-mode", "fused"], "native"),
    ],
)
def test_build_engine_hands_it_on(
    stops: Callable[[str], Asked], tiny_model: Path, options: list[str], wanted: str
) -> None:
    asked = stops("smooth_rt.build.lacking")
    assert cli.main(["build-engine", "--model", str(tiny_model), "--lora", "none", *options]) == 2
    assert {variant.kernels for variant in asked[0]["given"][2]} == {wanted}


@pytest.mark.parametrize(("options", "wanted"), [([], "backend"), (["--kernels", "native"], "native")])
def test_what_runs_on_a_model_builds_with_it(
    stops: Callable[[str], Asked], tiny_model: Path, tmp_path: Path, options: list[str], wanted: str
) -> None:
    asked = stops("smooth_rt.build.build_engines")
    run = ["generate", "--prompt", "dog", "--engine", "openvino", "--output", str(tmp_path / "out")]
    assert cli.main([*run, "--model", str(tiny_model), *options]) == 2
    assert [one["kernels"] for one in asked] == [wanted]


@pytest.mark.parametrize(("options", "wanted"), [([], None), (["--kernels", "native"], "native")])
def test_what_runs_on_a_bundle_chooses_by_it(
    stops: Callable[[str], Asked],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    wanted: str | None,
) -> None:
    built = VariantRecord(variant=variant("fp32"), profiles=[], backend_version="1", engines=[])
    source, dims = Source(model="some model", digests={}), Dims(77, 768, 49408, 4, 3, 8, 8, 64)
    manifest = Manifest.model_construct(dims=dims, source=source, variants=[built], files=[])
    monkeypatch.setattr("engines.bundle.Bundle.open", lambda *_, **__: Bundle(tmp_path, manifest))
    for place in ("model.read_config", "pipeline.read_config", "commands.running._check_fit"):
        monkeypatch.setattr(f"smooth_rt.{place}", lambda *_: None)
    asked = stops("engines.bundle.Bundle.find")
    run = ["generate", "--prompt", "dog", "--engines", str(tmp_path), "--output", str(tmp_path / "out")]
    assert cli.main([*run, *options]) == 2
    assert asked[0]["given"][1:] == ("openvino", None, None, None, wanted)


def test_auto_takes_a_backend_that_has_them(stops: Callable[[str], Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.select.gpu", lambda: "sm89")
    monkeypatch.setattr("engines.select.availability", lambda _: None)
    monkeypatch.setattr("smooth_rt.pipeline.load_model", lambda *_, **__: None)
    asked = stops("smooth_rt.build.build_engines")
    for engine in ("auto", "openvino"):
        with pytest.raises(EngineError, match="far enough"):
            SmoothPipeline.from_pretrained("any", engine=engine, kernels="native")
    assert [(one["given"][3], one["kernels"]) for one in asked] == [(["openvino"], "native")] * 2
    for engine in ("eager", "onnxruntime"):
        with pytest.raises(InputError, match=f"kernels=native: openvino has them, not {engine}; name openvino alone"):
            SmoothPipeline.from_pretrained("any", engine=engine, kernels="native")


def test_only_openvino_has_them() -> None:
    for name in RECIPES:
        check_kernels(name, "backend")
    check_kernels("openvino", "native")
    for name in set(RECIPES) - {"openvino"}:
        with pytest.raises(InputError, match=f"kernels=native: openvino has them, not {name}; name openvino alone"):
            check_kernels(name, "native")
    with pytest.raises(InputError, match="kernels=None: unknown; choose from backend, native"):
        check_kernels("openvino", None)  # type: ignore[arg-type]


def test_of_the_networks_the_unet_alone_and_none_of_gradients() -> None:
    wanted: dict[Precision, str] = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16"}
    for precision, hint in wanted.items():
        hints = {name: native_hint(variant(precision), name) for name in (*NETWORKS, *WRT)}
        assert {name: found for name, found in hints.items() if found is not None} == {"unet": hint}
        assert native_hint(variant(precision, "backend"), "unet") is None
