"""The loop through time, forwards and backwards: both functions are methods of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from smooth_rt.calls import one_call
from smooth_rt.errors import EngineError, InputError
from smooth_rt.ranges import check
from smooth_rt.schedule import Step, ddim_step
from smooth_rt.tasks import checks

if TYPE_CHECKING:
    from smooth_rt.pipeline import SmoothPipeline

__all__ = ["Move", "Predict", "StepCallback", "denoise", "walk"]

# (latents [N, C, h, w], index of the step, timestep) -> the model's output [N, C, h, w]
Predict: TypeAlias = Callable[[Tensor, int, int], Tensor]
# (latents, index of the step, the step) -> the latents after it
Move: TypeAlias = Callable[[Tensor, int, Step], Tensor]
# (pipe, index of the step, timestep, {"latents": ...}) -> None, or a dict with the latents to go on from
StepCallback: TypeAlias = Callable[["SmoothPipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]


@one_call
def denoise(
    pipe: SmoothPipeline,
    latents: Tensor,
    steps: Sequence[Step],
    predict: Predict,
    callback_on_step_end: StepCallback | None = None,
    trajectory: list[Tensor] | None = None,
) -> Tensor:
    """DDIM along `steps`, whichever way they lead.

    Args:
        latents: [N, C, h, w] at the noise level of the first step; those of the last step are returned.
        steps: `Schedule.steps`, a part of them, or `Schedule.inverse_steps`.
        predict: gives the model's output; see `Predict`.
        callback_on_step_end: see `StepCallback`.
        trajectory: takes the latents after each step.

    Raises:
        InputError, EngineError: as `walk`.
    """
    kind = pipe.prediction_type

    def move(latents: Tensor, i: int, step: Step) -> Tensor:
        return ddim_step(latents, predict(latents, i, step.timestep), step.alpha_from, step.alpha_to, kind)

    return pipe.walk(latents, steps, move, callback_on_step_end, trajectory)


@one_call
def walk(
    pipe: SmoothPipeline,
    latents: Tensor,
    steps: Sequence[Step],
    move: Move,
    callback_on_step_end: StepCallback | None = None,
    trajectory: list[Tensor] | None = None,
) -> Tensor:
    """The loop through time.

    Args:
        latents: what the first step starts from; what the last one leaves is returned. A method that walks with two
            latents an image stacks them, [2N, C, h, w].
        steps: one after the other.
        move: takes one step; see `Move`.
        callback_on_step_end: see `StepCallback`.
        trajectory: takes the latents after each step.

    Raises:
        InputError: the callback is no function, or returned what is no dict of latents [N, C, h, w].
        EngineError: the latents stopped being finite; the step is named.
    """
    check(callback_on_step_end=callback_on_step_end)
    for i, step in enumerate(steps):
        latents = move(latents, i, step)
        if not bool(torch.isfinite(latents).all()):
            raise EngineError(
                f"step {i + 1} of {len(steps)} (timestep {step.timestep}): the latents are not finite on "
                f"{pipe.runs_on}; lower guidance_scale, or check the model's weights"
            )
        if callback_on_step_end is not None:
            shape = latents.shape
            latents = checks.answer(callback_on_step_end(pipe, i, step.timestep, {"latents": latents}), latents)
            if latents.shape != shape:
                raise InputError(
                    f"callback_on_step_end: resized the latents to {list(latents.shape)}; keep {list(shape)}"
                )
        if trajectory is not None:
            trajectory.append(latents)
    return latents
