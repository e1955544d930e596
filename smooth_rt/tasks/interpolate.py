"""Interpolation: frames between two images, two noises or two prompts (Smooth Diffusion, arXiv 2312.04410, section 4).

The noises x_T are mixed on the sphere (slerp, Shoemake 1985), the text embeddings along the line; then every frame is
sampled as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from smooth_rt.errors import InputError
from smooth_rt.images import ImageLike, Images, OutputType, as_list
from smooth_rt.ranges import check
from smooth_rt.tasks import checks
from smooth_rt.tasks.generate import embed_pair, guided
from smooth_rt.tasks.inversion import invert

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline, StepCallback

__all__ = ["Interpolation", "interpolate", "lerp", "slerp"]

NEARLY_PARALLEL = 0.9995


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


def slerp(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of two tensors taken as flat vectors, computed in float64.

        sin((1 - alpha) * theta) / sin(theta) * start + sin(alpha * theta) / sin(theta) * end

    theta is the angle between them. Where |cos(theta)| > 0.9995, or one of them is zero, the line is taken instead.

    Args:
        start: any shape.
        end: the shape of `start`.
        alpha: 0 gives `start`, 1 gives `end`.

    Returns:
        The shape and dtype of `start`.
    """
    a, b = start.double().flatten(), end.double().flatten()
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    if not abs(cosine) <= NEARLY_PARALLEL:  # so written that NaN, from a zero vector, takes the line too
        mixed = lerp(a, b, alpha)
    else:
        theta = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
        mixed = (torch.sin((1 - alpha) * theta) * a + torch.sin(alpha * theta) * b) / torch.sin(theta)
    return mixed.reshape(start.shape).to(start.dtype)


def lerp(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) * start + alpha * end`."""
    return (1 - alpha) * start + alpha * end


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
        method: how images are inverted: "ddim", "ddim-without-text" or "negative-prompt".
        generator: two, one an end; or one: with one prompt both noises are drawn from it in turn, with two prompts
            both ends share one noise. None draws from torch's own in the same way.
        latents: the two noises [2, C, H/f, W/f] (or one [1, ...] for both ends), float32, in place of `generator`.
        height: pixels, a multiple of `dims.image_multiple`; None: the model's size, or that of `latents`.
        width: as `height`.
        num_inference_steps: DDIM steps, 1..num_train_timesteps.
        guidance_scale: None: 7.5, or with images the default of the inversion method.
        negative_prompt: what guidance moves away from, for noise; images bring their own.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: as in `generate`, for every step taken, those of an inversion first.

    Raises:
        InputError: an argument is out of its range, an image cannot be read, or there are not two ends.
        EngineError: a network failed, or the latents stopped being finite (the step is named).
    """
    (frames, *_) = check(frames=frames, output_type=output_type, callback_on_step_end=callback_on_step_end)
    schedule = pipe.schedule(num_inference_steps)
    if images is not None:
        if generator is not None or latents is not None or negative_prompt is not None:
            raise InputError("images: generator, latents and negative_prompt are for ends of noise; leave them out")
        both = as_list(images)
        if len(both) != 2:
            raise InputError(f"images: {len(both)}; give the two ends")
        inverted = invert(
            pipe, both, prompts, method=method, height=height, width=width, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, reconstruct=False, callback_on_step_end=callback_on_step_end,
        )  # fmt: skip
        noise, scale = inverted.latents, inverted.guidance_scale
        cond, uncond = inverted.prompt_embeds, inverted.negative_prompt_embeds
    else:
        if prompts is None:
            raise InputError("prompts: missing; give one for both ends, or two")
        (scale,) = check(guidance_scale=7.5 if guidance_scale is None else guidance_scale)
        texts = checks.one_each(prompts, 2, "prompts", "ends")
        noise = _noise_ends(pipe, len(checks.as_prompts(prompts)) == 2, generator, latents, height, width)
        cond, uncond = embed_pair(pipe, texts, negative_prompt, None, None, scale)
    alphas = tuple(i / (frames - 1) for i in range(frames))
    # The ends are taken as they are: a round trip through float64 may move their last bit.
    between = [slerp(noise[0], noise[1], alpha) for alpha in alphas[1:-1]]
    path = torch.stack([noise[0], *between, noise[1]])
    cond, uncond = (torch.stack([lerp(pair[0], pair[1], alpha) for alpha in alphas]) for pair in (cond, uncond))
    final = pipe.denoise(path, schedule.steps, guided(pipe, cond, uncond, scale), callback_on_step_end)
    return Interpolation(pipe.decode(final, output_type), path, alphas)


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
        noise = checks.latents(latents, count, pipe.dims, height, width)
    else:
        height, width = pipe.image_size(height, width)
        alone = generator is None or isinstance(generator, Generator)
        noise = pipe.draw_noise(1 if alone and two_prompts else 2, height, width, generator)
    if len(noise) == 1 and not two_prompts:
        raise InputError("latents: one noise and one prompt make one end; give two latents or two prompts")
    return noise.expand(2, -1, -1, -1)
