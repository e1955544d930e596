"""Negative-prompt inversion: Miyake et al. 2023, arXiv 2305.16807.

Null-text inversion optimises an unconditional embedding at every step until sampling at guidance w follows the path
of DDIM inversion. The paper shows that the optimum lies near the embedding of the source prompt itself, so that one
takes its place and nothing is optimised: with it, uncond + w * (cond - uncond) is cond for the source prompt, and
every guidance scale rebuilds the image as well as DDIM does at 1. With another prompt, guidance moves away from the
source.

Evaluations in T steps: T there, T back.
"""

from __future__ import annotations

from dataclasses import replace

from smooth_rt.tasks.inversion import ddim
from smooth_rt.tasks.inversion.base import Evaluations, Job, Method, Noise

__all__ = ["METHOD"]


def _invert(job: Job) -> Noise:
    return replace(ddim.METHOD.invert(job), negative_prompt_embeds=job.prompt_embeds)


METHOD = Method(_invert, lambda steps, _: Evaluations(steps, steps), guidance_scale=7.5)
