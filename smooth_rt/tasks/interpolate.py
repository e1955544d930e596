"""Interpolation: frames between two images, two noises or two prompts (Smooth Diffusion, arXiv 2312.04410, section 4).

The noises x_T are mixed on the sphere (slerp, Shoemake 1985), the text embeddings along the line; then every frame is
sampled as one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from smooth_rt.calls import one_call
from smooth_rt.errors import InputError
from smooth_rt.images import ImageLike, Images, OutputType, as_list
from smooth_rt.ranges import check, choice
from smooth_rt.tasks import checks
from smooth_rt.tasks.attention_blend import blended_back
from smooth_rt.tasks.generate import embed_pair
from smooth_rt.tasks.inversion import METHODS, Noise, between, invert
from smooth_rt.tasks.inversion.base import ddim_back, guided_back

if TYPE_CHECKING:
    from smooth_rt.loop import StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["PASSES", "Interpolation", "adapted", "evened", "interpolate"]

PASSES = 3  # of rescheduling, where no number is given
EVEN = 1.1  # the longest step over the mean one, from which on frames are even enough


@dataclass(frozen=True)
class Interpolation:
    """Args:
    images: the frames, in order, in the `output_type` asked for; the first and the last are the ends themselves.
    latents: the noise x_T of each frame [frames, C, H/f, W/f].
    alphas: the place of each frame between the ends, 0 to 1.
    """

    images: Images
    latents: Tensor
    alphas: tuple[float, ...]


@one_call
def interpolate(
    pipe: SmoothPipeline,
    prompts: str | Sequence[str] | None = None,
    images: ImageLike | Sequence[ImageLike] | None = None,
    *,
    frames: int = 24,
    method: str = "ddim",
    generator: Generator | Sequence[Generator] | None = None,
    latents: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    adain: bool = False,
    reschedule: str | None = None,
    reschedule_passes: int | None = None,
    attention_blend: bool = False,
    keep: bool = True,
    output_type: OutputType = "pil",
    callback_on_step_end: StepCallback | None = None,
) -> Interpolation:
    """Frames from one end to the other. All frames go through each network together.

    The ends differ in what comes as two: two images, two generators or latents (seeds), two prompts; text and noise
    may both change. Two images are inverted first, and the first and last frames are their reconstructions.

    Args:
        prompts: one for both ends, or one each. May be missing with `method="ddim-without-text"` alone.
        images: the two ends, as in `invert`; or None, and the ends come from noise.
        frames: the number of frames with both ends, from 2 to MOST_IMAGES.
        method: how images are inverted, as in `invert`; with "null-text" both share one list of embeddings.
        generator: two, one an end; or one: with one prompt both noises are drawn from it in turn, with two prompts
            both ends share one noise. None draws from torch's own in the same way.
        latents: the two noises [2, C, H/f, W/f] (or one [1, ...] for both ends), float32, in place of `generator`.
        height: pixels, a multiple of `dims.image_multiple`; None: the model's size, or that of `latents`.
        width: as `height`.
        num_inference_steps: DDIM steps, 1..num_train_timesteps.
        guidance_scale: None: 7.5, or with images the default of the inversion method.
        negative_prompt: what guidance moves away from, for noise; images bring their own.
        adain: adapt the final latents of each frame to the ends' (`adapted`).
        reschedule: "pixels" or "lpips": sample the frames again, at places where neighbours should lie equally far
            apart in pixel L2, or in LPIPS where its weights are at hand (`evened`).
        reschedule_passes: how often at most; the longest step is then nearer to the mean one each time. It ends where
            they are within EVEN, and the evenest frames are taken. None: PASSES.
        attention_blend: let the frames' self-attention look at both ends (`attention_blend.blended_back`); on the
            engine "eager" alone.
        keep: as in `invert`.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: as in `generate`, for every step taken, those of an inversion first.

    Raises:
        InputError: an argument is out of its range, an image cannot be read, or there are not two ends.
        EngineError: a network failed, the latents stopped being finite (the step is named), or the engine does not
            expose the attention to blend.
    """
    (frames, *_) = check(frames=frames, output_type=output_type, callback_on_step_end=callback_on_step_end)
    reschedule, passes = check(reschedule=reschedule, reschedule_passes=reschedule_passes)
    if reschedule is None and passes is not None:
        raise InputError(f"reschedule_passes={passes}: there is nothing to reschedule by; name pixels or lpips, too")
    method = choice("method", method, tuple(METHODS))  # "auto" would choose the number of steps, too
    schedule = pipe.schedule(num_inference_steps)
    if attention_blend:
        pipe.attentions()  # an engine without them is refused before the work
    ends: Noise
    if images is not None:
        if generator is not None or latents is not None or negative_prompt is not None:
            raise InputError("images: generator, latents and negative_prompt are for ends of noise; leave them out")
        both = as_list(images)
        if len(both) != 2:
            raise InputError(f"images: {len(both)}; give the two ends")
        inverted = invert(
            pipe, both, prompts, method=method, height=height, width=width, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, reconstruct=False, shared=method == "null-text", keep=keep,
            callback_on_step_end=callback_on_step_end,
        )  # fmt: skip
        ends, scale, sample = inverted, inverted.guidance_scale, METHODS[inverted.method].sample
    else:
        if prompts is None:
            raise InputError("prompts: missing; give one for both ends, or two")
        (scale,) = check(guidance_scale=7.5 if guidance_scale is None else guidance_scale)
        texts = checks.one_each(prompts, 2, "prompts", "ends")
        noise = _noise_ends(pipe, len(checks.as_prompts(prompts)) == 2, generator, latents, height, width)
        cond, uncond = embed_pair(pipe, texts, negative_prompt, None, None, scale)
        ends, sample = Noise(latents=noise, prompt_embeds=cond, negative_prompt_embeds=uncond), ddim_back

    def path(alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The noise and the final latents of the frames at these places."""
        some = between(ends, alphas)
        plain = nullcontext(guided_back(pipe, some, scale))
        with blended_back(pipe, some, scale, alphas, len(schedule.steps)) if attention_blend else plain as predict:
            final = sample(pipe, some, schedule, predict, callback_on_step_end)
        return some.latents, adapted(final, alphas) if adain else final

    alphas = tuple(i / (frames - 1) for i in range(frames))
    latents, final = path(alphas)
    if reschedule is not None:
        evenest, taken = math.inf, (alphas, latents, final)
        for left in reversed(range(1 + (PASSES if passes is None else passes))):
            distances = _distances(cast("NDArray[np.float32]", pipe.decode(final, "np")), reschedule)
            longest = max(distances) / (sum(distances) / len(distances) or math.inf)
            if longest < evenest:
                evenest, taken = longest, (alphas, latents, final)
            if longest <= EVEN or not left:
                break
            alphas = evened(alphas, distances)
            latents, final = path(alphas)
        alphas, latents, final = taken
    return Interpolation(pipe.decode(final, output_type), latents, alphas)


