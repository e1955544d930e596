"""Interpolation: the path between two ends, which are what they would be alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion import METHODS
from smooth_rt.tasks.mixing import lerp, slerp


def seeds(*numbers: int) -> list[Generator]:
    return [Generator().manual_seed(number) for number in numbers]


def test_slerp_walks_the_circle_at_an_even_pace() -> None:
    start, end = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for alpha in (0.0, 0.25, 1 / 3, 1.0):
        angle = alpha * math.pi / 2
        expected = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]])
        torch.testing.assert_close(slerp(start, end, alpha), expected)


def test_slerp_keeps_the_length_of_noise() -> None:
    start, end = torch.randn(2, 4, 32, 32, generator=Generator().manual_seed(0))
    middle = slerp(start, end, 0.5)
    assert middle.dtype == torch.float32
    assert middle.shape == (4, 32, 32)
    assert abs(float(middle.std()) - 1) < 0.05
    assert float(lerp(start, end, 0.5).std()) < 0.8


@pytest.mark.parametrize("end", [[1.0, 0.001], [-1.0, 0.0], [0.0, 0.0]])
def test_slerp_takes_the_line_where_there_is_no_arc(end: list[float]) -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor(end)
    torch.testing.assert_close(slerp(a, b, 0.25), lerp(a, b, 0.25))


def test_two_seeds(pipe: SmoothPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 5, "output_type": "pt"}
    found = pipe.interpolate("red apple", frames=5, generator=seeds(1, 2), **arguments)
    ends = pipe(["red apple"] * 2, generator=seeds(1, 2), **arguments)
    torch.testing.assert_close(found.images[[0, -1]], ends.images, rtol=0, atol=1e-5)
    noise = pipe.draw_noise(2, 16, 16, seeds(1, 2))
    assert found.alphas == (0, 0.25, 0.5, 0.75, 1)
    assert torch.equal(found.latents[[0, -1]], noise)
    assert torch.equal(found.latents[1], slerp(noise[0], noise[1], 0.25))
    # One generator is drawn from in turn; latents may be given as they are.
    in_turn = pipe.interpolate("red apple", frames=2, generator=Generator().manual_seed(1), **arguments)
    assert torch.equal(in_turn.latents, pipe.draw_noise(2, 16, 16, Generator().manual_seed(1)))
    given = pipe.interpolate("red apple", frames=5, latents=noise, **arguments)
    assert torch.equal(given.images, found.images)


def test_two_prompts(pipe: SmoothPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 5, "output_type": "pt"}
    found = pipe.interpolate(["red apple", "blue dog"], frames=3, generator=Generator().manual_seed(1), **arguments)
    assert torch.equal(found.latents[0], found.latents[2])  # one noise for both ends
    ends = pipe(["red apple", "blue dog"], latents=found.latents[[0, 2]], **arguments)
    torch.testing.assert_close(found.images[[0, 2]], ends.images, rtol=0, atol=1e-5)
    embeds = pipe.encode_prompt(["red apple", "blue dog"]).mean(0, keepdim=True)
    middle = pipe(prompt_embeds=embeds, latents=found.latents[1:2], **arguments)
    torch.testing.assert_close(found.images[1:2], middle.images, rtol=0, atol=1e-5)
    both = pipe.interpolate(["red apple", "blue dog"], frames=3, generator=seeds(1, 2), **arguments)
    assert not torch.equal(both.latents[0], both.latents[2])


@pytest.mark.parametrize("method", METHODS)
def test_two_images_end_in_their_reconstructions(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    arguments: dict[str, Any] = {"method": method, "num_inference_steps": 5, "output_type": "pt"}
    prompts = ["red apple", "blue dog"]
    found = pipe.interpolate(prompts, images[:2], frames=4, **arguments)
    inverted = pipe.invert(images[:2], prompts, shared=method == "null-text", **arguments)
    torch.testing.assert_close(found.images[[0, -1]], inverted.images, rtol=0, atol=1e-5)
    assert torch.equal(found.latents[[0, -1]], inverted.latents)


def test_all_frames_share_every_call(pipe: SmoothPipeline, images: Tensor) -> None:
    pipe.interpolate(["red apple", "dog"], images[:2], frames=7, guidance_scale=2, num_inference_steps=3)
    batches = {name: engine.batches for name, engine in pipe._engines.items()}  # type: ignore[attr-defined]
    assert batches["unet"] == [2] * 3 + [14] * 3
    assert (batches["vae_encoder"], batches["vae_decoder"]) == ([2], [7])


def test_frames_do_not_depend_on_the_batch_size(eager: SmoothPipeline) -> None:
    arguments: dict[str, Any] = {"frames": 3, "num_inference_steps": 3, "output_type": "pt"}
    together = eager.interpolate(["red apple", "dog"], generator=seeds(1, 2), **arguments)
    eager.batch_size = 1
    try:
        alone = eager.interpolate(["red apple", "dog"], generator=seeds(1, 2), **arguments)
    finally:
        eager.batch_size = "auto"
    # A batch is summed in another order than one image.
    torch.testing.assert_close(together.images, alone.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"frames": 1}, "frames=1: give a whole number from 2 to 10000"),
        ({"frames": 10**11}, "frames=100000000000: give a whole number from 2 to 10000"),
        ({"frames": 2.5}, "frames=2.5"),
        ({"prompts": None}, "prompts: missing; give one for both ends, or two"),
        ({"prompts": ["a", "b", "c"]}, "prompts: 3 for 2 ends"),
        ({"prompts": []}, "prompts: the list is empty"),
        ({"generator": seeds(1)}, "generator: 1 for 2 images"),
        ({"generator": seeds(1, 2), "latents": torch.zeros(2, 3, 8, 8)}, "latents: given together with generator"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "make one end"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents: shape \[2, 4, 8, 8\]"),
        ({"latents": 7}, "latents: int"),
        ({"latents": torch.tensor(1.0)}, r"latents: shape \[\]; give \[2, 3, h, w\]"),
        ({"latents": torch.zeros(2, 3, 8, 8).to_sparse()}, "latents: a nested or sparse tensor"),
        ({"images": torch.zeros(2, 3, 16, 16).to_sparse()}, "images: a nested or sparse tensor"),
        ({"images": torch.zeros(3, 3, 16, 16)}, "images: 3; give the two ends"),
        ({"images": torch.zeros(2, 3, 16, 16), "generator": Generator()}, "for ends of noise"),
        ({"images": torch.zeros(2, 3, 16, 16), "method": "magic"}, "method='magic'"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 10}, "height=10: give a multiple of 8; the nearest is 8"),
    ],
)
def test_bad_input(pipe: SmoothPipeline, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pipe.interpolate(**{"prompts": "dog", "num_inference_steps": 2, **arguments})
    assert "\n" not in str(caught.value)
