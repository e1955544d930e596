"""Real runs of a model: inputs of every timestep and of both halves of guidance, and images as a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from engines.contract import contract
from smooth_rt.calibration import Trajectories
from smooth_rt.evaluation.fidelity import fidelity
from smooth_rt.model import Model, load_model
from smooth_rt.pipeline import SmoothPipeline


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(tiny_model)


def test_samples_span_the_schedule_and_both_halves(model: Model) -> None:
    runs = Trajectories(model, ["red apple", "dog"], images=3, steps=4)
    rows = runs.samples("unet")
    assert len(rows) == 3 * 4 * 2
    assert {tuple(row["sample"].shape) for row in rows} == {(1, 4, 8, 8)}
    steps = sorted({int(row["timestep"]) for row in rows})
    assert len(steps) == 4
    assert steps[-1] > 700
    texts = {row["encoder_hidden_states"].numpy().tobytes() for row in rows}
    assert len(texts) == 3  # two prompts and the empty one
    contract("unet", model.dims).bind(rows[0])
    # In an order that mixes, and always the same.
    assert [int(row["timestep"]) for row in rows[:6]] != sorted((int(r["timestep"]) for r in rows[:6]), reverse=True)
    again = Trajectories(model, ["red apple", "dog"], images=3, steps=4).samples("unet")
    assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(rows, again, strict=True))
    assert len(runs.samples("vae_decoder")) == 3


def test_the_exact_graph_gives_the_same_images_and_another_does_not(
    exported_once: Any, model: Model, tmp_path: Path
) -> None:
    from engines.eager import torch_networks

    network = contract("unet", model.dims)
    runs = Trajectories(model, ["red apple"], images=2, steps=3)
    exported_once(
        torch_networks(model.text_encoder, model.unet, model.vae)["unet"], network, model.dims, tmp_path / "m.onnx"
    )
    assert runs.psnr(network, tmp_path / "m.onnx", "onnxruntime") > 80
    other = onnx.load(tmp_path / "m.onnx")
    (weight,) = (one for one in other.graph.initializer if one.name == "unet.conv_out.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), weight.name))
    onnx.save(other, tmp_path / "o.onnx")
    assert runs.psnr(network, tmp_path / "o.onnx", "onnxruntime") < 50


def test_fidelity_is_that_of_each_image(tiny_model: Path) -> None:
    prompts = [f"red apple {index}" for index in range(10)]  # more than go at once
    with (
        SmoothPipeline.from_pretrained(tiny_model, engine="eager") as one,
        SmoothPipeline.from_pretrained(tiny_model, engine="eager") as two,
    ):
        seen: list[tuple[str, int, int]] = []
        same = fidelity([one], two, prompts, 2, progress=lambda *step: seen.append(step))[0]
        assert same.psnr == (float("inf"),) * 10
        assert [done for _, done, _ in seen] == [0, 8]
        network = one._engines["unet"]._module  # type: ignore[attr-defined]
        with torch.no_grad():
            network.unet.conv_out.weight.mul_(1.01)
        near = fidelity([one], two, prompts, 2)[0]
    assert 20 < near.worst <= near.median < 100
    # Of 10 images 8 go at once and 2; each time the engine's and the reference's, in turn.
    assert len(near.seconds) == len(near.reference_seconds) == 2
    assert min(near.seconds) > 0 < near.seconds_an_image
    ratios = [theirs / ours for ours, theirs in zip(near.seconds, near.reference_seconds, strict=True)]
    assert min(ratios) <= near.speedup <= max(ratios)
