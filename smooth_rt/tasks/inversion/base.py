"""What every inversion takes and gives: a job, the noise that samples back to its images, and a method's own steps.

A method is two functions, there and back, and what they cost. All of them walk along the same DDIM schedule, so what
one leaves can be mixed with itself (`between`) and sampled under another text, whichever method it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from engines.contract import gradient_word
from smooth_rt.schedule import Schedule
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion.kept import Watched
from smooth_rt.tasks.mixing import lerp, slerp

if TYPE_CHECKING:
    from smooth_rt.loop import Predict, StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["Evaluations", "Job", "Method", "Noise", "Sample", "between", "ddim_back"]


@dataclass(frozen=True)
class Job:
    """N images to invert.

    Args:
        latents: x_0 [N, C, h, w].
        prompt_embeds: what they show [N, L, D].
        guidance_scale: that of the way back.
        shared: the images share what is optimised (null-text alone optimises something that can be shared).
        early_stop: what is fitted by rounds (null-text, SPDInv) ends them where it is close enough.
        names: what tells each image with its prompt from others, for keeping results; empty: nothing is kept.
    """

    pipe: SmoothPipeline
    latents: Tensor
    prompt_embeds: Tensor
    schedule: Schedule
    guidance_scale: float
    callback_on_step_end: Watched = field(default_factory=Watched)
    shared: bool = False
    early_stop: bool = True
    names: tuple[str, ...] = ()

    def only(self, images: Sequence[int]) -> Job:
        """The same for some of the images."""
        rows = list(images)
        names = tuple(self.names[i] for i in rows) if self.names else ()
        return replace(self, latents=self.latents[rows], prompt_embeds=self.prompt_embeds[rows], names=names)

    def empty(self) -> Tensor:
        """The empty prompt, once an image [N, L, D]."""
        return self.pipe.encode_prompt([""] * len(self.latents))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What sampling back to N images needs.

    Args:
        latents: x_T [N, C, h, w].
        prompt_embeds: the text that the images were inverted under [N, L, D].
        negative_prompt_embeds: what guidance moves away from [N, L, D], or one for each step back [steps, N, L, D].
        companion: the second latent of methods that walk with two [N, C, h, w].
        corrections: added after each step back [steps, N, C, h, w].
        trajectory: the latents after each inversion step [steps, N, C, h, w], from image to noise.
    """

    latents: Tensor
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    companion: Tensor | None = None
    corrections: Tensor | None = None
    trajectory: Tensor | None = None


def between(noise: Noise, alphas: Sequence[float]) -> Noise:
    """The noise of frames from the first of two images (0) to the second (1): latents on the sphere, the rest linearly.

    Args:
        noise: of two images.
        alphas: the place of each frame.
    """

    def mixed(tensor: Tensor, mix: Callable[[Tensor, Tensor, float], Tensor], axis: int = 0) -> Tensor:
        ends = tensor.unbind(axis)
        # The ends are taken as they are: a round trip through float64 may move their last bit.
        whole = {0.0: ends[0], 1.0: ends[1]}
        return torch.stack([whole[a] if a in whole else mix(ends[0], ends[1], a) for a in alphas], axis)

    negative = noise.negative_prompt_embeds
    return Noise(
        latents=mixed(noise.latents, slerp),
        prompt_embeds=mixed(noise.prompt_embeds, lerp),
        negative_prompt_embeds=mixed(negative, lerp, negative.ndim - 3),
        companion=None if noise.companion is None else mixed(noise.companion, slerp),
        corrections=None if noise.corrections is None else mixed(noise.corrections, lerp, 1),
    )


class Evaluations(NamedTuple):
    """Rows of the UNet an image: forward passes on the way there and back, and at most so many gradients."""

    there: int
    back: int
    gradients: int = 0

    @property
    def total(self) -> int:
        """In forward passes; a gradient is a forward and a backward one, and counts as three."""
        return self.there + self.back + 3 * self.gradients


class Sample(Protocol):
    def __call__(
        self,
        pipe: SmoothPipeline,
        noise: Noise,
        schedule: Schedule,
        predict: Predict,
        callback_on_step_end: StepCallback | None = None,
        until: float = math.inf,
    ) -> Tensor:
        """From noise to latents x_0 [N, C, h, w].

        Args:
            predict: under whichever text; its index is that of the step in `schedule.steps`.
            until: the index of the first step under another text than the images', where what ties the method to them
                ends.
        """


def ddim_back(
    pipe: SmoothPipeline,
    noise: Noise,
    schedule: Schedule,
    predict: Predict,
    callback_on_step_end: StepCallback | None = None,
    until: float = math.inf,  # noqa: ARG001
) -> Tensor:
    """Sampling by DDIM from x_T alone."""
    return pipe.denoise(noise.latents, schedule.steps, predict, callback_on_step_end)


class Method(NamedTuple):
    """One method.

    Args:
        invert: from a job to its noise.
        evaluations: for so many steps, with guidance (a scale that is not 1) or without.
        sample: the way back.
        with_text: whether it inverts under the prompt, or under the empty one.
        guidance_scale: the default of `invert` and of what is sampled from its result.
        walks: how often it goes through all steps, there and back; for progress bars.
        wrt: the inputs of the UNet that it takes gradients with respect to.
    """

    invert: Callable[[Job], Noise]
    evaluations: Callable[[int, bool], Evaluations]
    sample: Sample = ddim_back
    with_text: bool = True
    guidance_scale: float = 1.0
    walks: int = 2
    wrt: tuple[str, ...] = ()

    def gradients(self, guidance_scale: float | None = None) -> tuple[str, ...]:
        """What a user calls the gradients that it takes, as `SmoothPipeline.from_pretrained` is asked for them.

        Args:
            guidance_scale: of the way back; None is the method's own.
        """
        guided = (self.guidance_scale if guidance_scale is None else guidance_scale) != 1
        return (gradient_word(self.wrt),) if self.evaluations(1, guided).gradients else ()


def guided_back(pipe: SmoothPipeline, noise: Noise, guidance_scale: float) -> Predict:
    """The prediction that leads back to the images themselves."""
    return guided(pipe, noise.prompt_embeds, noise.negative_prompt_embeds, guidance_scale)
