"""torch's modes around loading and calling change no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from engines.bundle import Bundle
from engines.torch_modes import default_modes
from smooth_rt.build import ensure_engines
from smooth_rt.lora import read_lora
from smooth_rt.model import load_model
from smooth_rt.pipeline import SmoothPipeline

Mode = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Mode] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        ensure_engines(tiny_model, lora, backends=["openvino"], lora_mode="refit")
        yield ensure_engines(tiny_model, lora, backends=["onnxruntime"], lora_mode="runtime").bundle


def opened(kind: str, bundle: Bundle, model: Path, lora: Path) -> SmoothPipeline:
    if kind == "eager fused":
        return SmoothPipeline.from_pretrained(model, lora, 0.5, engine="eager")
    if kind == "eager runtime":
        return SmoothPipeline.from_pretrained(load_model(model), lora, 0.5, engine="eager", lora_mode="runtime")
    backend, mode = kind.split()
    return SmoothPipeline.from_engines(bundle, backend, lora_mode=mode, lora_strength=0.5)


def results(pipe: SmoothPipeline) -> list[torch.Tensor]:
    """Return the results of each task, and of gradients."""
    image = np.full((16, 16, 3), 128, np.uint8)
    image[4:12, 4:12] = (220, 60, 40)
    steps: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)]
    made = [pipe("dog", generator=seeds[0], **steps).latents]
    made.append(pipe.interpolate("dog", generator=seeds, frames=3, adain=True, **steps).latents)
    made.append(cast(torch.Tensor, pipe.decode(made[0], "pt")))
    for method in ("ddim", "null-text", "edict"):
        inverted = pipe.invert(image, "dog", method=method, keep=False, **steps)
        made += [inverted.latents, inverted.negative_prompt_embeds]
    made.append(pipe.edit(image, "red apple", "dog", keep=False, **steps).latents)
    made.append(pipe.edit(image, "red apple", edit_method="sdedit", generator=seeds[1], **steps).latents)
    output, grads = pipe.vjp(made[0], 500, pipe.encode_prompt("dog"), "sample", made[0])
    return [*made, output, grads["sample"]]


@pytest.mark.parametrize("kind", ["eager fused", "eager runtime", "onnxruntime runtime", "openvino refit"])
@pytest.mark.filterwarnings("ignore:.*gradients.*")
def test_modes_around_loading_and_calling_change_no_number(
    bundle: Bundle, tiny_model: Path, lora: Path, kind: str
) -> None:
    with opened(kind, bundle, tiny_model, lora) as pipe:
        wanted = results(pipe)
    for name, mode in MODES.items():
        with mode():
            pipe = opened(kind, bundle, tiny_model, lora)
        with pipe:
            loaded = results(pipe)  # the mode was left
            with mode():
                called = results(pipe)
        for where, found in (("load", loaded), ("call", called)):
            for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
                assert other.dtype == torch.float32, f"{name}, {where}: result {index}"
                assert not other.is_inference()
                assert torch.equal(one, other), f"{name}, {where}: result {index} is off by {(one - other).abs().max()}"


def test_tensors_of_inference_mode_serve_gradients(tiny_model: Path) -> None:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        with torch.inference_mode():
            latents = torch.ones(1, 4, 8, 8)
            embeds = pipe.encode_prompt("dog")
        assert latents.is_inference()
        assert not embeds.is_inference()
        _, grads = pipe.vjp(latents, 500, embeds, "sample", latents)
        with torch.inference_mode():
            held = embeds.clone()
        _, again = pipe.vjp(latents, 500, held, "sample", latents)
        assert torch.equal(grads["sample"], again["sample"])


def test_model_loaded_in_inference_mode_is_trainable(tiny_model: Path, lora: Path) -> None:
    with torch.inference_mode():
        model, adapter = load_model(tiny_model), read_lora(lora)
    assert not any(tensor.is_inference() for tensor in model.unet.state_dict().values())
    assert not any(layer.down.is_inference() or layer.up.is_inference() for layer in adapter.layers.values())
    model.unet.requires_grad_()
    output = model.unet(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 12, 32)).sample
    output.square().mean().backward()
    assert model.unet.conv_in.weight.grad is not None


def test_callback_keeps_gradients_where_the_caller_has_them(tiny_model: Path) -> None:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        seen = []

        def callback(*_: Any) -> None:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

        modes: tuple[Mode, ...] = (nullcontext, torch.no_grad, torch.inference_mode)
        for mode in modes:
            with mode():
                pipe("dog", num_inference_steps=1, callback_on_step_end=callback)
        assert seen == [(True, False), (False, False), (False, False)]


def test_default_modes_end_with_their_body() -> None:
    with torch.device("meta"), torch.inference_mode():
        with default_modes():
            inside = torch.zeros(2)
        outside = torch.zeros(2)
    assert (inside.device.type, inside.is_inference()) == ("cpu", False)
    assert (outside.device.type, outside.is_inference()) == ("meta", True)
