"""A bundle is proved again: what runs, and the plain graph that others open in its place."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from torch import nn

from engines.bundle import Bundle
from engines.contract import NetworkName
from engines.errors import ParityError
from engines.ort import RUN_GRAPH, plain_graph
from engines.whole import stamps
from export.prove import prove

Networks = dict[NetworkName, nn.Module]


@pytest.fixture
def bundle(built: Any, tmp_path: Path) -> Bundle:
    """ONNX Runtime's variant alone, which says nothing of its plain graphs."""
    copied = Bundle.open(shutil.copytree(built.bundle.path, tmp_path / "bundle"))
    variant = copied.find("onnxruntime")
    engines = [record.model_copy(update={"notes": {}}) for record in variant.engines]
    copied.manifest = copied.manifest.model_copy(update={"variants": [variant.model_copy(update={"engines": engines})]})
    return copied


def test_the_plain_graph_is_compared_again(bundle: Bundle, networks: Networks) -> None:
    told: list[tuple[str, int, int]] = []
    (found,) = prove(bundle, networks, seed=1, progress=lambda *step: told.append(step)).values()
    assert not isinstance(found, str)
    rewritten = [record for record in found.engines if Path(record.file).name == RUN_GRAPH]
    assert "unet" in [record.network for record in rewritten]
    for record in found.engines:
        noted = record.notes.get("plain_graph", [])
        assert isinstance(noted, list)
        outputs = dict(said.split() for said in noted)
        assert list(outputs) == ([one.output for one in record.parity] if record in rewritten else [])
        assert all(0 < float(error) <= 1e-4 for error in outputs.values())
    # Three cases of each engine, one more of the UNet's, and one of each plain graph.
    cases = 3 * len(found.engines) + 1 + len(rewritten)
    assert told[-1][1:] == (cases, cases)


def test_a_plain_graph_that_is_wrong_proves_nothing(bundle: Bundle, networks: Networks) -> None:
    plain = plain_graph(bundle.path / bundle.variants[0].engine("unet").file)
    assert plain is not None
    model = onnx.load(plain, load_external_data=False)
    (node,) = (node for node in model.graph.node if "noise_pred" in node.output)
    node.output[0] = "before"
    model.graph.initializer.append(helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [1.01]))
    model.graph.node.append(helper.make_node("Mul", ["before", "factor"], ["noise_pred"]))
    onnx.save(model, plain)
    bundle._stamps = stamps(bundle.path, bundle.manifest.files)  # as if it had been opened so
    said = rf"{re.escape(str(bundle.path))}: onnxruntime-fp32: unet: onnxruntime's noise_pred differs .* by 1\.0e-02"
    with pytest.raises(ParityError, match=said):
        prove(bundle, networks, seed=1)
