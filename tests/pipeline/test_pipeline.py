"""SmoothPipeline on the eager engine against diffusers' own pipeline, and the splitting of work into calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from engines.base import Engine
from smooth_rt import networks
from smooth_rt.errors import EngineError
from smooth_rt.pipeline import SmoothPipeline

PROMPTS = ["red apple on blue background", "dog on white background", "dog"]
# A batch is summed in another order than one image: after 4 guided steps the final pixels agree to this.
ALONE = 1e-4


def seeds(*numbers: int) -> list[Generator]:
    return [Generator().manual_seed(number) for number in numbers]


def psnr(a: Any, b: Any) -> float:
    return float(-10 * np.log10(np.mean((np.asarray(a) - np.asarray(b)) ** 2) + 1e-20))


@pytest.fixture
def batch_size(pipe: SmoothPipeline) -> Iterator[None]:
    """A test that uses this may change the pipeline's batch size."""
    yield
    pipe.batch_size = "auto"


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_images_are_those_of_diffusers(pipe: SmoothPipeline, tiny_model: Path, guidance_scale: float) -> None:
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": PROMPTS[:2], "negative_prompt": ["", "blue"], "num_inference_steps": 6, "output_type": "np",
        "guidance_scale": guidance_scale, "num_images_per_prompt": 2, "height": 16, "width": 24,
    }  # fmt: skip
    latents = torch.randn(4, 4, 8, 12, generator=Generator().manual_seed(0))
    theirs = peer(**arguments, latents=latents).images
    ours = pipe(**arguments, latents=latents).images
    assert np.ptp(theirs) > 0.05  # not one colour, which anything would match
    assert psnr(ours, theirs) >= 40
    # A seed gives the same noise too.
    arguments |= {"prompt": "dog", "negative_prompt": None, "num_inference_steps": 2}
    for generator in (lambda: Generator().manual_seed(3), lambda: seeds(1, 2)):
        theirs = peer(**arguments, generator=generator()).images
        assert psnr(pipe(**arguments, generator=generator()).images, theirs) >= 40


def test_many_at_once_equal_each_alone(pipe: SmoothPipeline) -> None:
    together = pipe(PROMPTS, num_inference_steps=4, generator=seeds(1, 2, 3), output_type="pt").images
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, num_inference_steps=4, generator=seeds(index + 1), output_type="pt").images
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=ALONE)
    assert (together[0] - together[2]).abs().max() > 100 * ALONE


def test_one_generator_draws_image_after_image(pipe: SmoothPipeline) -> None:
    generator = Generator().manual_seed(5)
    one_by_one = torch.cat([pipe.draw_noise(1, 16, 16, generator) for _ in range(3)])
    assert torch.equal(pipe.draw_noise(3, 16, 16, Generator().manual_seed(5)), one_by_one)
    torch.manual_seed(5)
    assert torch.equal(pipe.draw_noise(3, 16, 16, None), one_by_one)


@pytest.mark.usefixtures("batch_size")
def test_batch_size_changes_the_calls_and_not_the_result(pipe: SmoothPipeline, calls: dict[str, list[int]]) -> None:
    arguments: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": "pt"}
    auto = pipe(**arguments, generator=seeds(1, 2, 3)).images
    # Both halves of guidance ride in one call; the empty prompt is encoded once.
    assert calls == {"text_encoder": [3, 1], "unet": [6] * 4, "vae_decoder": [3]}
    calls.clear()
    pipe.batch_size = 1
    torch.testing.assert_close(pipe(**arguments, generator=seeds(1, 2, 3)).images, auto, rtol=0, atol=ALONE)
    assert calls == {"text_encoder": [1] * 4, "unet": [2] * 12, "vae_decoder": [1] * 3}
    calls.clear()
    pipe.batch_size = 2
    pipe(**arguments, guidance_scale=1, generator=seeds(1, 2, 3))
    assert calls == {"text_encoder": [2, 1], "unet": [2, 1] * 4, "vae_decoder": [2, 1]}


