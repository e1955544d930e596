"""What a training step is made of: pictures as latents, their text, and every random draw, sample by sample.

Each draw is keyed by the seed and the sample's number in the whole run, so a step is the same step however many
processes share it and in however many parts it is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smooth_rt.model import Model
from smooth_rt.training.captioned import Pictures
from smooth_rt.training.draws import keyed_generator
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
        timesteps: how many the training schedule has.
    """

    def __init__(
        self, model: Model, pictures: Pictures, config: SmoothLoraConfig, timesteps: int, world: World
    ) -> None:
        self.pictures, self.config, self.timesteps, self.world = pictures, config, timesteps, world
        self.vae = model.vae
        self.dtype = next(model.unet.parameters()).dtype
        self._encode = _TextCache(model)

    def part(self, stream: str, step: int, part: int) -> Rows:
        """This process's share of part number `part` of a step, of `accumulate` parts."""
        config = self.config
        each = config.batch_size // config.accumulate
        places = self.world.share(range(part * each, (part + 1) * each))
        return self.rows(stream, step, places)

    def rows(self, stream: str, step: int, places: range) -> Rows:
        """The samples of a step at some places of it."""
        config, device = self.config, self.world.device
        numbers = [step * config.batch_size + place for place in places]
        pictures = [self.pictures.draw(stream, number) for number in numbers]
        images = torch.stack([torch.from_numpy(picture.image.copy()) for picture in pictures]).to(device)
        with torch.no_grad():
            posterior = self.vae.encode(images.permute(0, 3, 1, 2).to(self.vae.dtype).div(127.5).sub(1)).latent_dist
        mean, std = posterior.mean.to(self.dtype), posterior.std.to(self.dtype)
        shape = mean.shape[1:]
        latent, noise, direction = (torch.empty(mean.shape) for _ in range(3))
        dropped, timesteps = [], []
        for row, number in enumerate(numbers):
            generator = keyed_generator(config.seed, stream, number)
            latent[row] = torch.randn(shape, generator=generator)
            noise[row] = torch.randn(shape, generator=generator)
            direction[row] = torch.randn(shape, generator=generator) / mean[0].numel() ** 0.5
            dropped.append(torch.rand((), generator=generator).item() < config.drop_prompt)
            timesteps.append(int(torch.randint(self.timesteps, (), generator=generator)))
        captions = ["" if drop else picture.caption for drop, picture in zip(dropped, pictures, strict=True)]
        return Rows(
            places=places,
            latents=(mean + std * latent.to(device, self.dtype)) * self.vae.config.scaling_factor,
            context=self._encode(captions).to(device, self.dtype),
            empty=self._encode([""] * len(captions)).to(device, self.dtype),
            timesteps=torch.tensor(timesteps, device=device),
            noise=noise.to(device, self.dtype),
            direction=direction.to(device, self.dtype),
            names=[picture.name for picture in pictures],
        )

    def names(self, stream: str, step: int) -> list[str]:
        """The names of the pictures of this process's share of a step."""
        parts = (self.part(stream, step, part) for part in range(self.config.accumulate))
        return [name for rows in parts for name in rows.names]


class _TextCache:
    """Prompt to embedding [L, D], each prompt encoded once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[str, Tensor] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        device = next(self.model.text_encoder.parameters()).device
        for caption in dict.fromkeys(captions):
            if caption not in self.known:
                tokens = self.model.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
                with torch.no_grad():
                    encoded = self.model.text_encoder(tokens.input_ids.to(device)).last_hidden_state
                self.known[caption] = encoded[0].cpu()
        return torch.stack([self.known[caption] for caption in captions])
