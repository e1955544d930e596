"""Inversion: there and back again, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion import METHODS

# Batched against alone, final pixels. The eager networks sum a batch in another order than one image.
ALONE_FAKE, ALONE_EAGER = 1e-5, 1e-3


# easyinv leaves the path on purpose; null-text comes near to it as it may.
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("easyinv", "null-text")])
def test_what_does_not_depend_on_the_latent_is_inverted_exactly(
    exact: SmoothPipeline, images: Tensor, method: str
) -> None:
    found = exact.invert(images, "red apple", method=method, num_inference_steps=20, output_type="pt")
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-4)
    assert (found.latents - found.image_latents).abs().mean() > 0.1  # it did go somewhere


def test_the_error_shrinks_with_the_steps(pipe: SmoothPipeline, images: Tensor) -> None:
    errors = []
    for steps in (10, 100, 500):
        found = pipe.invert(images, "red apple", num_inference_steps=steps, output_type="pt")
        errors.append(float((found.images - images).abs().max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.01


def test_negative_prompt_inversion_rebuilds_at_every_scale(pipe: SmoothPipeline, images: Tensor) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 50, "output_type": "pt"}
    at_one = pipe.invert(images, "red apple", method="ddim", **arguments).images
    for scale in (None, 1.0, 7.5, 20.0):
        found = pipe.invert(images, "red apple", method="negative_prompt", guidance_scale=scale, **arguments)
        torch.testing.assert_close(found.images, at_one, rtol=0, atol=1e-5)
    assert found.guidance_scale == 20.0
    # DDIM inversion has no such freedom: under guidance it goes astray.
    astray = pipe.invert(images, "red apple", method="ddim", guidance_scale=20.0, **arguments).images
    assert (astray - images).abs().mean() > 10 * (at_one - images).abs().mean()


def test_without_text_is_the_empty_prompt(pipe: SmoothPipeline, images: Tensor) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 5, "output_type": "pt"}
    without = pipe.invert(images, method="ddim-without-text", **arguments)
    assert torch.equal(without.latents, pipe.invert(images, "", method="ddim", **arguments).latents)
    assert not torch.equal(without.latents, pipe.invert(images, "dog", method="ddim", **arguments).latents)


def test_the_noise_is_predicted_at_the_lower_level_with_the_upper_timestep(
    fake: Callable[..., SmoothPipeline], images: Tensor
) -> None:
    seen: list[tuple[int, float]] = []

    def record(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        seen.append((int(t[0]), float(x.flatten()[0])))
        return torch.zeros_like(x)

    pipe = fake(record)
    found = pipe.invert(images[0], "", num_inference_steps=4, reconstruct=False, return_trajectory=True)
    assert found.trajectory is not None
    assert found.trajectory.shape == (4, 1, 3, 8, 8)
    assert torch.equal(found.trajectory[-1], found.latents)
    levels = [found.image_latents, *found.trajectory[:-1]]
    assert [t for t, _ in seen] == sorted(pipe.schedule(4).timesteps)
    assert [x for _, x in seen] == [float(level.flatten()[0]) for level in levels]


def test_the_callback_sees_both_ways_and_may_be_used_with_the_trajectory(pipe: SmoothPipeline, images: Tensor) -> None:
    seen: list[int] = []

    def zero(_: SmoothPipeline, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(t)
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 0 else tensors

    found = pipe.invert(images, "", num_inference_steps=3, return_trajectory=True, callback_on_step_end=zero)
    timesteps = pipe.schedule(3).timesteps
    assert seen == [*reversed(timesteps), *timesteps]
    assert found.trajectory is not None
    assert not found.trajectory[0].any()


def alone_and_together(pipe: SmoothPipeline, images: Tensor, method: str, tolerance: float) -> None:
    prompts = ["red apple", "blue dog", ""]
    arguments: dict[str, Any] = {"method": method, "num_inference_steps": 4, "output_type": "pt"}
    together = pipe.invert(images, prompts, **arguments)
    for index, prompt in enumerate(prompts):
        alone = pipe.invert(images[index], prompt, **arguments)
        torch.testing.assert_close(together.images[index : index + 1], alone.images, rtol=0, atol=tolerance)
        torch.testing.assert_close(together.latents[index : index + 1], alone.latents, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_many_at_once_equal_each_alone(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    alone_and_together(pipe, images, method, ALONE_FAKE)


def test_many_at_once_equal_each_alone_on_real_networks(eager: SmoothPipeline, images: Tensor) -> None:
    alone_and_together(eager, images, "negative-prompt", ALONE_EAGER)


def test_every_step_is_one_call_for_all_images(pipe: SmoothPipeline, images: Tensor) -> None:
    pipe.invert(images, ["red apple", "blue dog", ""], method="ddim", guidance_scale=3, num_inference_steps=4)
    batches = {name: engine.batches for name, engine in pipe._engines.items()}  # type: ignore[attr-defined]
    assert batches["unet"] == [3] * 4 + [6] * 4
    assert (batches["vae_encoder"], batches["vae_decoder"]) == ([3], [3])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "magic"}, "method='magic' is unknown; it is one of ddim"),
        ({"prompts": None}, "prompts: method 'ddim' needs one for each image"),
        ({"prompts": ["a", "b"]}, "prompts: 2 for 3 images"),
        ({"prompts": []}, "prompts: the list is empty"),
        ({"images": []}, "images: the list is empty"),
        ({"images": [3]}, "int is not an image"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 12}, "height=12: give a multiple of 8"),
        ({"output_type": "gif"}, "output_type='gif'"),
    ],
)
def test_bad_input(pipe: SmoothPipeline, images: Tensor, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pipe.invert(**{"images": images, "prompts": "dog", "num_inference_steps": 2, **arguments})
    assert "\n" not in str(caught.value)


def test_inverted_noise_is_its_own_seed(pipe: SmoothPipeline, images: Tensor) -> None:
    found = pipe.invert(images, "dog", num_inference_steps=10, output_type="pt")
    again = pipe(
        prompt_embeds=found.prompt_embeds, latents=found.latents, guidance_scale=1, num_inference_steps=10,
        generator=Generator(), output_type="pt",
    )  # fmt: skip
    assert torch.equal(again.images, found.images)
