"""Null-text inversion: the fit, images that leave the batch, shared embeddings, and what is kept of a stopped run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from smooth_rt.errors import EngineError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.inversion.adam import Adam

METHOD: dict[str, Any] = {"method": "null-text", "guidance_scale": 3.0, "output_type": "pt"}


def gradient_rows(pipe: SmoothPipeline) -> list[int]:
    unet: Any = pipe._engines["unet"]
    return [rows for engine in unet._gradient_engines.values() for rows in engine.batches]


def test_adam_is_torch_s_a_row() -> None:
    generator = Generator().manual_seed(0)
    start = torch.randn(3, 4, 5, generator=generator)
    ours = Adam(start, 0.01)
    theirs = [torch.nn.Parameter(row.clone()) for row in start]
    optimisers = [torch.optim.Adam([row], lr=0.01) for row in theirs]
    for rows in ([0, 1, 2], [0, 2], [2], [2]):
        grad = torch.randn(3, 4, 5, generator=generator)
        mask = torch.zeros(3, dtype=torch.bool)
        mask[rows] = True
        ours.step(grad, mask)
        for row in rows:
            theirs[row].grad = grad[row]
            optimisers[row].step()
    torch.testing.assert_close(ours.values, torch.stack([row.detach() for row in theirs]), rtol=1e-6, atol=1e-7)
    assert torch.equal(start, torch.randn(3, 4, 5, generator=Generator().manual_seed(0)))


def test_the_gradient_is_that_of_the_loss(eager: SmoothPipeline) -> None:
    """The embedding of one step of the eager model, against the plain loop of autograd and torch's Adam."""
    from smooth_rt.schedule import ddim_step

    image = torch.rand(3, 16, 16, generator=Generator().manual_seed(3))
    found = eager.invert(image, "dog", num_inference_steps=2, return_trajectory=True, keep=False, **METHOD)
    schedule = eager.schedule(2)
    unet: Any = eager._engines["unet"]
    module = unet._module
    assert found.trajectory is not None
    embed = eager.encode_prompt("").requires_grad_()
    latents, target, step = found.latents, found.trajectory[0], schedule.steps[0]
    optimiser = torch.optim.Adam([embed], lr=1e-2)
    timestep = torch.tensor([step.timestep])
    with torch.enable_grad():
        (cond,) = module(latents, timestep, found.prompt_embeds)
        for _ in range(10):
            (uncond,) = module(latents, timestep, embed)
            output = uncond + 3.0 * (cond.detach() - uncond)
            made = ddim_step(latents, output, step.alpha_from, step.alpha_to, schedule.prediction_type)
            loss = torch.nn.functional.mse_loss(made, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if loss.item() < 1e-5:
                break
    torch.testing.assert_close(found.negative_prompt_embeds[0], embed.detach(), rtol=0, atol=2e-4)


def test_the_fit_comes_nearer_than_ddim(pipe: SmoothPipeline, images: Tensor) -> None:
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 20, "output_type": "pt"}
    plain = pipe.invert(images, ["red apple", "blue dog", "dog"], method="ddim", **arguments)
    fitted = pipe.invert(images, ["red apple", "blue dog", "dog"], method="null-text", **arguments)
    errors = [(one.images - images).square().mean(dim=(1, 2, 3)) for one in (plain, fitted)]
    assert (errors[1] < 0.3 * errors[0]).all()
    assert fitted.negative_prompt_embeds.shape == (20, 3, 6, 5)


def test_an_image_that_is_done_leaves_the_batch(exact: SmoothPipeline, images: Tensor) -> None:
    # Under the empty prompt both halves are one, and the first round finds no loss.
    exact.invert(images[:2], ["", "red apple"], num_inference_steps=3, **METHOD)
    rows = gradient_rows(exact)
    assert [rows[0], *set(rows[1:10])] == [2, 1]
    assert rows.count(2) == 3


