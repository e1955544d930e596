"""What each inversion method promises: its cost, exactness, and what sampling back under other texts makes of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from smooth_rt.errors import InputError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks.interpolate import adapted, evened
from smooth_rt.tasks.inversion import METHODS, between

EXACT = ("edict", "belm")


def rows(pipe: SmoothPipeline) -> tuple[int, int]:
    """What the fake UNet has seen: rows of forward passes and of gradients."""
    unet: Any = pipe._engines["unet"]
    return sum(unet.batches), sum(sum(one.batches) for one in unet._gradient_engines.values())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_those_that_are_told(pipe: SmoothPipeline, images: Tensor, method: str, scale: float) -> None:
    told = METHODS[method].evaluations(8, scale != 1)
    arguments: dict[str, Any] = {"method": method, "guidance_scale": scale, "num_inference_steps": 8}
    pipe.invert(images[0], "red apple", reconstruct=False, **arguments)
    there, gradients = rows(pipe)
    assert there == told.there
    assert (0 < gradients <= told.gradients) if told.gradients else gradients == 0
    pipe.invert(images[0], "red apple", **arguments)
    assert rows(pipe)[0] - 2 * there == told.back
    assert pipe.evaluations == dict(zip(("forward", "gradient"), rows(pipe), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is_and_costs_stands_in_its_file(method: str) -> None:
    name = {"ddim-without-text": "ddim"}.get(method, method.replace("-", "_"))
    said = cast("str", importlib.import_module(f"smooth_rt.tasks.inversion.{name}").__doc__)
    assert "arXiv" in said
    assert "Evaluations in T steps: " in said


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_rebuild_the_latent(eager: SmoothPipeline, method: str) -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = eager.invert(image, "dog", method=method, guidance_scale=1, num_inference_steps=50, output_type="pt")
    assert found.final_latents is not None
    assert float((found.final_latents - found.image_latents).square().mean()) <= 1e-6
    assert float((found.latents - found.image_latents).square().mean()) > 0.1


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_are_so_under_guidance(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    found = pipe.invert(images, "red apple", method=method, guidance_scale=3, num_inference_steps=20)
    assert found.final_latents is not None
    assert float((found.final_latents - found.image_latents).square().mean()) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_rebuild_the_default_model_s_latent(method: str) -> None:
    from smooth_rt.evaluation import examples

    example = examples()[0]
    with SmoothPipeline.from_pretrained(engine="eager") as pipe:
        found = pipe.invert(example.path, example.caption, method=method, guidance_scale=1)
    assert found.final_latents is not None
    assert float((found.final_latents - found.image_latents).square().mean()) <= 1e-6


@pytest.mark.parametrize("method", ["fixed-point", "spdinv"])
def test_what_is_solved_is_nearer_than_ddim(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    def error(method: str) -> float:
        found = pipe.invert(images, "red apple", method=method, guidance_scale=1, num_inference_steps=20)
        assert found.final_latents is not None
        return float((found.final_latents - found.image_latents).square().mean())

    assert error(method) < 0.3 * error("ddim")


def test_direct_inversion_rebuilds_under_any_guidance(pipe: SmoothPipeline, images: Tensor) -> None:
    found = pipe.invert(images, "red apple", method="direct", num_inference_steps=10, output_type="pt")
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].with_text])
def test_an_edit_of_no_strength_is_the_reconstruction(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    arguments: dict[str, Any] = {"method": method, "guidance_scale": 2.0, "num_inference_steps": 6, "output_type": "pt"}
    rebuilt = pipe.invert(images, "red apple", **arguments).images
    kept = pipe.edit(images, "blue dog", "red apple", edit_strength=0.0, **arguments).images
    assert torch.equal(kept, rebuilt)
    changed = pipe.edit(images, "blue dog", "red apple", edit_strength=0.6, **arguments).images
    assert not torch.equal(changed, rebuilt)


def test_corrections_end_where_the_target_begins(fake: Callable[..., SmoothPipeline], images: Tensor) -> None:
    def by_sample(x: Tensor, _: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x) + text.mean(dim=(1, 2))[:, None, None, None]

    pipe = fake(by_sample)
    arguments: dict[str, Any] = {"method": "direct", "guidance_scale": 2.0, "num_inference_steps": 4}
    seen: list[Tensor] = []
    pipe.edit(
        images[0], "blue dog", "red apple", edit_strength=0.5, **arguments,
        callback_on_step_end=lambda _, __, ___, tensors: seen.append(tensors["latents"]),
    )  # fmt: skip
    found = pipe.invert(images[0], "red apple", return_trajectory=True, **arguments)
    assert found.trajectory is not None
    # Four steps there, four that measure the distances, and two back along the stored latents.
    torch.testing.assert_close(seen[9], found.trajectory[1], rtol=0, atol=1e-5)
    assert (seen[11] - found.image_latents).abs().max() > 1e-3


def test_a_method_that_is_none_is_refused_where_none_is_needed(pipe: SmoothPipeline, images: Tensor) -> None:
    said = "method='magic' is unknown; it is one of ddim, "
    with pytest.raises(InputError, match=said):
        pipe.interpolate(["dog", "apple"], method="magic")
    with pytest.raises(InputError, match=said):
        pipe.edit(images[0], "dog", edit_method="sdedit", method="magic")


def test_edit_refuses_a_method_without_the_source(pipe: SmoothPipeline, images: Tensor) -> None:
    with pytest.raises(InputError, match=r"ddim-without-text.*: eq15 follows the source prompt"):
        pipe.edit(images[0], "a", "b", method="ddim-without-text")
    with pytest.raises(InputError, match="shared: method 'ddim'"):
        pipe.invert(images, "dog", shared=True)
    with pytest.raises(InputError, match="num_inference_steps=1: belm"):
        pipe.invert(images, "dog", method="belm", num_inference_steps=1)


def test_images_of_different_sizes_go_together(pipe: SmoothPipeline, images: Tensor) -> None:
    sizes = [torch.rand(3, 24, 40), images[1], torch.rand(3, 16, 16)]
    together = pipe.invert(sizes, "dog", num_inference_steps=2, output_type="pt").images
    assert together.shape == (3, 3, 16, 16)
    alone = pipe.invert(sizes[0], "dog", num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_noise_between_two_images_has_their_ends(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    found = pipe.invert(images[:2], ["red apple", "dog"], method=method, num_inference_steps=4, guidance_scale=2.0)
    mixed = between(found, (0.0, 0.25, 1.0))
    for name, axes in (
        ("latents", 4), ("companion", 4), ("corrections", 4), ("prompt_embeds", 3), ("negative_prompt_embeds", 3),
    ):  # fmt: skip
        ends, frames = getattr(found, name), getattr(mixed, name)
        if ends is not None:
            assert torch.equal(frames.index_select(ends.ndim - axes, torch.tensor([0, 2])), ends)


def test_adain_gives_each_frame_what_lies_between_the_ends() -> None:
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.rand(4, 3, 1, 1) + 2
    alphas = (0.0, 0.25, 0.5, 1.0)
    found = adapted(latents, alphas)
    assert torch.equal(found[[0, 3]], latents[[0, 3]])
    for index, alpha in enumerate(alphas):
        for measure in (torch.mean, torch.std):
            first, last, here = (measure(one, dim=(1, 2)) for one in (found[0], found[3], found[index]))
            torch.testing.assert_close(here, (1 - alpha) * first + alpha * last)


def test_places_are_evened() -> None:
    assert evened((0.0, 0.5, 1.0), (3.0, 1.0)) == pytest.approx((0, 1 / 3, 1))
    assert evened((0.0, 0.5, 1.0), (1.0, 1.0)) == pytest.approx((0, 0.5, 1))
    assert evened((0.0, 0.5, 1.0), (0.0, 0.0)) == (0.0, 0.5, 1.0)


def test_rescheduled_frames_lie_more_evenly(fake: Callable[..., SmoothPipeline], images: Tensor) -> None:
    def steep(x: Tensor, _: Tensor, text: Tensor) -> Tensor:
        return 3 * torch.sigmoid(40 * text.mean(dim=(1, 2)))[:, None, None, None] + 0 * x

    pipe = fake(steep)
    walked: list[int] = []

    def longest(steps: int = 3, **options: Any) -> float:
        walked.clear()
        made = pipe.interpolate(
            ["red", "dog"], [images[0], images[0]], frames=9, num_inference_steps=steps, output_type="pt",
            callback_on_step_end=lambda *_: walked.append(1), **options,
        )  # fmt: skip
        apart = (cast("Tensor", made.images)[1:] - made.images[:-1]).flatten(1).norm(dim=1)
        return float(apart.max() / apart.mean())

    plain = longest()
    assert len(walked) == 3 * 2
    once = longest(reschedule="pixels", reschedule_passes=1)
    assert len(walked) == 3 * 3
    often = longest(reschedule="pixels")
    assert 3 * 3 < len(walked) <= 3 * 5
    assert plain > 2
    assert plain > once > often
    assert often < 1.15
    # Frames that are even by now are not sampled again, and a pass that made them less so is not taken.
    assert longest(reschedule="pixels", reschedule_passes=50) <= 1.1
    assert len(walked) < 3 * 10
    for options, said in (
        ({"reschedule": "even"}, "reschedule='even' is unknown; it is one of pixels, lpips"),
        ({"reschedule_passes": 2}, "reschedule_passes=2: there is nothing to reschedule by; name pixels or lpips"),
        ({"reschedule": "pixels", "reschedule_passes": 0}, "reschedule_passes=0: give a whole number from 1"),
    ):
        with pytest.raises(InputError, match=said):
            longest(**cast("dict[str, Any]", options))