def adapted(latents: Tensor, alphas: Sequence[float]) -> Tensor:
    """AdaIN (Huang & Belongie 2017, arXiv 1703.06868) along a path, as DiffMorpher has it (Zhang et al. 2024, arXiv
    2312.07409, section 3.4): each frame's channels take on the mean and the deviation that lie between the ends'.

    Args:
        latents: x_0 [frames, C, h, w]; the first and the last stay as they are.
        alphas: the place of each frame.
    """
    deviation, mean = torch.std_mean(latents, dim=(2, 3), keepdim=True)
    place = torch.tensor(alphas, dtype=latents.dtype)[:, None, None, None]
    wanted = [(1 - place) * one[:1] + place * one[-1:] for one in (deviation, mean)]
    moved = (latents - mean) / deviation.clamp_min(1e-12) * wanted[0] + wanted[1]
    return torch.cat([latents[:1], moved[1:-1], latents[-1:]])


def evened(alphas: Sequence[float], distances: Sequence[float]) -> tuple[float, ...]:
    """Places at which neighbouring frames should lie equally far apart, read from frames at `alphas` that lie
    `distances` apart: the way along the path is taken as linear between them (arXiv 2312.07409, section 3.5).

    The ends stay. Where all frames are alike, so do the places.
    """
    way = np.concatenate([[0.0], np.cumsum(distances)])
    if not way[-1] > 0:
        return tuple(alphas)
    inner = np.interp(np.linspace(0, way[-1], len(alphas))[1:-1], way, alphas)
    return (alphas[0], *map(float, inner), alphas[-1])


def _distances(images: NDArray[np.float32], kind: str) -> list[float]:
    """Between neighbours of [frames, H, W, 3] in 0..1."""
    pairs = itertools.pairwise(images)
    if kind == "pixels":
        return [float(np.linalg.norm(b - a)) for a, b in pairs]
    from smooth_rt.metrics.pretrained import MissingError
    from smooth_rt.metrics.reconstruction import lpips

    try:
        return [lpips(a, b) for a, b in pairs]
    except MissingError as error:
        raise InputError(f"reschedule='lpips': {error}; or use pixels") from error


def _noise_ends(
    pipe: SmoothPipeline,
    two_prompts: bool,
    generator: Generator | Sequence[Generator] | None,
    latents: Tensor | None,
    height: int | None,
    width: int | None,
) -> Tensor:
    """The noise of both ends [2, C, h, w]."""
    if latents is not None:
        if generator is not None:
            raise InputError("latents: given together with generator; give one of them")
        count = 1 if isinstance(latents, Tensor) and latents.shape[:1] == (1,) else 2
        if height is not None or width is not None:
            height, width = pipe.image_size(height, width)
        noise = checks.latents(pipe, latents, count, height, width)
    else:
        height, width = pipe.image_size(height, width)
        alone = generator is None or isinstance(generator, Generator)
        noise = pipe.draw_noise(1 if alone and two_prompts else 2, height, width, generator)
    if len(noise) == 1 and not two_prompts:
        raise InputError("latents: one noise and one prompt make one end; give two latents or two prompts")
    return noise.expand(2, -1, -1, -1)
