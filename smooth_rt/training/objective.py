"""The loss of a Smooth-LoRA: the diffusion loss, and penalties on uneven variation of one timestep (`svr`, the paper's)
and of whole sampled paths (`paths`).

Every term is a sum over samples divided by the number in the whole step, so what parts and processes find adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from smooth_rt.model import Model
from smooth_rt.schedule import Schedule
from smooth_rt.scheduler_config import read_scheduler
from smooth_rt.training.batches import Rows
from smooth_rt.training.draws import keyed_generator
from smooth_rt.training.paths import draw_path, draw_schedule, guided, measure, sample, unevenness, window
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.svr import VARIATIONS, Target, snr_bins
from smooth_rt.training.world import World

__all__ = ["Objective"]


class Objective:
    """The loss over rows of a step; `target` is the part of it that moves as training goes on."""

    def __init__(self, model: Model, config: SmoothLoraConfig, world: World) -> None:
        scheduler = read_scheduler(model.scheduler_config)
        self.unet: nn.Module = model.unet
        self.config, self.world = config, world
        self.alphas = scheduler.alphas_cumprod.to(world.device, next(self.unet.parameters()).dtype)
        self.prediction_type = scheduler.config.prediction_type
        self.target = Target(config.svr_target, snr_bins(scheduler.alphas_cumprod), config.svr_share)

    def calibrate(self, rows: Rows) -> None:
        """Let the target see rows without a gradient to train on."""
        norms, _ = self._stepwise(rows, regularise=True)
        assert norms is not None
        self.target.update(norms, rows.timesteps, self.world)

    def __call__(self, step: int, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """The rows' share of the step's loss, and its terms."""
        config, whole = self.config, self.config.batch_size
        regularise = config.reg_weight > 0 and step % config.reg_every == 0
        norms, errors = self._stepwise(rows, regularise)
        loss = errors.sum() / whole
        numbers = {"base": loss.item()}
        if norms is not None:
            if config.svr_target != "anchored":
                self.target.update(norms, rows.timesteps, self.world)
            penalty = self.target.penalties(norms, rows.timesteps).sum() / whole
            loss = loss + config.reg_weight * config.reg_every * penalty
            numbers |= {"reg": penalty.item(), "norm": norms.sum().item() / whole}
        if config.path_weight:
            numbers["path"] = 0.0
            # Path p of the step goes with one of its samples, evenly spread: under that caption.
            for path in range(config.paths_per_step):
                place = path * whole // config.paths_per_step
                if place in rows.places:
                    uneven = self._path(rows, rows.places.index(place), step, path) / config.paths_per_step
                    loss = loss + config.path_weight * uneven
                    numbers["path"] += uneven.item()
        return loss, numbers

    def _network(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        with self.world.autocast():
            output: Tensor = self.unet(latents, timesteps, context).sample
        return output.to(latents.dtype)

    def _stepwise(self, rows: Rows, regularise: bool) -> tuple[Tensor | None, Tensor]:
        """The variation [R] at one timestep a sample, where it is asked for, and the mean squared errors [R] from the
        same forward pass."""
        config = self.config
        alpha_bar = self.alphas[rows.timesteps].view(-1, 1, 1, 1)
        goal = _goal(rows.latents, rows.noise, alpha_bar, self.prediction_type)
        if not regularise:
            noisy = alpha_bar.sqrt() * rows.latents + (1 - alpha_bar).sqrt() * rows.noise
            output = self._network(noisy, rows.timesteps, rows.context)
            return None, (output - goal).square().flatten(1).mean(1)
        predict = guided(self._network, rows.context, rows.empty, config.reg_guidance)
        conditional: list[Tensor] = []

        def regularised(noisy: Tensor) -> Tensor:
            found = predict(noisy, rows.timesteps)
            conditional.append(found.conditional)
            return found.output

        norms, _ = VARIATIONS[config.reg_gradient](
            regularised, rows.latents, rows.noise, rows.direction, alpha_bar, self.prediction_type
        )
        return norms, (conditional[0] - goal).square().flatten(1).mean(1)

    def _path(self, rows: Rows, row: int, step: int, path: int) -> Tensor:
        """The unevenness of one path under a row's caption."""
        config = self.config
        number = step * config.paths_per_step + path
        noise = draw_path(config.path_points, rows.noise.shape[1:], keyed_generator(config.seed, "paths", number))
        noise = noise.to(rows.noise)
        # One schedule for all paths of a step: each process draws the same.
        generator = keyed_generator(config.seed, "schedule", step)
        schedule = draw_schedule(self.alphas.cpu(), config.path_steps, self.prediction_type, generator)
        before, within = window(schedule, config.path_window, generator)
        context, empty = (text[row].expand(len(noise), -1, -1) for text in (rows.context, rows.empty))
        predict = guided(self._network, context, empty, config.path_guidance)

        def walk(latents: Tensor, schedule: Schedule) -> Tensor:
            # On a CPU, the math form of attention has the faster backward at the sizes that are trained there.
            if latents.device.type != "cpu":
                return sample(predict, latents, schedule)
            with sdpa_kernel(SDPBackend.MATH):
                return sample(predict, latents, schedule)

        with torch.no_grad():
            start = walk(noise, before)
            self.unet.disable_adapters()  # type: ignore[operator]
            try:
                without_lora = measure(walk(start, within), config.path_points)
            finally:
                self.unet.enable_adapters()  # type: ignore[operator]
        found = measure(walk(start, within), config.path_points)
        share = config.path_share ** (config.path_window / config.path_steps)
        return unevenness(found, without_lora, share, config.path_end_weight)


def _goal(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    return latents
