"""Real runs of a model: what int8 is calibrated on, and judged by.

A quantiser sees the values that pass through a network and sets its scales by them. Noise that was merely drawn would
show it neither the text that steers nor how values shrink and grow from timestep 999 to 0, so images are sampled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from engines.contract import NETWORKS, Network, NetworkName, contract
from engines.eager import EagerEngine, torch_networks
from engines.recipes import RECIPES
from engines.select import open_engine
from smooth_rt.evaluation.inputs import read_prompts

if TYPE_CHECKING:
    from torch import nn

    from engines.base import Engine
    from smooth_rt.model import Model

__all__ = ["IMAGES", "STEPS", "Trajectories", "read_prompts", "spread"]

LOG = logging.getLogger("smooth_rt")

IMAGES = 32
FEW_IMAGES = 6  # of a model so large that 32 would take hours on a CPU
LARGE = 200_000_000  # parameters of the UNet
STEPS = 16
GUIDANCE = 7.5
SEED = 20240617
SAY_EVERY = 30.0  # seconds between lines about the sampling


class Trajectories:
    """Images that the model itself samples, without any engine, and the inputs of each network meanwhile.

    Args:
        model: fused as the engines will be.
        prompts: of the images; none stands for those that ship. Each image takes the next, around and around.
        images: how many are sampled; None stands for 32, or 6 of a large model. A median over fewer is hardly one: on
            the default model that of 8 was 32 dB where that of 32 was 27.
        steps: of each; all their timesteps are kept, for both halves of guidance.

    Attributes: `prompts`, one an image.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str] = (),
        images: int | None = None,
        steps: int = STEPS,
    ) -> None:
        self._model = model
        self.prompts = spread(prompts, model, images)
        self._steps = steps
        self._seen: dict[NetworkName, list[dict[str, Tensor]]] = {}
        self._wanted = torch.empty(0, dtype=torch.float32)

    def samples(self, network: NetworkName) -> list[dict[str, Tensor]]:
        """The inputs of `network`, one row each, in an order that mixes images and timesteps."""
        if not self._seen:
            self._sample()
        seen = self._seen[network]
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(SEED)).tolist()
        return [seen[index] for index in order]

    def psnr(self, network: Network, graph: Path, backend: str) -> float:
        """The median PSNR in dB, over the images, of those sampled with `graph` in the place of `network`."""
        if not self._seen:
            self._sample()
        hint = RECIPES[backend]["int8"][network.name].hint
        with open_engine(backend, network, graph, hint) as engine:
            images = self._images({**self._engines(lambda _: lambda _: None), network.name: engine})
        error = (images - self._wanted).square().flatten(1).mean(dim=1)
        return float((-10 * error.clamp(min=1e-12).log10()).median())

    def _engines(self, hear: Callable[[NetworkName], Callable[[dict[str, Tensor]], None]]) -> dict[NetworkName, Engine]:
        model = self._model
        networks = torch_networks(model.text_encoder, model.unet, model.vae)
        return {name: _Listening(contract(name, model.dims), networks[name], hear(name)) for name in NETWORKS}

    def _sample(self) -> None:
        self._seen = {name: [] for name in NETWORKS}
        engines = self._engines(lambda name: self._seen[name].append)
        LOG.info("calibration: sampling %d images in %d steps", len(self.prompts), self._steps)
        self._wanted = self._images(engines)

    def _images(self, engines: Mapping[NetworkName, Engine]) -> Tensor:
        from smooth_rt.pipeline import SmoothPipeline

        model = self._model
        size = model.dims.supported_image_size
        pipe = SmoothPipeline(engines, model.config(), model.dims, source=model.source, size=size)
        seeds = [torch.Generator().manual_seed(SEED + index) for index in range(len(self.prompts))]
        told, done = time.monotonic(), 0

        def tell(*_: Any) -> None:
            nonlocal told, done
            done += 1
            if time.monotonic() - told >= SAY_EVERY:
                told = time.monotonic()
                LOG.info("calibration: %d steps of sampling are done", done)

        made = pipe(
            self.prompts,
            num_inference_steps=self._steps,
            guidance_scale=GUIDANCE,
            generator=seeds,
            output_type="pt",
            callback_on_step_end=tell,
        ).images
        return torch.as_tensor(made)


def spread(prompts: Sequence[str], model: Model, images: int | None = None) -> list[str]:
    """The prompt of each image that is sampled; of the prompts of an earlier `spread`, the same ones.

    Args:
        prompts: none stands for those that ship. Neighbours may be alike, so the images are spread over all of them.
        model: of which so many images are sampled.
        images: how many, if not as many as of such a model.
    """
    among = list(prompts) or read_prompts()
    large = sum(parameter.numel() for parameter in model.unet.parameters()) > LARGE
    count = images or (FEW_IMAGES if large else IMAGES)
    return [among[index * len(among) // count % len(among)] for index in range(count)]


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
