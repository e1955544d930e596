"""Attention blending: frames look at both ends, the ends stay, and nothing of it stays in the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Generator, Tensor

from smooth_rt.errors import EngineError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.attention_blend import blending


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(4))


@pytest.fixture
def whole(eager: SmoothPipeline) -> Iterator[SmoothPipeline]:
    """A test that uses this may change the pipeline's batch size."""
    yield eager
    eager.batch_size = "auto"


def frames(pipe: SmoothPipeline, images: Tensor, **options: Any) -> Tensor:
    made = pipe.interpolate(
        ["dog", "red apple"], images, frames=4, num_inference_steps=3, output_type="latent", **options
    )
    return torch.as_tensor(made.images)


def test_a_layer_by_hand() -> None:
    torch.manual_seed(0)
    layer: Any = Attention(query_dim=6, heads=2, dim_head=4, bias=True).eval()
    ends, inner = torch.randn(2, 2, 5, 6), torch.randn(2 * 3, 5, 6)  # halves of guidance first
    places = torch.tensor([0.2, 0.5, 0.9])

    def attended(row: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(-1, (2, 4)).transpose(0, 1) for one in (layer.to_q(row), layer.to_k(seen), layer.to_v(seen))
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(4)).softmax(-1)
        found: Tensor = layer.to_out[0]((weights @ v).transpose(0, 1).flatten(1))
        return found

    with torch.no_grad(), blending([layer]) as blend:
        for blend.end in (0, 1):
            plain = layer(ends[blend.end])
            torch.testing.assert_close(plain, torch.stack([attended(row, row) for row in ends[blend.end]]))
        blend.end, blend.places = None, places
        for blend.alone in (False, True):
            found = layer(inner)
            for half in range(2):
                for i, place in enumerate(places):
                    row = inner[3 * half + i]
                    seen = (ends[end, half] if blend.alone else torch.cat([ends[end, half], row]) for end in (0, 1))
                    one, other = (attended(row, of) for of in seen)
                    torch.testing.assert_close(found[3 * half + i], (1 - place) * one + place * other)


def test_the_ends_alone_then_beside_the_frame_then_the_frame(eager: SmoothPipeline, images: Tensor) -> None:
    """Of ten steps two, four and four."""
    seen: list[int] = []
    layer = eager.attentions()[0]
    own = layer.processor

    def watched(
        attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        if encoder_hidden_states is not None:
            seen.append(encoder_hidden_states.shape[1] // hidden_states.shape[1])
        result: Tensor = own(attention, hidden_states, encoder_hidden_states, attention_mask)
        return result

    layer.processor = watched
    try:
        eager.interpolate("dog", images, frames=3, num_inference_steps=10, output_type="latent", attention_blend=True)
    finally:
        layer.processor = own
    assert seen == [1, 1] * 2 + [2, 2] * 4  # a call an end; after that no frame looks at them


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_frames_change_and_the_ends_do_not(eager: SmoothPipeline, images: Tensor, guidance_scale: float) -> None:
    before = [layer.processor for layer in eager.attentions()]
    plain = frames(eager, images, guidance_scale=guidance_scale)
    found = frames(eager, images, guidance_scale=guidance_scale, attention_blend=True)
    torch.testing.assert_close(found[[0, -1]], plain[[0, -1]], rtol=1e-4, atol=1e-4)
    apart = (found - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert bool((apart[1:-1] > 1e-3).all())
    assert [layer.processor for layer in eager.attentions()] == before
    assert torch.equal(frames(eager, images, guidance_scale=guidance_scale), plain)


def test_ends_that_are_alike_are_left_alone(eager: SmoothPipeline, images: Tensor) -> None:
    """Each frame is the ends, and beside its own keys and values stand the same once more."""
    same: dict[str, Any] = {"frames": 3, "num_inference_steps": 2, "output_type": "latent"}
    found = eager.interpolate("dog", images[[0, 0]], attention_blend=True, **same).images
    torch.testing.assert_close(found, eager.interpolate("dog", images[[0, 0]], **same).images, rtol=1e-3, atol=1e-3)


def test_frames_do_not_depend_on_the_calls(whole: SmoothPipeline, images: Tensor) -> None:
    together = frames(whole, images, guidance_scale=4.0, attention_blend=True)
    whole.batch_size = 1
    parts = frames(whole, images, guidance_scale=4.0, attention_blend=True)
    torch.testing.assert_close(parts, together, rtol=1e-3, atol=1e-3)


def test_with_two_frames_there_is_nothing_between(eager: SmoothPipeline, images: Tensor) -> None:
    two: dict[str, Any] = {"frames": 2, "num_inference_steps": 2, "output_type": "latent"}
    found = eager.interpolate("dog", images, attention_blend=True, **two).images
    torch.testing.assert_close(found, eager.interpolate("dog", images, **two).images, rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_the_model_as_it_was(eager: SmoothPipeline, images: Tensor) -> None:
    before = [layer.processor for layer in eager.attentions()]

    def stop(*_: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        frames(eager, images, attention_blend=True, callback_on_step_end=stop)
    assert [layer.processor for layer in eager.attentions()] == before


def test_an_engine_that_hides_its_attention(pipe: SmoothPipeline, images: Tensor) -> None:
    with pytest.raises(EngineError) as caught:
        frames(pipe, images, attention_blend=True)
    assert str(caught.value) == "unet: the fake engine does not expose its attention; use the engine eager"
    assert all(not engine.batches for engine in pipe._engines.values())  # type: ignore[attr-defined]