def test_auto_bounds_a_call(pipe: SmoothPipeline, calls: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.CELLS_PER_CALL, "unet", 4 * 64)
    monkeypatch.setitem(networks.CELLS_PER_CALL, "vae_decoder", 1)
    pipe(PROMPTS, num_inference_steps=1, generator=seeds(1, 2, 3))
    assert calls["unet"] == [4, 2]
    assert calls["vae_decoder"] == [1, 1, 1]
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(networks, "CELLS_PER_CALL", dict.fromkeys(networks.CELLS_PER_CALL, 10**9))
    assert [part.stop - part.start for part in pipe.calls("unet", 62, (8, 8), 2)] == [31, 31]


def test_of_gradients_one_row_of_512_pixels_goes_into_a_call(pipe: SmoothPipeline) -> None:
    unet = pipe._engines["unet"]
    for runs, rows in (
        (None, [4, 4]),
        (unet.up_to_features(), [4, 4]),
        (unet.gradient(["encoder_hidden_states"]), [1] * 8),
        (unet.gradient(["sample"], "features"), [1] * 8),
    ):
        assert [part.stop - part.start for part in pipe.calls("unet", 8, (64, 64), runs=runs)] == rows


def test_guidance_is_the_formula(pipe: SmoothPipeline) -> None:
    latents = pipe.draw_noise(2, 16, 16, seeds(1, 2))
    cond, uncond = pipe.encode_prompt(PROMPTS[:2]), pipe.encode_prompt(["", ""])
    plain = [pipe.predict(latents, 500, embeds) for embeds in (uncond, cond)]
    mixed = pipe.predict(latents, 500, cond, uncond, 3.0)
    torch.testing.assert_close(mixed, plain[0] + 3.0 * (plain[1] - plain[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe.predict(latents, 500, cond, uncond, 0.0), plain[0], rtol=1e-4, atol=1e-4)


def test_embeddings_stand_in_for_prompts(pipe: SmoothPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    texts = pipe("dog", negative_prompt="blue", generator=seeds(1), **arguments).images
    embeds = pipe(
        prompt_embeds=pipe.encode_prompt(["dog"]), negative_prompt_embeds=pipe.encode_prompt(["blue"]),
        generator=seeds(1), **arguments,
    ).images  # fmt: skip
    assert torch.equal(embeds, texts)


def test_output_types(pipe: SmoothPipeline) -> None:
    made = {
        kind: pipe("dog", num_inference_steps=2, height=8, width=16, generator=seeds(1), output_type=kind)
        for kind in ("pil", "np", "pt", "latent")
    }
    (image,) = made["pil"].images
    assert isinstance(image, Image.Image)
    assert image.size == (16, 8)
    assert made["np"].images.shape == (1, 8, 16, 3)
    assert made["pt"].images.shape == (1, 3, 8, 16)
    assert torch.equal(made["latent"].images, made["pt"].latents)
    assert np.abs(made["np"].images[0] - np.asarray(image) / 255).max() <= 0.51 / 255


def test_the_callback_sees_every_step_and_may_change_the_latents(pipe: SmoothPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def replace(owner: SmoothPipeline, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        assert owner is pipe
        seen.append((i, t))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else None

    made = pipe("dog", num_inference_steps=4, generator=seeds(1), callback_on_step_end=replace)
    assert seen == list(enumerate(pipe.schedule(4).timesteps))
    assert not made.latents.any()


def test_text_that_is_cut_off_is_said(pipe: SmoothPipeline, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(["dog"] * pipe.dims.tokens) + " apple"
    with caplog.at_level(logging.WARNING, "smooth_rt"):
        embeds = pipe.encode_prompt([long, "dog"])
    (record,) = caplog.records
    assert "apple" in record.getMessage().split("left out")[1]
    assert embeds.shape == (2, pipe.dims.tokens, pipe.dims.text_width)
    assert torch.equal(pipe.encode_prompt(" ".join(["dog"] * 40)), embeds[:1])


def test_the_warning_does_not_repeat_a_long_prompt(pipe: SmoothPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "smooth_rt"):
        pipe.encode_prompt("dog " * 2500)
    (record,) = caplog.records
    assert len(record.getMessage()) < 220
    assert record.getMessage().startswith("prompt 'dog dog ")


def test_numbers_may_be_numpys(pipe: SmoothPipeline) -> None:
    ours = pipe("dog", num_inference_steps=2, height=16, guidance_scale=2.5, generator=seeds(1, 2), output_type="pt",
                num_images_per_prompt=2)  # fmt: skip
    theirs = pipe(
        "dog", num_inference_steps=np.int64(2), height=np.uint16(16), guidance_scale=np.float32(2.5),  # type: ignore[arg-type]
        generator=seeds(1, 2), output_type="pt", num_images_per_prompt=np.int32(2),  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.equal(ours.latents, theirs.latents)


def test_an_image_survives_the_vae_loop_in_shape_and_range(pipe: SmoothPipeline) -> None:
    images = [Image.new("RGB", (40, 20), "red"), np.zeros((16, 16, 3))]
    latents = pipe.encode_image(images, height=8, width=16)
    assert latents.shape == (2, 4, 4, 8)
    alone = torch.cat([pipe.encode_image(image, 8, 16) for image in images])
    torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-4)
    decoded = pipe.decode(latents, "np")
    assert decoded.shape == (2, 8, 16, 3)
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_latents_that_stop_being_finite_name_the_step(pipe: SmoothPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    third = pipe.schedule(5).timesteps[2]
    infer = Engine.infer

    def overflow(engine: Engine, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = infer(engine, **inputs)
        if engine.network.name == "unet" and int(inputs["timestep"][0]) == third:
            outputs["noise_pred"] = outputs["noise_pred"] * float("inf")
        return outputs

    monkeypatch.setattr(Engine, "infer", overflow)
    with pytest.raises(EngineError, match=rf"step 3 of 5 \(timestep {third}\): the latents are not finite on eager"):
        pipe("dog", num_inference_steps=5, generator=seeds(1))


def test_images_that_are_not_finite_are_refused(pipe: SmoothPipeline) -> None:
    latents = torch.full((1, 4, 8, 8), float("inf"))
    with pytest.raises(EngineError, match="decode: the VAE's images are not finite on eager"):
        pipe.decode(latents)


def test_the_engine_says_what_it_is_and_closes(tiny_model: Path) -> None:
    pipe = SmoothPipeline.from_pretrained(tiny_model, engine="eager")
    assert (pipe.engine, pipe.reason, pipe.bundle) == ("eager", "asked for", None)
    assert pipe.source == str(tiny_model)
    with pipe:
        pipe.encode_prompt("dog")
    with pytest.raises(EngineError, match="closed"):
        pipe.encode_prompt("dog")
    with pytest.raises(EngineError, match="unknown"):
        SmoothPipeline.from_pretrained(tiny_model, engine="abacus")


def test_a_lora_is_fused_at_its_strength(pipe: SmoothPipeline, tiny_model: Path, tmp_path: Path) -> None:
    from smooth_rt.lora import Lora, LoraLayer, write_lora
    from smooth_rt.model import load_model

    unet = load_model(tiny_model).unet
    key, weight = next((n, p) for n, p in unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    generator = Generator().manual_seed(0)
    down = torch.randn(2, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    path = write_lora(
        Lora({key.removesuffix(".weight"): LoraLayer(down, up)}, "test", ""), tmp_path / "lora.safetensors"
    )
    latents, embeds = pipe.draw_noise(1, 16, 16, seeds(1)), pipe.encode_prompt("dog")
    plain = pipe.predict(latents, 500, embeds)
    for strength in (0.0, 0.5, 1.0):
        with SmoothPipeline.from_pretrained(tiny_model, path, strength, engine="eager") as fused:
            difference = (fused.predict(latents, 500, embeds) - plain).abs().max()
        assert (difference > 1e-3) == (strength > 0)
