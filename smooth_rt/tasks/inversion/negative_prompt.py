"""Negative-prompt inversion: Miyake et al. 2023, arXiv 2305.16807.

Null-text inversion optimises an unconditional embedding at every step until sampling at guidance w follows the path
of DDIM inversion. The paper shows that the optimum lies near the embedding of the source prompt itself, so that one
takes its place and nothing is optimised: with it, uncond + w * (cond - uncond) is cond for the source prompt, and
every guidance scale rebuilds the image as well as DDIM does at 1. With another prompt, guidance moves away from the
source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["negative_embeds"]


def negative_embeds(_: SmoothPipeline, prompt_embeds: Tensor) -> Tensor:
    """The source embedding in the place of the unconditional one."""
    return prompt_embeds