def test_shared_embeddings_serve_both(pipe: SmoothPipeline, images: Tensor) -> None:
    prompts = ["red apple", "blue dog"]
    shared = pipe.invert(images[:2], prompts, shared=True, num_inference_steps=10, **METHOD)
    embeds = shared.negative_prompt_embeds
    assert torch.equal(embeds[:, 0], embeds[:, 1])
    own = pipe.invert(images[:2], prompts, num_inference_steps=10, **METHOD).negative_prompt_embeds
    assert not torch.equal(own[:, 0], own[:, 1])
    morph = pipe.interpolate(
        prompts, [images[0], images[1]], method="null-text", frames=3, guidance_scale=3.0, num_inference_steps=10,
        output_type="pt",
    )  # fmt: skip
    torch.testing.assert_close(morph.images[[0, 2]], shared.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_stopped_one_goes_on_to_the_same_result(
    pipe: SmoothPipeline, images: Tensor, cache: Path, shared: bool
) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 6, "shared": shared, **METHOD}
    prompts = ["red apple", "blue dog"]
    whole = pipe.invert(images[:2], prompts, keep=False, **arguments)
    every = len(gradient_rows(pipe))
    pipe.digests = {"unet": "of the fake"}

    def stop(_: SmoothPipeline, i: int, t: int, __: Any) -> None:
        if i == 3 and t == pipe.schedule(6).timesteps[3] and stop.walked:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        stop.walked = stop.walked or i == 5  # type: ignore[attr-defined]

    stop.walked = False  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        pipe.invert(images[:2], prompts, callback_on_step_end=stop, **arguments)
    assert len(list(cache.glob("*.safetensors"))) == (1 if shared else 2)
    before = len(gradient_rows(pipe))
    again = pipe.invert(images[:2], prompts, **arguments)
    assert 0 < len(gradient_rows(pipe)) - before < every
    assert torch.equal(again.images, whole.images)
    assert torch.equal(again.negative_prompt_embeds, whole.negative_prompt_embeds)
    before, there = len(gradient_rows(pipe)), pipe.evaluations["forward"]
    third = pipe.invert(images[:2], prompts, reconstruct=False, **arguments)
    assert (len(gradient_rows(pipe)), pipe.evaluations["forward"]) == (before, there)
    assert torch.equal(third.latents, whole.latents)


def test_what_decides_the_result_decides_the_file(pipe: SmoothPipeline, images: Tensor, cache: Path) -> None:
    pipe.digests = {"unet": "of the fake"}
    arguments: dict[str, Any] = {"num_inference_steps": 2, "reconstruct": False, **METHOD}
    pipe.invert(images[0], "dog", **arguments)
    for image, prompt, changed in (
        (images[1], "dog", {}),
        (images[0], "apple", {}),
        (images[0], "dog", {"guidance_scale": 4.0}),
        (images[0], "dog", {"num_inference_steps": 3}),
    ):
        pipe.invert(image, prompt, **{**arguments, **changed})
    pipe.digests = {"unet": "of another"}
    pipe.invert(images[0], "dog", **arguments)
    assert len(list(cache.iterdir())) == 6


def test_a_damaged_file_is_passed_over(
    pipe: SmoothPipeline, images: Tensor, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.digests = {"unet": "of the fake"}
    arguments: dict[str, Any] = {"num_inference_steps": 2, **METHOD}
    first = pipe.invert(images[0], "dog", **arguments)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])  # safetensors itself does not see it
    renamed = pipe.invert(images[1], "dog", **arguments) and next(one for one in cache.iterdir() if one != file)
    for content in (whole[:100], flipped, renamed.read_bytes()):
        caplog.clear()
        file.write_bytes(content)
        again = pipe.invert(images[0], "dog", **arguments)
        assert "cannot be read" in caplog.text
        assert torch.equal(again.images, first.images)
        assert file.read_bytes() == whole


def test_a_loss_that_is_not_finite_stops_with_its_step(
    fake: Callable[..., SmoothPipeline], images: Tensor, cache: Path
) -> None:
    broken = False

    def formula(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        found = 0.5 * torch.tanh(x) + (text.mean(dim=(1, 2)) + t / 1000)[:, None, None, None]
        return found * float("nan") if broken and text.requires_grad else found

    pipe = fake(formula)
    pipe.digests = {"unet": "of the fake"}
    calls: list[int] = []

    def breaks(_: SmoothPipeline, i: int, *__: Any) -> None:
        nonlocal broken
        calls.append(i)
        broken = len(calls) == 4 + 2  # the way there, and two steps of the fit

    said = r"null-text: step 3 of 4 \(timestep \d+\): the loss of image 1 is not finite on fake \(the 2 steps before it"
    with pytest.raises(EngineError, match=said):
        pipe.invert(images[0], "dog", num_inference_steps=4, callback_on_step_end=breaks, **METHOD)
    broken = False
    again = pipe.invert(images[0], "dog", num_inference_steps=4, **METHOD)
    assert torch.equal(again.images, pipe.invert(images[0], "dog", num_inference_steps=4, keep=False, **METHOD).images)
