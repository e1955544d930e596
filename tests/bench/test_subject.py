"""What is measured: FLOPs grow with the rows, and a LoRA is in the weights whether its engines are built or reused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.cases import MEASURED, _inputs, flop_of_morph
from bench.floor import count_flop
from bench.results import Settings
from bench.subject import Subject, open_subject, resolve_engines
from engines.select import Choice
from smooth_rt.errors import EngineError
from smooth_rt.model import load_model

PROJECTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
EAGER = Choice("eager", "asked for")
SETTINGS = Settings(
    model="m",
    revision=None,
    lora=None,
    lora_strength=1.0,
    engines=("eager",),
    batch_sizes=(1,),
    image_height=16,
    image_width=24,
    steps=3,
    guidance_scale=7.5,
    frames=4,
    repeats=1,
    warmup=0,
    seed=0,
    prompt="a dog",
)


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Subject:
    return open_subject(load_model(tiny_model), None, 1.0, [EAGER, EAGER])


@pytest.fixture
def lora(tiny_model: Path, tmp_path: Path) -> Path:
    weight = load_model(tiny_model).unet.get_submodule(PROJECTION).weight
    name = PROJECTION.replace(".to_q", ".processor.to_q_lora")
    tensors = {
        f"{name}.down.weight": torch.ones(1, weight.shape[1]),
        f"{name}.up.weight": torch.ones(weight.shape[0], 1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_an_engine_asked_for_twice_is_measured_once(subject: Subject) -> None:
    assert subject.backends == ("eager",)


@pytest.mark.parametrize("network", MEASURED)
def test_flop_is_proportional_to_the_rows(subject: Subject, network: Any) -> None:
    one, three = (
        count_flop(subject.modules[network], list(_inputs(subject, network, rows, SETTINGS).values()))
        for rows in (1, 3)
    )
    assert one > 0
    assert three == 3 * one


def test_flop_of_a_morph_by_hand() -> None:
    # Two texts of 5; 4 frames of 3 guided steps of 2 x 100, and one decoding of 1000 each.
    assert flop_of_morph({"text_encoder": 5, "unet": 100, "vae_decoder": 1000}, SETTINGS) == 2 * 5 + 4 * (600 + 1000)


def test_guidance_of_one_needs_one_pass_and_one_text() -> None:
    unguided = SETTINGS.model_copy(update={"guidance_scale": 1.0})
    assert flop_of_morph({"text_encoder": 5, "unet": 100, "vae_decoder": 1000}, unguided) == 5 + 4 * (300 + 1000)


def test_the_lora_is_in_the_weights(tiny_model: Path, lora: Path) -> None:
    base = load_model(tiny_model).unet.get_submodule(PROJECTION).weight
    fused = open_subject(load_model(tiny_model), str(lora), 0.5, [EAGER])
    assert torch.allclose(fused.model.unet.get_submodule(PROJECTION).weight, base + 0.5)


def test_the_lora_is_in_the_weights_where_engines_are_reused(
    tiny_model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused = object()
    monkeypatch.setattr("bench.subject.build_engines", lambda *_: reused)
    base = load_model(tiny_model).unet.get_submodule(PROJECTION).weight
    fused = open_subject(load_model(tiny_model), str(lora), 1.0, [replace(EAGER, backend="onnxruntime")])
    assert fused.bundle is reused
    assert torch.allclose(fused.model.unet.get_submodule(PROJECTION).weight, base + 1)


def test_what_cannot_run_is_left_out_with_its_reason_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "openvino is not installed; run `pip install openvino`"
    for module in ("bench.subject", "engines.select"):
        monkeypatch.setattr(f"{module}.availability", lambda name: missing if name == "openvino" else None)
    choices, warnings = resolve_engines(None)
    assert list(choices) == ["eager", "onnxruntime"]
    assert warnings == [f"engine 'openvino' is left out: {missing}"]
    with pytest.raises(EngineError, match="pip install openvino"):
        resolve_engines(["openvino"])


def test_auto_says_what_it_chose() -> None:
    choices, _ = resolve_engines(["auto"])
    assert choices["auto"].backend != "auto"
    assert choices["auto"].reason
