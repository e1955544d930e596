"""One stage alone: what the exporter and the converter write, say and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engines.contract import Dims, NetworkName, contract
from engines.errors import EngineError
from engines.manifest import digest_file
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


def test_exporting_is_silent(
    networks: Networks, dims: Dims, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "text_encoder.onnx"
    to_onnx(networks["text_encoder"], contract("text_encoder", dims), dims, path)
    to_openvino(path, tmp_path / "text_encoder.xml")
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


def test_a_graph_that_openvino_cannot_convert(tmp_path: Path) -> None:
    (tmp_path / "unet.onnx").write_bytes(b"garbage")
    with pytest.raises(EngineError, match="unet: openvino cannot convert it") as caught:
        to_openvino(tmp_path / "unet.onnx", tmp_path / "unet" / "openvino_model.xml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unet").exists()
