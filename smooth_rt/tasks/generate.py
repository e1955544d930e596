"""Text to image: DDIM sampling with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor

from smooth_rt.calls import one_call
from smooth_rt.errors import InputError
from smooth_rt.images import Images, OutputType
from smooth_rt.ranges import check, check_images
from smooth_rt.tasks import checks

if TYPE_CHECKING:
    from smooth_rt.loop import Predict, StepCallback
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["Generation", "embed_pair", "generate", "guided"]


@dataclass(frozen=True)
class Generation:
    """Args:
    images: N images in the `output_type` asked for.
    latents: the final latents x0 [N, C, H/f, W/f].
    """

    images: Images
    latents: Tensor


@one_call
def generate(
    pipe: SmoothPipeline,
    prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    generator: Generator | Sequence[Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: OutputType = "pil",
    callback_on_step_end: StepCallback | None = None,
) -> Generation:
    """Images from prompts. The arguments are those of diffusers' StableDiffusionPipeline.

    With DDIM and the same latents the images are those of diffusers. One difference: guidance is left out at a scale
    of exactly 1; below 1 its formula holds, where diffusers leaves it out too.

    Args:
        prompt: one or P prompts; or give `prompt_embeds`.
        height: pixels, a multiple of `dims.image_multiple`; None: the model's size, or that of `latents`.
        width: as `height`.
        num_inference_steps: DDIM steps, 1..num_train_timesteps.
        guidance_scale: w in `uncond + w * (cond - uncond)`, finite.
        negative_prompt: in the place of the empty unconditional prompt; one for all or one each.
        num_images_per_prompt: images a prompt, side by side: N = P * num_images_per_prompt, at most MOST_IMAGES.
        generator: one on the CPU, drawn from image after image, or N of them: each image then equals itself alone.
        latents: the starting noise [N, C, H/f, W/f], float32, in place of `generator`.
        prompt_embeds: [P, L, D], float32.
        negative_prompt_embeds: [P, L, D], float32.
        output_type: "pil", "np" ([N, H, W, 3] in 0..1), "pt" ([N, 3, H, W] in 0..1) or "latent".
        callback_on_step_end: called as `callback(pipe, i, t, {"latents": latents})` after each step; may return a
            dict with other latents to go on from.

    Raises:
        InputError: an argument is out of its range or contradicts another.
        EngineError: a network failed, or the latents stopped being finite (the step is named).
    """
    check(output_type=output_type, callback_on_step_end=callback_on_step_end)
    each, guidance_scale = check(num_images_per_prompt=num_images_per_prompt, guidance_scale=guidance_scale)
    schedule = pipe.schedule(num_inference_steps)
    if latents is None or height is not None or width is not None:
        height, width = pipe.image_size(height, width)
    cond, uncond = embed_pair(pipe, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale)
    check_images("num_images_per_prompt", each, len(cond), "prompts")
    cond, uncond = (embeds.repeat_interleave(each, dim=0) for embeds in (cond, uncond))
    if latents is None:
        noise = pipe.draw_noise(len(cond), height, width, generator)
    else:
        noise = checks.latents(pipe, latents, len(cond), height, width)
    final = pipe.denoise(noise, schedule.steps, guided(pipe, cond, uncond, guidance_scale), callback_on_step_end)
    return Generation(pipe.decode(final, output_type), final)


def embed_pair(
    pipe: SmoothPipeline,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """Text embeddings of the prompts and of what guidance moves away from, each [P, L, D].

    At a guidance scale of 1 the second is never used, and the first stands in for it.

    Raises:
        InputError: a prompt and its embeddings are both given or both missing, or their numbers differ.
    """
    for text, embeds, name in (
        (prompt, prompt_embeds, "prompt"),
        (negative_prompt, negative_prompt_embeds, "negative_prompt"),
    ):
        if text is not None and embeds is not None:
            raise InputError(f"{name}: given together with {name}_embeds; give one of them")
    if prompt_embeds is not None:
        cond = checks.embeds(prompt_embeds, None, pipe.dims, "prompt_embeds")
    elif prompt is not None:
        cond = pipe.encode_prompt(checks.as_prompts(prompt))
    else:
        raise InputError("prompt: missing; give prompt or prompt_embeds")
    if negative_prompt_embeds is not None:
        uncond = checks.embeds(negative_prompt_embeds, len(cond), pipe.dims, "negative_prompt_embeds")
    else:
        texts = checks.one_each(negative_prompt, len(cond), "negative_prompt", "prompts")
        uncond = cond if guidance_scale == 1 else pipe.encode_prompt(texts)
    return cond, uncond


def guided(
    pipe: SmoothPipeline, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, guidance_scale: float
) -> Predict:
    """A prediction for `denoise` that keeps to one prompt an image, at one guidance scale.

    Args:
        prompt_embeds: [N, L, D].
        negative_prompt_embeds: [N, L, D], or one for each step, [steps, N, L, D].
    """

    def predict(latents: Tensor, index: int, timestep: int) -> Tensor:
        negative = negative_prompt_embeds[index] if negative_prompt_embeds.ndim == 4 else negative_prompt_embeds
        return pipe.predict(latents, timestep, prompt_embeds, negative, guidance_scale)

    return predict
