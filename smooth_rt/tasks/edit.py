"""Editing a real image by prompt.

eq15     Smooth Diffusion (arXiv 2312.04410), Eq. 15: the image is inverted under its source prompt, then sampled
         under the source prompt while i < (1 - r) * steps and under the target prompt after that. r is the edit
         strength. The noise and what guidance moves away from are those of an inversion method.
sdedit   Meng et al. 2022, arXiv 2108.01073: noise is added up to a strength and removed under the target prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Generator, Tensor

from smooth_rt.calls import one_call
from smooth_rt.errors import InputError
from smooth_rt.images import ImageLike, Images, OutputType, as_list
from smooth_rt.ranges import check, choice
from smooth_rt.schedule import add_noise
from smooth_rt.tasks import checks
from smooth_rt.tasks.generate import guided
from smooth_rt.tasks.inversion import METHODS, invert
from smooth_rt.tasks.inversion.base import guided_back

if TYPE_CHECKING:
    from smooth_rt.loop import StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["Edit", "edit"]


@dataclass(frozen=True)
class Edit:
    """Args:
    images: the N edited images in the `output_type` asked for.
    latents: their final latents x_0 [N, C, H/f, W/f].
    """

    images: Images
    latents: Tensor


@one_call
def edit(
    pipe: SmoothPipeline,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str],
    source_prompts: str | Sequence[str] | None = None,
    *,
    edit_method: str = "eq15",
    edit_strength: float = 0.8,
    method: str = "negative-prompt",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompts: str | Sequence[str] | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    keep: bool = True,
    output_type: OutputType = "pil",
    callback_on_step_end: StepCallback | None = None,
) -> Edit:
    """Edit images towards prompts. All images go through each network together.

    Args:
        images: one or N images, as in `invert`.
        prompts: what the images shall show; one for all or one each.
        source_prompts: what they show now; "eq15" needs them, "sdedit" takes none.
        edit_method: "eq15" or "sdedit".
        edit_strength: 0..1: the share of the steps taken under the target prompt. 0 gives the reconstruction.
        method: how "eq15" inverts, as in `invert`; all but "ddim-without-text", for it follows the source prompt.
        height: pixels, a multiple of `dims.image_multiple`; None: the model's size.
        width: as `height`.
        num_inference_steps: DDIM steps of the whole schedule; "eq15" walks it twice, "sdedit" takes a share of it.
        guidance_scale: w in `uncond + w * (cond - uncond)`, finite.
        negative_prompts: what "sdedit" moves away from; "eq15" takes none, for the inversion brings its own.
        generator: the noise of "sdedit", as in `generate`.
        keep: as in `invert`.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: as in `generate`, for every step taken.

    Raises:
        InputError: an argument is out of its range, an image cannot be read, or the numbers differ.
        EngineError: a network failed, or the latents stopped being finite (the step is named).
    """
    check(output_type=output_type, callback_on_step_end=callback_on_step_end)
    edit_method, edit_strength, guidance_scale = check(
        edit_method=edit_method, edit_strength=edit_strength, guidance_scale=guidance_scale
    )
    method = choice("method", method, tuple(METHODS))
    if prompts is None:
        raise InputError("prompts: missing; give what the images shall show")
    schedule = pipe.schedule(num_inference_steps)
    height, width = pipe.image_size(height, width)
    found = as_list(images)
    targets = checks.one_each(prompts, len(found), "prompts", "images")
    if edit_method == "sdedit":
        if source_prompts is not None:
            raise InputError("source_prompts: sdedit does not use them; leave them out, or use eq15")
        noise = pipe.draw_noise(len(found), height, width, generator)
        uncond = pipe.encode_prompt(checks.one_each(negative_prompts, len(found), "negative_prompts", "images"))
        # As in diffusers' image-to-image pipeline; the level is that from which the first step taken starts.
        taken = schedule.steps[len(schedule.steps) - int(len(schedule.steps) * edit_strength) :]
        latents = pipe.encode_image(found, height, width)
        if taken:
            latents = add_noise(latents, noise, taken[0].alpha_from)
        predict = guided(pipe, pipe.encode_prompt(targets), uncond, guidance_scale)
        final = pipe.denoise(latents, taken, predict, callback_on_step_end)
        return Edit(pipe.decode(final, output_type), final)

    if source_prompts is None:
        raise InputError("source_prompts: eq15 needs what each image shows now; give one for each image")
    if not METHODS[method].with_text:
        raise InputError(f"method={method!r}: eq15 follows the source prompt, which it inverts without; use ddim")
    if negative_prompts is not None:
        raise InputError("negative_prompts: eq15 takes what the inversion brings; leave them out, or use sdedit")
    inverted = invert(
        pipe, found, source_prompts, method=method, height=height, width=width,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, reconstruct=False, keep=keep,
        callback_on_step_end=callback_on_step_end,
    )  # fmt: skip
    before = guided_back(pipe, inverted, guidance_scale)
    after = guided_back(pipe, replace(inverted, prompt_embeds=pipe.encode_prompt(targets)), guidance_scale)
    # (1 - 0.7) * 50 is a hair above 15 in floating point, and would move the switch by a step.
    switch = round((1 - edit_strength) * len(schedule.steps), 6)

    def predict_eq15(latents: Tensor, index: int, timestep: int) -> Tensor:
        return (before if index < switch else after)(latents, index, timestep)

    sample = METHODS[inverted.method].sample
    final = sample(pipe, inverted, schedule, predict_eq15, callback_on_step_end, switch)
    return Edit(pipe.decode(final, output_type), final)
