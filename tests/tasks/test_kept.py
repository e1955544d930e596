"""What is kept of the inversions that take long: of a stopped one, and not of what a callback changed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smooth_rt.errors import EngineError, InputError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.tasks import inversion
from smooth_rt.tasks.inversion import kept

METHODS = ("null-text", "spdinv")
PROMPTS = ["red apple", "blue dog"]
SETTINGS: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 5, "output_type": "pt"}


@pytest.fixture
def pipe(pipe: SmoothPipeline, cache: Path) -> SmoothPipeline:
    pipe.digests = {"unet": "of the fake"}
    return pipe


def halved(_: SmoothPipeline, __: int, ___: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * 0.5}


def halved_in_place(_: SmoothPipeline, __: int, ___: int, tensors: dict[str, Tensor]) -> None:
    tensors["latents"].mul_(0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("callback", [halved, halved_in_place])
def test_what_a_callback_changes_is_not_kept(
    pipe: SmoothPipeline, images: Tensor, cache: Path, method: str, callback: Any
) -> None:
    clean = pipe.invert(images[0], "dog", method=method, keep=False, **SETTINGS)
    other = pipe.invert(images[0], "dog", method=method, callback_on_step_end=callback, **SETTINGS)
    assert not list(cache.glob("*"))
    assert torch.equal(pipe.invert(images[0], "dog", method=method, **SETTINGS).latents, clean.latents)
    assert len(list(cache.glob("*"))) == 1
    # Nor is what was kept without it taken for what it leaves.
    again = pipe.invert(images[0], "dog", method=method, callback_on_step_end=callback, **SETTINGS)
    assert torch.equal(again.latents, other.latents)
    assert torch.equal(again.images, other.images)
    assert not torch.equal(again.latents, clean.latents)
    assert torch.equal(pipe.invert(images[0], "dog", method=method, **SETTINGS).images, clean.images)


class Stops:
    """Stops at a step of the fit, or changes the latents there."""

    def __init__(self, method: str, at: int, change: bool = False) -> None:
        self.left = at + (SETTINGS["num_inference_steps"] if method == "null-text" else 0)
        self.change = change

    def __call__(self, pipe: SmoothPipeline, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        self.left -= 1
        if self.left:
            return None
        if not self.change:
            raise KeyboardInterrupt
        return halved(pipe, i, t, tensors)


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_one_goes_on_to_the_same_result(
    pipe: SmoothPipeline, images: Tensor, cache: Path, method: str
) -> None:
    whole = pipe.invert(images[:2], PROMPTS, method=method, keep=False, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        pipe.invert(images[:2], PROMPTS, method=method, callback_on_step_end=Stops(method, 3), **SETTINGS)
    assert len(list(cache.iterdir())) == 2
    # It goes on beside one that is done, and one that is not kept at all.
    pipe.invert(images[1], PROMPTS[1], method=method, **SETTINGS)
    again = pipe.invert(images, [*PROMPTS, "dog"], method=method, **SETTINGS)
    assert torch.equal(again.images[:2], whole.images)
    assert torch.equal(again.latents[:2], whole.latents)
    before = dict(pipe.evaluations)
    third = pipe.invert(images[:2], PROMPTS, method=method, reconstruct=False, return_trajectory=True, **SETTINGS)
    assert pipe.evaluations == before
    assert torch.equal(third.latents, whole.latents)
    assert third.trajectory is not None
    assert torch.equal(third.trajectory[-1], third.latents)


def test_what_ran_at_two_strengths_is_not_kept(
    pipe: SmoothPipeline, images: Tensor, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the strength is the first one again: `set_lora_strength` makes the digests anew."""

    def there_and_back(*_: Any) -> None:
        pipe.digests = dict(pipe.digests)

    pipe.invert(images[0], "dog", method="null-text", callback_on_step_end=there_and_back, **SETTINGS)
    assert not list(cache.rglob("*.safetensors"))
    assert "null-text: not kept: the LoRA's strength was changed meanwhile" in caplog.text
    pipe.invert(images[0], "dog", method="null-text", **SETTINGS)
    assert len(list(cache.rglob("*.safetensors"))) == 1


