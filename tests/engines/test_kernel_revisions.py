"""A graph with this project's kernels means what it meant when it was built, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from numpy.typing import NDArray
from openvino import opset13 as ops
from torch import nn

from engines import kernels
from engines.contract import Dims, contract
from engines.errors import EngineError
from engines.ov import OvEngine, core

# A graph of every operation, as this revision's first build wrote it: without weights, so that the file is all of it.
KEPT = Path(__file__).with_name("kernels.xml")
SIDE, CHANNELS = 6, 2
INPUTS = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=np.float32)  # B^T of F(2, 3)
OUTPUTS = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=np.float32)  # A^T


def graph() -> openvino.Model:
    """What `KEPT` holds."""
    create = kernels.operations().create
    tokens = [ops.parameter([1, count, 2, 4], np.float32, name) for name, count in (("q", 3), ("k", 5), ("v", 5))]
    attention = create("Attention", [port.output(0) for port in tokens], {"scale": 0.3, "bf16": False})
    picture = ops.parameter([1, CHANNELS, SIDE, SIDE], np.float32, "picture")
    sides = {"height": SIDE, "width": SIDE}
    cells = create("WinogradInput", [picture.output(0)], {"matrix": INPUTS.ravel().tolist(), "rows": 4, **sides})
    back = create("WinogradOutput", cells.outputs(), {"matrix": OUTPUTS.ravel().tolist(), "rows": 2, **sides})
    return openvino.Model([ops.result(node.output(0)) for node in (attention, back)], [*tokens, picture], "kernels")


def transformed(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """A^T B^T d B A of each tile d."""
    both = OUTPUTS @ INPUTS
    padded = np.pad(picture, ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.empty_like(picture)
    for down in range(0, SIDE, 2):
        for across in range(0, SIDE, 2):
            cell = padded[:, :, down : down + 4, across : across + 4]
            found[:, :, down : down + 2, across : across + 2] = both @ cell @ both.T
    return found


@pytest.mark.usefixtures("own_kernels")
def test_a_graph_that_was_built_before_means_the_same() -> None:
    """Where this fails because an operation was changed, count `kernels.REVISION` up, and write the file anew by
    `openvino.save_model(graph(), KEPT)`, without its empty .bin: so bundles with such graphs are built again, and none
    is read wrongly."""
    assert kernels.holds(KEPT)
    kernels.register(core())
    drawn = np.random.default_rng(0)
    shapes = [(1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4), (1, CHANNELS, SIDE, SIDE)]
    q, k, v, picture = (drawn.standard_normal(shape).astype(np.float32) for shape in shapes)
    compiled = core().compile_model(core().read_model(str(KEPT)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([q, k, v, picture])
    heads_first = [torch.from_numpy(one).transpose(1, 2) for one in (q, k, v)]
    attended = nn.functional.scaled_dot_product_attention(*heads_first, scale=0.3).transpose(1, 2)
    np.testing.assert_allclose(found[0], attended.numpy(), atol=1e-5)
    np.testing.assert_allclose(found[1], transformed(picture), atol=1e-5)


def test_a_graph_of_another_revision_is_refused_before_anything_is_compiled(
    dims: Dims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: pytest.fail("compiled"))
    path = tmp_path / "model.xml"
    for other in ("smooth_rt", f"smooth_rt{kernels.REVISION + 1}"):
        path.write_text(KEPT.read_text().replace(f'"{kernels.OPSET}"', f'"{other}"'))
        with pytest.raises(EngineError) as caught:
            OvEngine(contract("vae_decoder", dims), path)
        assert str(caught.value) == (
            f"{path}: its kernels are those of {other}, this version has {kernels.OPSET}; rebuild"
        )
