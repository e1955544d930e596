"""What the pipeline refuses: one line that names the argument, before any work where that can be."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks import checks


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1], "returned list; return None or a dict of latents alone"),
        (torch.zeros(1), "returned Tensor; return None"),
        ({"latents": None}, "latents returned: NoneType; give a float32 torch tensor"),
        ({"latents": torch.zeros(1, 4, 8, 4)}, r"latents returned: shape \[1, 4, 8, 4\]; give \[1, 4, 8, 8\]"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents returned: NaN or infinite values"),
        ({"latents": torch.zeros(1, 4, 8, 8).double()}, "latents returned: torch.float64"),
        ({"latents": torch.zeros(1, 4, 8, 8, device="meta")}, "latents returned: a tensor on 'meta'"),
        ({"prompt_embeds": torch.zeros(1)}, r"returned \['prompt_embeds'\]; return None or a dict of latents alone"),
    ],
)
def test_a_callback_that_returns_something_else(pipe: SmoothPipeline, answer: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^callback_on_step_end: {said}"):
        pipe("dog", num_inference_steps=2, callback_on_step_end=lambda *_: answer)


def test_a_callback_that_resizes_the_latents_in_place(pipe: SmoothPipeline) -> None:
    def resize(_: SmoothPipeline, __: int, ___: int, tensors: dict[str, torch.Tensor]) -> None:
        tensors["latents"].resize_(1, 4, 8, 4)

    with pytest.raises(InputError, match=r"^callback_on_step_end: resized the latents to \[1, 4, 8, 4\]; keep"):
        pipe("dog", num_inference_steps=2, callback_on_step_end=resize)


def test_prompts_of_several_threads(pipe: SmoothPipeline) -> None:
    """The tokenizer has a state, which another thread's call must not change meanwhile."""
    wanted = pipe.encode_prompt("dog")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: pipe.encode_prompt("dog"), range(200)))
    assert all(torch.equal(one, wanted) for one in found)


def test_a_callback_that_is_none_is_refused_before_any_work(pipe: SmoothPipeline, calls: dict[str, list[int]]) -> None:
    tasks: list[Any] = [
        lambda **more: pipe("dog", **more),
        lambda **more: pipe.interpolate(["dog", "red apple"], **more),
        lambda **more: pipe.invert(torch.zeros(3, 16, 16), "dog", return_trajectory=True, **more),
        lambda **more: pipe.edit(torch.zeros(3, 16, 16), "dog", "red apple", **more),
    ]
    for task in tasks:
        with pytest.raises(InputError, match=r"^callback_on_step_end=5: give a function"):
            task(num_inference_steps=2, callback_on_step_end=5)
    with pytest.raises(InputError, match=r"^callback_on_step_end=5"):
        pipe.denoise(torch.zeros(1, 4, 8, 8), [], lambda x, *_: x, 5)  # type: ignore[arg-type]
    assert calls == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"timestep": "a"}, "timestep='a': give a whole number from 0 on"),
        ({"timestep": 1.5}, "timestep=1.5: give a whole number"),
        ({"timestep": -1}, "timestep=-1: give a whole number"),
        ({"timestep": 10**30}, "timestep=1000000000000000000000000000000: give a whole number"),
        ({"guidance_scale": "x"}, "guidance_scale='x': give a number from -1000 to 1000"),
        ({"prompt_embeds": torch.zeros(1, 12, 32)}, "prompt_embeds: 1 rows for latents of 2"),
        ({"negative_prompt_embeds": torch.zeros(1, 12, 32)}, "negative_prompt_embeds: 1 rows for latents of 2"),
        ({"latents": None}, "latents: None is no torch tensor"),
        ({"latents": np.zeros((2, 9))}, "latents: array([[0., 0., 0., 0., 0., 0., 0., 0., 0.], [0., 0., 0., 0...."),
        (
            {"latents": torch.zeros(2, 4, 8)},
            "latents: torch.float32 of shape [2, 4, 8]; give a float32 tensor [N, 4, h, w]",
        ),
        ({"latents": torch.zeros(2, 4, 8, 8).to_sparse()}, "latents: a nested or sparse tensor; give a dense one"),
        ({"prompt_embeds": torch.zeros(2, 9, 32)}, "prompt_embeds: torch.float32 of shape [2, 9, 32]; give a float32"),
        (
            {"negative_prompt_embeds": torch.zeros(2, 12, 32).int()},
            "negative_prompt_embeds: torch.int32 of shape [2, 12, 32]; give a float32 tensor [N, 12, 32]",
        ),
    ],
)
def test_predict_says_what_is_wrong(
    pipe: SmoothPipeline, calls: dict[str, list[int]], given: dict[str, Any], said: str
) -> None:
    texts = pipe.encode_prompt(["dog", ""])
    calls.clear()
    good = {"latents": torch.zeros(2, 4, 8, 8), "timestep": 5, "prompt_embeds": texts, "guidance_scale": 3.0}
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        pipe.predict(**{**good, "negative_prompt_embeds": texts.flip(0), **given})
    assert calls == {}


