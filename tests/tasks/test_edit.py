"""Editing: the switch of Eq. 15, the strength of SDEdit, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline


def seeds(*numbers: int) -> list[Generator]:
    return [Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize(("strength", "source_steps"), [(0.0, 10), (0.3, 7), (0.8, 2), (0.75, 3), (1.0, 0)])
def test_eq15_leaves_the_source_prompt_at_its_step(
    fake: Callable[..., SmoothPipeline], images: Tensor, strength: float, source_steps: int
) -> None:
    texts: list[Tensor] = []

    def record(x: Tensor, _: Tensor, text: Tensor) -> Tensor:
        texts.append(text)
        return torch.zeros_like(x)

    pipe = fake(record)
    source, target = pipe.encode_prompt("red apple"), pipe.encode_prompt("blue dog")
    pipe.edit(images[0], "blue dog", "red apple", edit_strength=strength, num_inference_steps=10)
    # The way there, then the source alone (guidance away from itself is none), then both halves.
    expected = [source] * (10 + source_steps) + [torch.cat([source, target])] * (10 - source_steps)
    assert len(texts) == 20
    assert all(torch.equal(seen, wanted) for seen, wanted in zip(texts, expected, strict=True))


def test_the_switch_is_not_moved_by_rounding(fake: Callable[..., SmoothPipeline], images: Tensor) -> None:
    guided: list[int] = []

    def record(x: Tensor, _: Tensor, __: Tensor) -> Tensor:
        guided.append(len(x))
        return torch.zeros_like(x)

    fake(record).edit(images[0], "blue dog", "red apple", edit_strength=0.7, num_inference_steps=50)
    assert guided[50:] == [1] * 15 + [2] * 35  # (1 - 0.7) * 50 is 15.000000000000002


def test_strength_zero_rebuilds_and_more_strength_changes_more(pipe: SmoothPipeline, images: Tensor) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 50, "output_type": "pt"}
    rebuilt = pipe.invert(images, "red apple", method="negative-prompt", **arguments).images
    changes = []
    for strength in (0.0, 0.2, 0.6, 1.0):
        edited = pipe.edit(images, "blue dog", "red apple", edit_strength=strength, guidance_scale=1.5, **arguments)
        changes.append(float((edited.latents - pipe.encode_image(rebuilt)).abs().mean()))
    assert changes[0] < 0.05
    assert changes == sorted(changes)
    assert changes[3] > 5 * changes[0]


def test_sdedit_starts_at_its_strength(fake: Callable[..., SmoothPipeline], images: Tensor) -> None:
    seen: list[tuple[int, Tensor]] = []

    def record(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        seen.append((int(t[0]), x))
        return torch.zeros_like(x)

    pipe = fake(record)
    pipe.edit(images[0], "dog", edit_method="sdedit", edit_strength=0.4, num_inference_steps=10, generator=seeds(1))
    steps = pipe.schedule(10).steps
    assert [t for t, _ in seen] == [step.timestep for step in steps[6:]]
    noise = pipe.draw_noise(1, 16, 16, seeds(1))
    alpha = steps[6].alpha_from
    start = alpha**0.5 * pipe.encode_image(images[0]) + (1 - alpha) ** 0.5 * noise
    torch.testing.assert_close(seen[0][1][:1], start)


def test_sdedit_at_the_ends_of_its_strength(pipe: SmoothPipeline, images: Tensor) -> None:
    arguments: dict[str, Any] = {"edit_method": "sdedit", "num_inference_steps": 10, "output_type": "pt"}
    kept = pipe.edit(images, "dog", edit_strength=0.0, generator=seeds(1, 2, 3), **arguments)
    torch.testing.assert_close(kept.images, images)
    one, other = (
        pipe.edit(torch.full_like(images, level), "dog", edit_strength=1.0, generator=seeds(1, 2, 3), **arguments)
        for level in (0.4, 0.6)
    )
    # At full strength hardly anything of the image is left, and the noise decides.
    assert (one.latents - other.latents).abs().max() < 0.2 * one.latents.std()


def alone_and_together(pipe: SmoothPipeline, images: Tensor, method: str, tolerance: float) -> None:
    targets, sources = ["blue dog", "red dog", "dog"], ["red apple", "blue apple", "apple"]
    arguments: dict[str, Any] = {"edit_method": method, "num_inference_steps": 4, "output_type": "pt"}
    if method == "eq15":
        arguments["guidance_scale"] = 2.0
    together = pipe.edit(
        images, targets, sources if method == "eq15" else None, generator=seeds(1, 2, 3), **arguments
    ).images
    for index in range(3):
        alone = pipe.edit(
            images[index], targets[index], sources[index] if method == "eq15" else None,
            generator=seeds(index + 1), **arguments,
        ).images  # fmt: skip
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["eq15", "sdedit"])
def test_many_at_once_equal_each_alone(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    alone_and_together(pipe, images, method, 1e-5)


@pytest.mark.parametrize("method", ["eq15", "sdedit"])
def test_many_at_once_equal_each_alone_on_real_networks(eager: SmoothPipeline, images: Tensor, method: str) -> None:
    alone_and_together(eager, images, method, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"edit_method": "brush"}, "edit_method='brush' is unknown; it is one of eq15, sdedit"),
        ({"edit_strength": 1.1}, "edit_strength=1.1: give a number from 0 to 1"),
        ({"edit_strength": -0.1}, "edit_strength=-0.1"),
        ({"edit_strength": float("nan")}, "edit_strength=nan"),
        ({"source_prompts": None}, "source_prompts: eq15 needs"),
        ({"source_prompts": ["a", "b"]}, "prompts: 2 for 3 images"),
        ({"prompts": ["a", "b"]}, "prompts: 2 for 3 images"),
        ({"prompts": []}, "prompts: the list is empty"),
        ({"prompts": None}, "prompts: missing; give what the images shall show"),
        ({"negative_prompts": "x"}, "negative_prompts: eq15"),
        (
            {"edit_method": "sdedit", "source_prompts": None, "negative_prompts": []},
            "negative_prompts: the list is empty",
        ),
        ({"edit_method": "sdedit"}, "source_prompts: sdedit does not use them"),
        ({"edit_method": "sdedit", "source_prompts": None, "generator": seeds(1)}, "generator: 1 for 3 images"),
        ({"guidance_scale": float("-inf")}, "guidance_scale=-inf"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"width": 17}, "width=17: give a multiple of 8; the nearest is 16"),
    ],
)
def test_bad_input(pipe: SmoothPipeline, images: Tensor, arguments: dict[str, Any], said: str) -> None:
    given = {"images": images, "prompts": "dog", "source_prompts": "apple", "num_inference_steps": 2, **arguments}
    with pytest.raises(InputError, match=said) as caught:
        pipe.edit(**given)
    assert "\n" not in str(caught.value)
