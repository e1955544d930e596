"""One stage alone: what the exporter and the converter write, say and refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from engines.contract import Dims, NetworkName, contract
from engines.errors import EngineError
from engines.manifest import digest_file
from engines.select import architecture
from engines.variant import Bounds, Variant
from export import half, stages
from export.to_onnx import to_onnx
from export.to_openvino import to_openvino

Networks = dict[NetworkName, nn.Module]


def test_the_same_module_gives_the_same_graph(built: Any, networks: Networks, dims: Dims, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    to_onnx(networks["text_encoder"], contract("text_encoder", dims), dims, path)
    for suffix in ("", ".data"):
        assert digest_file(Path(f"{path}{suffix}")) == digest_file(
            built.bundle.path / "onnxruntime-fp32" / "text_encoder" / f"model.onnx{suffix}"
        )


@pytest.mark.parametrize("name", ["text_encoder", "unet"])
def test_the_same_graph_is_the_same_file_on_openvino(built: Any, tmp_path: Path, name: NetworkName) -> None:
    """Whatever the process has made before."""
    for path in (tmp_path / "one.xml", tmp_path / "two.xml"):
        to_openvino(built.bundle.path / "onnxruntime-fp32" / name / "model.onnx", path)
    for suffix in (".xml", ".bin"):
        assert digest_file(tmp_path / f"one{suffix}") == digest_file(tmp_path / f"two{suffix}")


def test_exporting_is_silent(
    networks: Networks, dims: Dims, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "text_encoder.onnx"
    to_onnx(networks["text_encoder"], contract("text_encoder", dims), dims, path)
    to_openvino(path, tmp_path / "text_encoder.xml")
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


class Table(nn.Module):
    """A text encoder that is exported in a moment."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.table = nn.Embedding(dims.vocabulary, dims.text_width)
        self.factor = 1.0

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return ((self.factor * self.table(input_ids)).float(),)


def test_the_tests_export_once_and_never_take_another_modules_graph(
    exported_once: Any, dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[nn.Module] = []
    export: Any = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda module, *args, **of: asked.append(module) or export(module, *args, **of)
    )
    places = iter(range(100))

    def exported(module: nn.Module) -> str:
        path = tmp_path / f"{next(places)}" / "model.onnx"
        exported_once(module.eval(), contract("text_encoder", dims), dims, path)
        return digest_file(path) + digest_file(path.with_name("model.onnx.data"))

    module = Table(dims)
    first = exported(module)
    for same in (module, copy.deepcopy(module)):
        assert exported(same) == first
    assert asked == [module]
    changes: tuple[Callable[[Table], Any], ...] = (
        lambda it: it.table.weight.data[0, 0].add_(1e-3),
        lambda it: it.half(),
        lambda it: setattr(it, "factor", 2.0),
    )
    for change in changes:
        other = copy.deepcopy(module)
        change(other)
        assert exported(other) != first
        assert asked[-1] is other
    assert len(asked) == 1 + len(changes)


def test_a_graph_that_openvino_cannot_convert(tmp_path: Path) -> None:
    (tmp_path / "unet.onnx").write_bytes(b"garbage")
    with pytest.raises(EngineError, match="unet: openvino cannot convert it") as caught:
        to_openvino(tmp_path / "unet.onnx", tmp_path / "unet" / "openvino_model.xml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unet").exists()


def test_the_timestep_is_exact_in_every_precision_of_openvino(built: Any) -> None:
    root = built.bundle.path / "openvino-fp32"
    marked: dict[str, set[str]] = {}
    for name in ("unet", "text_encoder"):
        layers = ElementTree.parse(root / name / "openvino_model.xml").getroot().iter("layer")
        exact = [one for one in layers if one.find("rt_info/attribute[@name='DisablePrecisionConversion']") is not None]
        marked[name] = {str(one.get("type")) for one in exact}
    # From the integer to what the first linear layer is given, and nothing else.
    assert marked["unet"] >= {"Convert", "Multiply", "Sin", "Cos", "Concat"}
    assert not marked["unet"] & {"MatMul", "Convolution", "MVN", "Add", "Swish"}
    assert marked["text_encoder"] == set()


def test_a_package_in_half_precision_has_its_islands_and_notes_them(
    networks: Networks, dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "WORTH", 0.0)  # every island is kept
    compiled: list[tuple[nn.Module, str]] = []
    monkeypatch.setattr(
        "export.to_inductor.to_inductor", lambda module, *_, precision, **__: compiled.append((module, precision))
    )
    made = stages.Stages(tmp_path, dims, None, lambda *_: None)
    sizes: Bounds = {symbol: (size, size, size) for symbol, size in {"batch": 1, "height": 8, "width": 8}.items()}
    variant = Variant(backend="inductor", precision="bf16", lora_mode="fused", architecture=architecture())
    network = contract("unet", dims)
    graph = made.build(network, networks["unet"], variant, "bf16", [sizes, sizes], tmp_path)
    assert graph.notes == {"packages": 2, "fp32_islands": ["norms", "timestep embedding"]}
    for module, precision in compiled:
        assert precision == "bf16"
        of = {type(one).__name__: {weight.dtype for weight in one.parameters()} for one in module.modules()}
        assert of["GroupNorm"] == of["TimestepEmbedding"] == {torch.float32}
        assert of["Conv2d"] == {torch.bfloat16}
    exact = variant.model_copy(update={"precision": "fp32"})
    assert made.build(network, networks["unet"], exact, "fp32", [sizes], tmp_path).notes == {"packages": 1}
    assert compiled[-1] == (networks["unet"], "fp32")
