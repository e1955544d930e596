"""A build with this project's kernels: which graphs they are put into, and what is told of it. No kernel runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engines import kernels
from engines.contract import Dims, NetworkName, contract
from engines.errors import EngineError, InputError
from engines.select import architecture
from engines.variant import Order, Profile, Span, Variant, every_size
from export import stages, to_openvino
from export.build import Configs, build_bundle
from export.rewrites import winograd as rewrite


@pytest.fixture
def put_in(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stands for the rewriting, and lists for each graph that it was asked for whether in bf16. The graph stays as it
    is, so that it can be run without a compiler."""
    asked: list[bool] = []

    def native_attention(model: Any, bf16: bool) -> int:
        assert len(model.get_ops()) > 100
        asked.append(bf16)
        return 5

    def transforms(model: Any, shapes: Any, rows: int, native: bool) -> Any:
        assert native
        return rewrite.winograd(model, shapes, rows)

    monkeypatch.setattr(to_openvino, "native_attention", native_attention)
    monkeypatch.setattr(to_openvino, "winograd", transforms)
    monkeypatch.setattr(kernels, "library", lambda: Path("kernels.so"))
    return asked


def variant(**changes: Any) -> Variant:
    plain: dict[str, Any] = {"backend": "openvino", "precision": "fp32", "lora_mode": "fused", "kernels": "native"}
    return Variant(**{**plain, "architecture": architecture(), **changes})


def one_size(side: int = 16) -> Profile:
    sides = Span(min=side, opt=side, max=side)
    return Profile(batch=Span(min=1, opt=1, max=1), height=sides, width=sides)


@pytest.mark.usefixtures("ready_made")
def test_a_bundle_tells_what_was_put_in_and_is_for_no_other_program(
    networks: dict[NetworkName, nn.Module], dims: Dims, built: Any, tmp_path: Path, put_in: list[bool]
) -> None:
    order = Order(variant=variant(), profiles=(every_size(dims),))
    bundle = build_bundle(
        networks, dims, built.bundle.source, [order], tmp_path / "bundle", lambda _: None, configs=Configs({}, {})
    )
    made = bundle.find("openvino")
    assert made.variant.name == "openvino-fp32-native"
    assert {record.network: record.notes for record in made.engines if record.notes} == {
        "unet": {"exact_timesteps": 10, "native_attention": 5, "halved_projection": 7}
    }
    assert put_in == [False]
    assert "--kernels native" in bundle.command(made)
    assert not (bundle.path / made.variant.name / "model_index.json").exists()


@pytest.mark.parametrize(
    ("changes", "bf16", "notes"),
    [
        ({"precision": "fp16"}, False, {"native_attention": 5, "halved_projection": 7}),
        ({"precision": "bf16"}, True, {"native_attention": 5, "halved_projection": 7}),
        ({"lora_mode": "refit"}, False, {"native_attention": 5}),  # whose weights others are put in the places of
        (
            {"convolution": "winograd"},
            False,
            {"winograd_4x4": 1, "winograd_2x2": 2, "native_attention": 5, "halved_projection": 7},
        ),
        ({"kernels": "backend"}, None, {}),  # but for the rule that every graph on OpenVINO needs
    ],
    ids=str,
)
@pytest.mark.usefixtures("ready_made")
def test_each_form_of_the_graph_has_them(
    networks: dict[NetworkName, nn.Module],
    dims: Dims,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put_in: list[bool],
    changes: dict[str, Any],
    bf16: bool | None,
    notes: dict[str, int],
) -> None:
    monkeypatch.setattr(rewrite, "LEAST_PAIRS", 20)
    monkeypatch.setattr(rewrite, "LEAST_TILES", 1)
    made = stages.Stages(tmp_path / "work", dims, None, lambda *_: None)
    network, asked = contract("unet", dims), variant(**changes)
    graph = made.build(
        network, networks["unet"], asked, asked.precision, one_size().bounds(network, dims), tmp_path / "unet"
    )
    assert graph.notes == {"exact_timesteps": 10, **notes}
    assert graph.path.is_file()
    assert put_in == ([] if bf16 is None else [bf16])


def test_of_int8_too(dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, networks: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("export.to_int8.quantise_openvino", lambda *given: asked.append(given) or {"rung": 0})
    monkeypatch.setattr(stages, "to_onnx", lambda *given: given[-1].parent.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(stages, "_layers", lambda _: 1)
    calibration: Any = object()
    made = stages.Stages(tmp_path, dims, calibration, lambda *_: None)
    for kernels_of, hint in (("native", "bf16"), ("backend", None)):
        int8 = variant(precision="int8", kernels=kernels_of)
        made.build(contract("unet", dims), networks["unet"], int8, "int8", [], tmp_path / "unet")
        assert asked.pop()[-1] == hint


def test_without_a_compiler_nothing_is_begun(
    networks: dict[NetworkName, nn.Module], dims: Dims, built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)  # whatever was compiled for other tests
    begun: list[str] = []
    order = Order(variant=variant(), profiles=(every_size(dims),))
    with pytest.raises(EngineError, match=r"^kernels 'native': .*no-compiler.* --kernels backend$"):
        build_bundle(
            networks, dims, built.bundle.source, [order], tmp_path / "bundle", lambda _: None,
            progress=lambda what, *_: begun.append(what),
        )  # fmt: skip
    assert begun == []
    assert not (tmp_path / "bundle").exists()


def test_a_backend_without_them_is_said(
    networks: dict[NetworkName, nn.Module], dims: Dims, built: Any, tmp_path: Path
) -> None:
    order = Order(variant=variant(backend="onnxruntime"), profiles=(every_size(dims),))
    with pytest.raises(InputError, match="kernels=native: openvino has them, not onnxruntime"):
        build_bundle(networks, dims, built.bundle.source, [order], tmp_path / "bundle", lambda _: None)


def test_what_a_change_raises_is_not_taken_for_openvinos(built: Any, tmp_path: Path) -> None:
    def change(_: Any) -> None:
        raise EngineError("no compiler; install one")

    onnx = built.bundle.path / "onnxruntime-fp32" / "text_encoder" / "model.onnx"
    with pytest.raises(EngineError, match=r"^no compiler; install one$"):
        to_openvino.to_openvino(onnx, tmp_path / "text_encoder.xml", change=change)