def test_a_cache_that_may_only_be_read_serves(
    pipe: SmoothPipeline, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pipe.invert(images[0], "dog", method="null-text", **SETTINGS)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    before = dict(pipe.evaluations)
    again = pipe.invert(images[0], "dog", method="null-text", reconstruct=False, **SETTINGS)
    assert torch.equal(again.latents, first.latents)
    assert pipe.evaluations == before


@pytest.mark.parametrize("method", METHODS)
def test_a_change_after_steps_that_were_kept_is_refused(pipe: SmoothPipeline, images: Tensor, method: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipe.invert(images[0], "dog", method=method, callback_on_step_end=Stops(method, 3), **SETTINGS)
    # The levels that are kept are shown to it, so it comes to the third step as before.
    with pytest.raises(InputError, match=r"callback_on_step_end: changed the latents of timestep \d+, .*keep=False"):
        pipe.invert(images[0], "dog", method=method, callback_on_step_end=Stops(method, 3, change=True), **SETTINGS)
    clean = pipe.invert(images[0], "dog", method=method, keep=False, **SETTINGS)
    assert torch.equal(pipe.invert(images[0], "dog", method=method, **SETTINGS).latents, clean.latents)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_keeps_what_is_done(
    fake: Callable[..., SmoothPipeline], images: Tensor, cache: Path, method: str
) -> None:
    broken = False

    def formula(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        found = 0.5 * torch.tanh(x) + (text.mean(dim=(1, 2)) + t / 1000)[:, None, None, None]
        return found * float("nan") if broken and (text.requires_grad or x.requires_grad) else found

    pipe = fake(formula)
    pipe.digests = {"unet": "of the fake"}
    left = 2 + (5 if method == "null-text" else 0)

    def breaks(*_: Any) -> None:
        nonlocal broken, left
        left -= 1
        broken = left == 0

    said = rf"{method}: step 3 of 5 \(timestep \d+\): the loss of image 1 is not finite on fake \(the 2 steps before it"
    with pytest.raises(EngineError, match=said):
        pipe.invert(images[0], "dog", method=method, callback_on_step_end=breaks, **SETTINGS)
    assert len(list(cache.iterdir())) == 1
    broken = False
    whole = pipe.invert(images[0], "dog", method=method, keep=False, **SETTINGS)
    every = pipe.evaluations["gradient"]
    again = pipe.invert(images[0], "dog", method=method, **SETTINGS)
    assert pipe.evaluations["gradient"] - every < every
    assert torch.equal(again.images, whole.images)
    broken = True
    with pytest.raises(EngineError, match=r"step 1 of 5 .*\(nothing is kept\)"):
        pipe.invert(images[1], "dog", method=method, keep=False, **SETTINGS)


def test_room_is_made_while_others_do_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("new", "old", "older")):
        (tmp_path / f"{name}.safetensors").write_bytes(b" " * 10)
        os.utime(tmp_path / f"{name}.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")  # as one that went since the folder was read
    monkeypatch.setattr(kept, "MOST_BYTES", 20)
    kept._make_room(tmp_path, tmp_path / "new.safetensors")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["gone", "new", "old"]
    kept._make_room(tmp_path / "nowhere", tmp_path / "nowhere" / "new.safetensors")


def test_all_rounds_are_taken_where_asked(pipe: SmoothPipeline, images: Tensor, cache: Path) -> None:
    arguments: dict[str, Any] = {"method": "spdinv", "reconstruct": False, **SETTINGS}
    pipe.invert(images[0], "dog", **arguments)
    soon = pipe.evaluations["gradient"]
    pipe.invert(images[0], "dog", early_stop=False, **arguments)
    assert soon < pipe.evaluations["gradient"] - soon == inversion.METHODS["spdinv"].evaluations(5, True).gradients
    assert len(list(cache.iterdir())) == 2
    with pytest.raises(InputError, match="early_stop: method 'ddim' fits nothing by rounds"):
        pipe.invert(images[0], "dog", early_stop=False)
