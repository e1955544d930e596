"""Inversion: from images to the noise that samples back to them. One interface, a file a method, its paper on top.

ddim                DDIM inversion under the prompt; sampled back at guidance 1 unless told otherwise
ddim-without-text   the same under the empty prompt
negative-prompt     DDIM inversion whose source embedding then stands in for the unconditional one, so that
                    sampling at any guidance scale rebuilds the image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from smooth_rt.errors import InputError
from smooth_rt.images import ImageLike, Images, OutputType, as_list
from smooth_rt.ranges import check, choice
from smooth_rt.tasks import checks
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion import ddim, negative_prompt

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline, StepCallback

__all__ = ["METHODS", "Inversion", "Method", "invert", "source_texts"]


class Method(NamedTuple):
    """How one method chooses text. `guidance_scale` is its default when sampling back.

    Args:
        with_text: whether it inverts under the prompt, or under the empty one.
        negative_embeds: (pipe, prompt_embeds) -> the embedding that guidance moves away from, [N, L, D].
        guidance_scale: the default of `invert` and of what is sampled from its result.
    """

    with_text: bool
    negative_embeds: ddim.NegativeEmbeds
    guidance_scale: float


METHODS: dict[str, Method] = {
    "ddim": Method(True, ddim.negative_embeds, 1.0),
    "ddim-without-text": Method(False, ddim.negative_embeds, 1.0),
    "negative-prompt": Method(True, negative_prompt.negative_embeds, 7.5),
}


@dataclass(frozen=True)
class Inversion:
    """N images turned to noise, and all that is needed to sample from it.

    Args:
        images: the reconstructions, in the `output_type` asked for; an empty list where `reconstruct=False`.
        latents: x_T [N, C, H/f, W/f].
        image_latents: x_0, the VAE's encoding of the images [N, C, H/f, W/f].
        prompt_embeds: the text that the images were inverted under [N, L, D].
        negative_prompt_embeds: what guidance moves away from [N, L, D].
        guidance_scale: the scale of the reconstruction.
        trajectory: the latents after each inversion step [steps, N, C, H/f, W/f], from image to noise; None unless
            asked for.
    """

    images: Images
    latents: Tensor
    image_latents: Tensor
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    guidance_scale: float
    trajectory: Tensor | None = None


def source_texts(method: str, prompts: str | Sequence[str] | None, count: int) -> list[str]:
    """The texts that so many images are inverted under.

    Raises:
        InputError: an unknown method, one that needs prompts without them, or a number of them that does not fit.
    """
    if not METHODS[choice("method", method, tuple(METHODS))].with_text:
        return [""] * count
    if prompts is None:
        raise InputError(f"prompts: method {method!r} needs one for each image; give it, or use ddim-without-text")
    return checks.one_each(prompts, count, "prompts", "images")


def invert(
    pipe: SmoothPipeline,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str] | None = None,
    *,
    method: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    reconstruct: bool = True,
    return_trajectory: bool = False,
    output_type: OutputType = "pil",
    callback_on_step_end: StepCallback | None = None,
) -> Inversion:
    """Turn images into noise and sample them back. All images go through each network together.

    Args:
        images: one or N images: path, PIL, numpy [H, W, 3] or torch [3, H, W] in 0..1, or a batch of 4 axes.
            They are scaled and centre-cropped to `height` x `width`.
        prompts: what the images show; one for all or one each. "ddim-without-text" needs none and uses none.
        method: "ddim", "ddim-without-text" or "negative-prompt".
        height: pixels, a multiple of `dims.image_multiple`; None: the model's size.
        width: as `height`.
        num_inference_steps: DDIM steps there, and as many back.
        guidance_scale: of the way back (the way there is always at 1); None: 1 for DDIM, 7.5 for negative-prompt.
        reconstruct: False skips the way back.
        return_trajectory: keep the latents of every inversion step.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: as in `generate`, for the steps there and then for those back.

    Raises:
        InputError: an argument is out of its range, an image cannot be read, or the numbers differ.
        EngineError: a network failed, or the latents stopped being finite (the step is named).
    """
    chosen = METHODS[choice("method", method, tuple(METHODS))]
    check(output_type=output_type, callback_on_step_end=callback_on_step_end)
    (scale,) = check(guidance_scale=chosen.guidance_scale if guidance_scale is None else guidance_scale)
    schedule = pipe.schedule(num_inference_steps)
    height, width = pipe.image_size(height, width)
    found = as_list(images)
    texts = source_texts(method, prompts, len(found))
    image_latents = pipe.encode_image(found, height, width)
    prompt_embeds = pipe.encode_prompt(texts)
    negative = chosen.negative_embeds(pipe, prompt_embeds)
    levels = ddim.invert_latents(pipe, image_latents, prompt_embeds, schedule, return_trajectory, callback_on_step_end)
    images_back: Images = []
    if reconstruct:
        predict = guided(pipe, prompt_embeds, negative, scale)
        final = pipe.denoise(levels[-1], schedule.steps, predict, callback_on_step_end)
        images_back = pipe.decode(final, output_type)
    trajectory = torch.stack(levels) if return_trajectory else None
    return Inversion(images_back, levels[-1], image_latents, prompt_embeds, negative, scale, trajectory)
