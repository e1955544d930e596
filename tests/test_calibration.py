"""Real runs of a model: inputs of every timestep and of both halves of guidance, and images as a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from engines.bundle import Bundle
from engines.contract import Dims, contract
from engines.manifest import CALIBRATED_ON, EngineRecord, Manifest, Source, VariantRecord
from engines.recipes import build_revision
from engines.select import architecture, backend_version
from engines.variant import Profile, Span, Variant
from smooth_rt.build import ensure_engines
from smooth_rt.calibration import IMAGES, Trajectories, spread
from smooth_rt.evaluation.fidelity import fidelity
from smooth_rt.model import Model, load_model
from smooth_rt.orders import lacking
from smooth_rt.pipeline import SmoothPipeline

DIMS = Dims(12, 32, 100, 4, 3, 2, 4, 8)
SIZE = {"batch": "1", "height": "16", "width": "16"}
VARIANT = Variant(backend="openvino", precision="int8", lora_mode="fused", architecture=architecture())


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


def int8(calibrated_on: list[str] | None) -> Bundle:
    """A bundle of one UNet in int8, as far as its manifest tells of its calibration."""
    notes: dict[str, Any] = {} if calibrated_on is None else {CALIBRATED_ON: calibrated_on}
    parts: dict[str, Any] = {"bounds": [], "places": {}, "parity": []}
    unet = EngineRecord.model_construct(network="unet", precision="int8", notes=notes, **parts)
    encoder = EngineRecord.model_construct(network="text_encoder", precision="fp32", notes={}, **parts)
    built = VariantRecord.model_construct(
        variant=VARIANT,
        profiles=[],
        engines=[encoder, unet],
        backend_version=backend_version("openvino"),
        build_revision=build_revision(VARIANT),
    )
    source = Source(model="m", digests={})
    return Bundle(Path("b"), Manifest.model_construct(dims=DIMS, source=source, variants=[built], files=[]))


@pytest.mark.parametrize(
    ("calibrated_on", "asked", "built_anew"),
    [
        (["d"], None, False),  # who names no prompts takes what there is
        (["d"], ["d"], False),
        (["d"], ["e"], True),
        (["d", "e"], ["e", "d"], True),  # each image has a noise of its own
        (None, ["d"], True),  # by an earlier version, which did not tell
        (None, None, False),
    ],
)
def test_int8_on_other_prompts_is_built_anew(
    calibrated_on: list[str] | None, asked: list[str] | None, built_anew: bool
) -> None:
    there = int8(calibrated_on)
    missing = lacking(there, there.source, [VARIANT], [], (), DIMS, asked)
    assert list(missing.values()) == (["b: openvino-int8 is calibrated on other prompts"] if built_anew else [])


def test_prompts_that_were_spread_stay_as_they_are(model: Model) -> None:
    many = [f"prompt {index}" for index in range(100)]
    found = spread(many, model)
    assert (len(found), found[0], found[-1]) == (IMAGES, "prompt 0", "prompt 96")
    assert spread(found, model) == found
    assert spread(["a", "b"], model, images=3) == ["a", "a", "b"]


@pytest.mark.slow
def test_naming_other_prompts_quantises_the_unet_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf", reason="quantises; pip install 'smooth-rt[int8]'")
    monkeypatch.setattr("smooth_rt.calibration.IMAGES", 1)
    monkeypatch.setattr("export.to_int8.ENOUGH_DB", 0.0)  # one image of random weights tells nothing
    size = [Profile(**{name: Span.parse(text, name) for name, text in SIZE.items()})]
    found = []
    for prompts, profiles in ((["red apple"], []), (["red apple"], []), (["dog"], []), ([], []), ([], size)):
        made = ensure_engines(
            tiny_model, backends=["openvino"], precision="int8", output=tmp_path / "b", calibration_prompts=prompts,
            profiles=profiles,
        )  # fmt: skip
        (built,) = made.bundle.variants
        found.append((made.reused, built.prompts, built.engine("vae_decoder").graph))
    assert [(reused, prompts) for reused, prompts, _ in found] == [
        (False, ["red apple"]), (True, ["red apple"]), (False, ["dog"]), (True, ["dog"]), (False, ["dog"]),
    ]  # fmt: skip
    assert len({graph for _, _, graph in found[:4]}) == 1  # of fp32 and bf16, they are taken over