@pytest.mark.parametrize(
    ("latents", "output_type", "said"),
    [
        (None, "latent", "latents: None is no torch tensor"),
        (torch.zeros(4, 8, 8), "pil", "latents: torch.float32 of shape [4, 8, 8]; give a float32 tensor [N, 4, h, w]"),
        (torch.zeros(0, 4, 8, 8), "pil", "latents: shape [0, 4, 8, 8] is no torch tensor with a row"),
        (torch.zeros(1, 4, 8, 8), "jpeg", "output_type='jpeg' is unknown"),
    ],
)
def test_decode_says_what_is_wrong(pipe: SmoothPipeline, latents: Any, output_type: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        pipe.decode(latents, output_type)


def test_an_image_that_memory_cannot_hold_is_refused(pipe: SmoothPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 3 * 2**30)
    assert pipe.image_size(2048, 2048) == (2048, 2048)  # of a model that does not say what its decoder takes
    monkeypatch.setattr(pipe, "_decoder_channels", 384)
    assert pipe.image_size(1024, 1024) == (1024, 1024)
    with pytest.raises(InputError, match=r"height=2048, width=2048: an image takes more than 6\.0 GiB of memory and 3"):
        pipe("dog", height=2048, width=2048)
    with pytest.raises(InputError, match=r"height=2048, width=2048: an image takes more than 6\.0 GiB of memory and 3"):
        pipe("dog", latents=torch.zeros(1, 4, 1024, 1024))
    monkeypatch.setattr(checks, "available_memory", lambda: None)
    assert pipe.image_size(2048, 2048) == (2048, 2048)


def test_too_many_images_are_refused_before_their_noise_is_drawn(
    pipe: SmoothPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: Any) -> None:
        raise AssertionError("drew noise")

    monkeypatch.setattr(SmoothPipeline, "draw_noise", draw)
    with pytest.raises(InputError, match="num_images_per_prompt=5001: makes 10002 images with 2 prompts; give at most"):
        pipe(["dog", "red apple"], num_images_per_prompt=5001, num_inference_steps=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"height": 20}, "height=20: give a multiple of 8; the nearest is 16"),
        ({"height": 22}, "the nearest is 24"),
        ({"height": 1_000_000}, "height=1000000: give at most 10000 pixels a side"),
        ({"height": 10**22 + 4}, "give at most 10000 pixels a side"),
        ({"num_images_per_prompt": 10**8}, "num_images_per_prompt=100000000: give a whole number from 1 to 10000"),
        ({"width": 3}, "width=3: give a multiple of 8; the nearest is 8"),
        ({"width": 0}, "width=0: give a whole number of pixels, at least 1"),
        ({"width": 16.0}, "width=16.0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": -3}, "num_inference_steps=-3"),
        # The last of the 1000 timesteps is 999, and each is moved up by steps_offset 1, as in diffusers' pipeline.
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: give a whole number from 1 to 999"),
        ({"num_inference_steps": 1000}, "num_inference_steps=1000: give a whole number from 1 to 999"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": "7"}, "guidance_scale='7'"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"prompt": None}, "prompt: missing"),
        ({"negative_prompt": []}, "negative_prompt: the list is empty"),
        ({"prompt": 7}, "prompt: give a str"),
        ({"prompt": ["a", None]}, "prompt: give a str"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["", ""]}, "negative_prompt: 2 for 3 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"generator": [Generator(), Generator()]}, "generator: 2 for 1 images"),
        ({"generator": 5}, "generator"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents: shape \[2, 4, 8, 8\]; give \[1, 4, h, w\]"),
        ({"latents": torch.zeros(1, 4, 6, 8)}, "multiples of 4"),
        ({"latents": torch.zeros(4, 8, 8)}, r"latents: shape \[4, 8, 8\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 24}, r"give \[1, 4, 12, 8\]"),
        ({"latents": torch.zeros(1, 4, 8, 8).double()}, "latents: torch.float64; give a float32"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "give a float32 torch tensor"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents: NaN"),
        ({"prompt_embeds": torch.zeros(1, 12, 32)}, "prompt: given together with prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 11, 32)}, r"prompt_embeds: shape \[1, 11, 32\]"),
        ({"negative_prompt_embeds": torch.zeros(2, 12, 32)}, r"negative_prompt_embeds: shape .*\[1, 12, 32\]"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown; it is one of pil"),
        ({"output_type": ["pil"]}, r"output_type=\['pil'\] is unknown; it is one of pil"),
        ({"prompt": "a\udcff"}, "prompt: character 2 is not valid UTF-8"),
        ({"prompt": ["a", "\udcff"]}, "prompt: character 1 is not valid UTF-8"),
        ({"negative_prompt": "\udcff"}, "negative_prompt: character 1 is not valid UTF-8"),
        ({"guidance_scale": 10**400}, "guidance_scale=a number of 1329 bits: give a number from -1000 to 1000"),
        ({"latents": torch.zeros(1, 4, 8, 8).to_sparse()}, "latents: a nested or sparse tensor; give a dense one"),
        ({"latents": torch.zeros(1, 4, 8, 8, device="meta")}, "latents: a tensor on 'meta' has no values"),
        ({"latents": torch.tensor(1.0)}, r"latents: shape \[\]; give \[1, 4, h, w\]"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 32).to_sparse()}, "prompt_embeds: a nested or sparse"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 32, device="meta")}, "prompt_embeds: a tensor on 'meta'"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 12, 32), float("nan"))}, "prompt_embeds: NaN or infinite"),
        ({"negative_prompt_embeds": torch.full((1, 12, 32), float("inf"))}, "negative_prompt_embeds: NaN or infinite"),
    ],
)
def test_bad_input(pipe: SmoothPipeline, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pipe(**{"prompt": "dog", "num_inference_steps": 2, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "many"])
def test_a_wrong_batch_size(pipe: SmoothPipeline, size: Any) -> None:
    with pytest.raises(InputError, match="batch_size="):
        pipe.batch_size = size
