"""What a training step is made of: pictures as latents, their text, and every random draw, sample by sample.

Each draw is keyed by the seed and the sample's number in the whole run, so a step is the same step however many
processes share it and in however many parts it is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smooth_rt.training.draws import keyed_generator
from smooth_rt.training.encoded import Encode
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.world import World

__all__ = ["Batches", "Rows"]


@dataclass(frozen=True)
class Rows:
    """This process's share of a part of a step, R samples.

    Attributes:
        places: their numbers within the step, 0 to batch_size - 1.
        latents: x0, [R, C, h, w], scaled as the UNet wants them.
        context, empty: embeddings of the captions (some dropped) and of the empty prompt, [R, L, D].
        timesteps: [R], of the training schedule.
        noise: epsilon, as the latents; direction: y of SVR, divided by sqrt(C h w).
        names: of the pictures.
    """

    places: range
    latents: Tensor
    context: Tensor
    empty: Tensor
    timesteps: Tensor
    noise: Tensor
    direction: Tensor
    names: list[str]


class Batches:
    """Draws the rows of steps.

    Args:
        encode: gives picture number `index` of a stream.
        empty: the embedding of the empty prompt, [L, D].
        timesteps: how many the training schedule has.
        dtype: of the UNet's weights.
        scaling_factor: of the VAE.
    """

    def __init__(
        self,
        encode: Encode,
        empty: Tensor,
        config: SmoothLoraConfig,
        timesteps: int,
        dtype: torch.dtype,
        scaling_factor: float,
        world: World,
    ) -> None:
        self.encode, self.empty, self.config, self.timesteps = encode, empty, config, timesteps
        self.dtype, self.scaling_factor, self.world = dtype, scaling_factor, world
        self._drawn: tuple[str, int] | None = None
        self._names: list[str] = []

    def part(self, stream: str, step: int, part: int) -> Rows:
        """This process's share of part number `part` of a step, of `accumulate` parts."""
        config = self.config
        each = config.batch_size // config.accumulate
        places = self.world.share(range(part * each, (part + 1) * each))
        rows = self.rows(stream, step, places)
        if (stream, step) != self._drawn:
            self._drawn, self._names = (stream, step), []
        self._names += rows.names
        return rows

    def rows(self, stream: str, step: int, places: range) -> Rows:
        """The samples of a step at some places of it."""
        config = self.config
        pictures, contexts, timesteps = [], [], []
        latents, noises, directions = [], [], []
        for place in places:
            number = step * config.batch_size + place
            picture = self.encode(stream, number)
            shape = picture.mean.shape
            generator = keyed_generator(config.seed, stream, number)
            latents.append(picture.mean + picture.std * torch.randn(shape, generator=generator, dtype=torch.float32))
            noises.append(torch.randn(shape, generator=generator, dtype=torch.float32))
            directions.append(
                torch.randn(shape, generator=generator, dtype=torch.float32) / picture.mean.numel() ** 0.5
            )
            dropped = torch.rand((), generator=generator, dtype=torch.float32).item() < config.drop_prompt
            contexts.append(self.empty if dropped else picture.context)
            timesteps.append(int(torch.randint(self.timesteps, (), generator=generator)))
            pictures.append(picture)
        return Rows(
            places=places,
            latents=self._there(latents) * self.scaling_factor,
            context=self._there(contexts),
            empty=self._there([self.empty] * len(places)),
            timesteps=torch.tensor(timesteps, device=self.world.device),
            noise=self._there(noises),
            direction=self._there(directions),
            names=[picture.name for picture in pictures],
        )

    def _there(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(self.world.device, self.dtype)

    def names(self, stream: str, step: int) -> list[str]:
        """The names of the pictures of this process's share of a step, as far as it was drawn; of the latest alone."""
        return self._names if (stream, step) == self._drawn else []
