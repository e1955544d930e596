"""Gradients of a pipeline whose engines have none: eager autograd takes them, on the weights that the bundle was made
from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.base import Engine
from engines.bundle import Bundle
from engines.eager import EagerEngine
from engines.manifest import Manifest, Source
from smooth_rt.errors import EngineError
from smooth_rt.model import load_model
from smooth_rt.networks import eager_engines
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion import METHODS

BOTH = ("sample", "encoder_hidden_states")


class Forward(EagerEngine):
    """A backend whose engines take no gradients."""

    backend = "forward"

    def __init__(self, engine: EagerEngine) -> None:
        assert engine._module is not None
        super().__init__(engine.network, engine._module)
        self.gradients = {}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The model, where it may be moved away."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def pipe(folder: Path) -> SmoothPipeline:
    """On engines that are said to be of a bundle."""
    model = load_model(folder)
    engines = {name: Forward(engine) for name, engine in eager_engines(model).items()}
    pipe = SmoothPipeline(engines, model.config(), model.dims)
    source = Source(model=str(folder), digests=dict(model.digests))
    pipe.bundle = Bundle(folder.with_name("bundle"), Manifest.model_construct(dims=model.dims, source=source, files=[]))
    return pipe


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    image, text = (3, 4, 8, 8), (3, 12, 32)
    shapes = {"latents": image, "prompt_embeds": text, "cotangent": image, "cotangent_scale": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def wanted(folder: Path, drawn: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """By autograd on diffusers' own UNet."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    x, text, c, s = (one.clone() for one in drawn.values())
    x.requires_grad_()
    text.requires_grad_()
    output = unet(x, 300, text).sample
    loss = (output * c).sum() + 0.5 * (s[:, None, None, None] * output**2).sum()
    return output.detach(), dict(zip(BOTH, torch.autograd.grad(loss, [x, text]), strict=True))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_it_is_said_once_and_right(
    pipe: SmoothPipeline, folder: Path, drawn: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    output, grads = wanted(folder, drawn)
    for names in (BOTH, ("sample",), BOTH):
        found, got = pipe.vjp(drawn["latents"], 300, drawn["prompt_embeds"], names, *list(drawn.values())[2:])
        torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, {name: grads[name] for name in names}, rtol=1e-4, atol=1e-4)
    (line,) = said(caplog)
    assert line.startswith("gradients: taken by eager autograd, not by the engine (unet: the forward engine")
    assert "sample" in line
    assert "\n" not in line
    assert pipe.evaluations == {"forward": 0, "gradient": 9}


def test_calls_are_no_larger_than_the_engine_takes(
    pipe: SmoothPipeline, drawn: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipe.vjp(drawn["latents"], 300, drawn["prompt_embeds"], BOTH, drawn["cotangent"], drawn["cotangent_scale"])
    rows: list[int] = []
    vjp = Engine.vjp

    def seen(engine: Engine, *arguments: Any, **inputs: Tensor) -> Any:
        rows.append(len(inputs["sample"]))
        return vjp(engine, *arguments, **inputs)

    monkeypatch.setattr(Engine, "vjp", seen)
    pipe._engines["unet"].bounds = ({"batch": (1, 2, 2), "height": (8, 8, 8), "width": (8, 8, 8)},)
    parts = pipe.vjp(drawn["latents"], 300, drawn["prompt_embeds"], BOTH, drawn["cotangent"], drawn["cotangent_scale"])
    assert rows == [2, 1]
    torch.testing.assert_close(parts, whole)
    assert pipe.evaluations == {"forward": 0, "gradient": 6}
    # A batch size that was asked for counts here, too.
    rows.clear()
    pipe.batch_size = 1
    pipe.vjp(drawn["latents"], 300, drawn["prompt_embeds"], ["sample"], drawn["cotangent"])
    assert rows == [1, 1, 1]


def test_forward_passes_stay_the_engines(pipe: SmoothPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method with gradients, and both are counted."""
    rows = {"forward": 0, "gradient": 0}
    infer = Engine.infer

    def seen(engine: Engine, **inputs: Tensor) -> dict[str, Tensor]:
        if engine.network.name == "unet" or "cotangent" in inputs:
            kind = "gradient" if "cotangent" in inputs else "forward"
            assert engine.backend == {"forward": "forward", "gradient": "eager"}[kind]
            rows[kind] += len(inputs["sample"])
        return infer(engine, **inputs)

    monkeypatch.setattr(Engine, "infer", seen)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pipe.invert(images, "dog", method="null-text", num_inference_steps=3, keep=False)
    assert pipe.evaluations == rows
    most = METHODS["null-text"].evaluations(3, True)
    assert 0 < rows["gradient"] <= 2 * most.gradients


def test_weights_out_of_reach_are_said_in_one_line(
    pipe: SmoothPipeline, folder: Path, drawn: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> str:
        with pytest.raises(EngineError) as caught:
            pipe.vjp(drawn["latents"], 300, drawn["prompt_embeds"], BOTH, drawn["cotangent"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    away = folder.rename(tmp_path / "away")
    try:
        line = refused()
        assert line.startswith("unet: the forward engine")
        assert "nor can eager autograd take it" in line
        assert str(folder) in line
        # Other weights in their place are no better.
        shutil.copytree(away, folder)
        shutil.copy(away / "vae" / "config.json", folder / "vae")
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert "unet changed" in refused()
        shutil.rmtree(folder)
    finally:
        away.rename(folder)
    assert said(caplog) == []
    pipe.vjp(drawn["latents"], 300, drawn["prompt_embeds"], BOTH, drawn["cotangent"])
    pipe.bundle, pipe._eager_unet = None, None
    assert "nor can" not in refused()
