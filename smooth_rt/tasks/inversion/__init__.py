"""Inversion: from images to the noise that samples back to them. One interface, a file a method, its paper on top.

ddim                DDIM inversion under the prompt; sampled back at guidance 1 unless told otherwise
ddim-without-text   the same under the empty prompt
negative-prompt     DDIM inversion whose source embedding then stands in for the unconditional one
null-text           DDIM inversion, then an unconditional embedding a step fitted so that guided sampling follows it
direct              DDIM inversion whose latents are stored, and steered back to on the way
fixed-point         each step solved for the latent that sampling would meet, by iteration
spdinv              the same by gradient descent
easyinv             DDIM inversion that leans on the latent before
edict, belm         exact: samplers that are undone algebraically

"auto" takes the one that `choose` finds for a number of evaluations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from smooth_rt.calls import one_call
from smooth_rt.errors import InputError
from smooth_rt.images import ImageLike, Images, OutputType, as_list, read
from smooth_rt.ranges import check, choice, shown
from smooth_rt.tasks import checks
from smooth_rt.tasks.inversion import (
    belm,
    ddim,
    direct,
    easyinv,
    edict,
    fixed_point,
    negative_prompt,
    null_text,
    spdinv,
)
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise, between, guided_back
from smooth_rt.tasks.inversion.choosing import Chosen, choose
from smooth_rt.tasks.inversion.kept import Watched, image_names

if TYPE_CHECKING:
    from smooth_rt.loop import StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = [
    "METHODS",
    "Chosen",
    "Evaluations",
    "Inversion",
    "Method",
    "Noise",
    "between",
    "choose",
    "invert",
    "source_texts",
]

LOG = logging.getLogger("smooth_rt")

STEPS = 50

METHODS: dict[str, Method] = {
    "ddim": ddim.METHOD,
    "ddim-without-text": ddim.WITHOUT_TEXT,
    "negative-prompt": negative_prompt.METHOD,
    "null-text": null_text.METHOD,
    "direct": direct.METHOD,
    "fixed-point": fixed_point.METHOD,
    "spdinv": spdinv.METHOD,
    "easyinv": easyinv.METHOD,
    "edict": edict.METHOD,
    "belm": belm.METHOD,
}


@dataclass(frozen=True, kw_only=True)
class Inversion(Noise):
    """N images turned to noise, and all that is needed to sample from it: see `Noise`.

    `trajectory` is None unless asked for.

    Args:
        images: the reconstructions, in the `output_type` asked for; an empty list where `reconstruct=False`.
        image_latents: x_0, the VAE's encoding of the images [N, C, H/f, W/f].
        final_latents: x_0 of the reconstructions; None where `reconstruct=False`.
        guidance_scale: the scale of the reconstruction.
        method: the name of the method that was used.
    """

    images: Images
    image_latents: Tensor
    final_latents: Tensor | None
    guidance_scale: float
    method: str


def source_texts(method: str, prompts: str | Sequence[str] | None, count: int, name: str = "prompts") -> list[str]:
    """The texts that so many images are inverted under.

    Args:
        name: what errors call the prompts.

    Raises:
        InputError: an unknown method, one that needs prompts without them, or a number of them that does not fit.
    """
    if not METHODS[choice("method", method, tuple(METHODS))].with_text:
        return [""] * count
    if prompts is None:
        raise InputError(f"{name}: method {method!r} needs one for each image; give it, or use ddim-without-text")
    return checks.one_each(prompts, count, name, "images")


@one_call
def invert(
    pipe: SmoothPipeline,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str] | None = None,
    *,
    method: str = "ddim",
    budget: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    reconstruct: bool = True,
    return_trajectory: bool = False,
    shared: bool = False,
    early_stop: bool = True,
    keep: bool = True,
    output_type: OutputType = "pil",
    callback_on_step_end: StepCallback | None = None,
) -> Inversion:
    """Turn images into noise and sample them back. All images go through each network together.

    Args:
        images: one or N images: path, PIL, numpy [H, W, 3] or torch [3, H, W] in 0..1, or a batch of 4 axes.
            They may differ in size: each is scaled and centre-cropped to `height` x `width`.
        prompts: what the images show; one for all or one each. "ddim-without-text" needs none and uses none.
        method: a name of `METHODS`, or "auto": method and steps are those that `choose` finds; logged.
        budget: for "auto": the most evaluations of the UNet an image, there and back; of gradients, on average.
        height: pixels, a multiple of `dims.image_multiple`; None: the model's size.
        width: as `height`.
        num_inference_steps: steps there, and as many back. None: 50, or what "auto" picks.
        guidance_scale: of the way back; "fixed-point", "edict" and "belm" invert at it too, the others at 1. None: the
            method's own.
        reconstruct: False skips the way back.
        return_trajectory: keep the latents of every inversion step.
        shared: "null-text" fits one list of embeddings to all images together, as a morph between them wants it.
        early_stop: False has "null-text" and "spdinv" fit every step in all of their rounds.
        keep: what takes long ("null-text", "spdinv") is kept in the cache, and taken from there: a stopped one goes on.
            What a callback changed is not kept.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: as in `generate`, for the steps there and then for those back. "edict" and "belm" walk
            with two latents an image, stacked [2N, C, h, w].

    Raises:
        InputError: an argument is out of its range, an image cannot be read, or the numbers differ.
        EngineError: a network failed, or latents or a loss stopped being finite (the step is named), or the method
            needs gradients that cannot be had.
    """
    method = choice("method", method, (*METHODS, "auto"))
    if method == "auto":
        if num_inference_steps is not None:
            raise InputError(
                f"num_inference_steps={shown(num_inference_steps)}: method 'auto' picks them by budget; leave it out"
            )
        picked = choose(budget, guidance_scale)
        method, num_inference_steps = picked.method, picked.num_inference_steps
        LOG.info("inversion: %s", picked.reason)
    elif budget is not None:
        raise InputError(f"budget={shown(budget)}: it is for method 'auto', which picks by it; leave one of them out")
    chosen = METHODS[method]
    check(output_type=output_type, callback_on_step_end=callback_on_step_end)
    (scale,) = check(guidance_scale=chosen.guidance_scale if guidance_scale is None else guidance_scale)
    schedule = pipe.schedule(STEPS if num_inference_steps is None else num_inference_steps)
    height, width = pipe.image_size(height, width)
    found = as_list(images)
    texts = source_texts(method, prompts, len(found))
    if shared and method != "null-text":
        raise InputError(f"shared: method {method!r} fits nothing that images share; use null-text")
    if not early_stop and not chosen.wrt:
        raise InputError(f"early_stop: method {method!r} fits nothing by rounds; leave it out")
    pixels = read(found, height, width)
    names = image_names(pixels, texts) if keep and pipe.digests else ()
    image_latents = pipe.encode_image(pixels, height, width)
    watched = Watched(callback_on_step_end)
    job = Job(pipe, image_latents, pipe.encode_prompt(texts), schedule, scale, watched, shared, early_stop, names)
    noise = chosen.invert(job)
    images_back: Images = []
    final = None
    if reconstruct:
        predict = guided_back(pipe, noise, scale)
        final = chosen.sample(pipe, noise, schedule, predict, callback_on_step_end)
        images_back = pipe.decode(final, output_type)
    return Inversion(
        latents=noise.latents,
        prompt_embeds=noise.prompt_embeds,
        negative_prompt_embeds=noise.negative_prompt_embeds,
        companion=noise.companion,
        corrections=noise.corrections,
        trajectory=noise.trajectory if return_trajectory else None,
        images=images_back,
        image_latents=image_latents,
        final_latents=final,
        guidance_scale=scale,
        method=method,
    )
