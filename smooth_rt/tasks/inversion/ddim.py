"""DDIM inversion: Song et al. 2021, arXiv 2010.02502 (section 4.3), used for editing by Dhariwal & Nichol 2021.

The sampler's steps are walked backwards at guidance 1. The noise on the way from level i - 1 to level i is predicted
at (x_{i-1}, t_i), as in the `ddim_loop` of null-text inversion (Mokady et al. 2023, arXiv 2211.09794). Sampling meets
(x_i, t_i) instead; that difference is the error of the method, and it shrinks with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from smooth_rt.schedule import Schedule

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline, StepCallback

__all__ = ["NegativeEmbeds", "invert_latents", "negative_embeds"]

NegativeEmbeds = Callable[["SmoothPipeline", Tensor], Tensor]


def negative_embeds(pipe: SmoothPipeline, prompt_embeds: Tensor) -> Tensor:
    """The empty prompt, once an image: [N, L, D] for `prompt_embeds` [N, L, D]."""
    return pipe.encode_prompt([""] * len(prompt_embeds))


def invert_latents(
    pipe: SmoothPipeline,
    latents: Tensor,
    prompt_embeds: Tensor,
    schedule: Schedule,
    keep_all: bool = False,
    callback_on_step_end: StepCallback | None = None,
) -> list[Tensor]:
    """From x_0 to x_T at guidance 1.

    Args:
        latents: x_0 [N, C, h, w].
        prompt_embeds: [N, L, D].
        keep_all: return the latents of every level, not x_T alone.

    Returns:
        Latents [N, C, h, w], the last of them x_T.
    """

    def predict(latents: Tensor, _: int, timestep: int) -> Tensor:
        return pipe.predict(latents, timestep, prompt_embeds)

    levels: list[Tensor] | None = [] if keep_all else None
    final = pipe.denoise(latents, schedule.inverse_steps, predict, callback_on_step_end, levels)
    return levels or [final]
