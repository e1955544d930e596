"""The inputs that a model's networks have in real runs: what int8 is calibrated on.

A quantiser sees the values that pass through a network and sets its scales by them. Noise that was merely drawn would
show it neither the text that steers nor how values shrink and grow from timestep 999 to 0, so images are sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from engines.contract import NETWORKS, Network, NetworkName, contract
from engines.eager import EagerEngine, torch_networks
from smooth_rt.evaluation.inputs import read_prompts

if TYPE_CHECKING:
    from torch import nn

    from smooth_rt.model import Model

__all__ = ["IMAGES", "STEPS", "Trajectories", "read_prompts"]

LOG = logging.getLogger("smooth_rt")

IMAGES = 8
STEPS = 16
GUIDANCE = 7.5
SEED = 20240617


class Trajectories:
    """Inputs of each network while images are sampled by the model itself, without any engine.

    Args:
        model: fused as the engines will be.
        prompts: of the images; none stands for those that ship. Each image takes the next, around and around.
        images: how many are sampled.
        steps: of each; all their timesteps are kept, for both halves of guidance.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str] = (),
        images: int = IMAGES,
        steps: int = STEPS,
    ) -> None:
        self._model = model
        self._prompts = list(prompts)
        self._images = images
        self._steps = steps
        self._seen: dict[NetworkName, list[dict[str, Tensor]]] = {}

    def __call__(self, network: NetworkName) -> list[dict[str, Tensor]]:
        """The inputs of `network`, one row each, in an order that mixes images and timesteps."""
        if not self._seen:
            self._sample()
        seen = self._seen[network]
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(SEED)).tolist()
        return [seen[index] for index in order]

    def _sample(self) -> None:
        from smooth_rt.pipeline import SmoothPipeline

        model = self._model
        networks = torch_networks(model.text_encoder, model.unet, model.vae)
        self._seen = {name: [] for name in NETWORKS}
        engines = {
            name: _Listening(contract(name, model.dims), networks[name], self._seen[name].append) for name in NETWORKS
        }
        pipe = SmoothPipeline(engines, model.config(), model.dims, source=model.source)
        prompts = self._prompts or read_prompts()
        # Spread over the list, of which neighbours may be alike.
        chosen = [prompts[index * len(prompts) // self._images % len(prompts)] for index in range(self._images)]
        seeds = [torch.Generator().manual_seed(SEED + index) for index in range(self._images)]
        LOG.info("calibration: sampling %d images in %d steps", self._images, self._steps)
        for prompt, seed in zip(chosen, seeds, strict=True):
            made = pipe(prompt, num_inference_steps=self._steps, guidance_scale=GUIDANCE, generator=seed)
            pipe.encode_image(made.images)


class _Listening(EagerEngine):
    """Hands on each row of its inputs."""

    backend: ClassVar[str] = "eager"

    def __init__(self, network: Network, module: nn.Module, hear: Callable[[dict[str, Tensor]], None]) -> None:
        super().__init__(network, module)
        self._hear = hear

    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        for row in range(len(next(iter(inputs.values())))):
            self._hear({name: tensor[row : row + 1].clone() for name, tensor in inputs.items()})
        return super().infer_impl(inputs, profile)
