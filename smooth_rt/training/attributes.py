"""The stages of the recipe that make what judges pictures: the classifier of attributes, and reference statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt.metrics.attributes import AttributeNetwork
from smooth_rt.metrics.frechet import fit, vae_features
from smooth_rt.training.data import COLOURS, EmojiScenes, as_tensor, is_held_out
from smooth_rt.training.draws import keyed_generator
from smooth_rt.training.run import Part, Run
from smooth_rt.training.world import World

__all__ = ["train_attributes", "write_reference"]

BATCH = 64
THROUGH_VAE = 16  # of each batch: generated pictures have come through the VAE
JUDGED = 2048  # pictures of held-out pairs, for its accuracy
REFERENCES = 8192


def train_attributes(
    out: Path, vae: AutoencoderKL, scenes: EmojiScenes, seed: int, steps: int, resume: bool, device: torch.device
) -> Path:
    """Train the classifier under `out/attributes` and write `out/attributes.safetensors`, as fp16; returns its path.

    It sees pictures that are blurred, noisy, of shifted colours, or have come through the VAE, since it is to judge
    what a model draws: that may be less clean than real pictures and right all the same.
    """
    torch.manual_seed(seed)
    network = AttributeNetwork(len(scenes), len(COLOURS)).to(device)
    run = Run(
        out / "attributes", {"attributes": network}, steps, 2e-3, {"seed": seed, "data": scenes.identity},
        resume=resume, world=World(device),
    )  # fmt: skip

    def step_fn(step: int) -> Iterator[Part]:
        drawn = [scenes.draw("attributes", step * BATCH + i) for i in range(BATCH)]
        images = as_tensor([one.image for one in drawn]).to(device)
        worn = _worn(_through(vae, images, THROUGH_VAE), keyed_generator(seed, "attributes", step))
        objects, colours = network(worn)
        truth = torch.tensor([[one.obj, one.colour] for one in drawn], device=device)
        loss = F.cross_entropy(objects, truth[:, 0], label_smoothing=0.05) + F.cross_entropy(colours, truth[:, 1])
        right = (objects.argmax(1) == truth[:, 0]).float().mean().item()
        yield loss, {"object": right, "colour": (colours.argmax(1) == truth[:, 1]).float().mean().item()}

    run.fit(step_fn)
    path = out / "attributes.safetensors"
    with run.averaged():
        accuracy = _accuracy(network, vae, scenes, device)
        tensors = {key: value.detach().cpu().half().contiguous() for key, value in network.state_dict().items()}
    metadata = {
        "objects": json.dumps(scenes.captions),
        "colours": json.dumps(COLOURS),
        "accuracy": json.dumps(accuracy),
        "format": "pt",
    }
    save_file(tensors, path, metadata)
    return path


def write_reference(out: Path, vae: AutoencoderKL, scenes: EmojiScenes) -> Path:
    """Write the statistics of real pictures that no training has seen (`metrics.frechet`); returns their path."""
    features = []
    for first in range(0, REFERENCES, 32):
        images = as_tensor([scenes.draw("reference", first + i).image for i in range(32)]).to(vae.device)
        with torch.no_grad():
            features.append(vae_features(vae.encode(images).latent_dist.mean.cpu()))
    found = fit(np.concatenate(features))
    path = out / "reference.safetensors"
    tensors = {"mean": torch.from_numpy(found.mean).float(), "covariance": torch.from_numpy(found.covariance).float()}
    save_file(tensors, path, {"count": str(found.count), "format": "pt"})
    return path


def _through(vae: AutoencoderKL, images: Tensor, count: int) -> Tensor:
    """The pictures, the first `count` of them encoded and decoded."""
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images[:count]).latent_dist.mean).sample.clamp(-1, 1)
    return torch.cat([decoded, images[count:]])


def _worn(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    blurred = F.interpolate(
        F.interpolate(images, (height // 2, width // 2), mode="bilinear", antialias=True), (height, width),
        mode="bilinear",
    )  # fmt: skip

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32).to(images.device)

    much = draw(count, 1, 1, 1).square()
    images = images + much * (blurred - images)
    contrast, shift = 0.8 + 0.5 * draw(count, 1, 1, 1), 0.12 * (draw(count, 3, 1, 1) - 0.5)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32).to(images.device)
    return (images * contrast + shift + 0.15 * draw(count, 1, 1, 1) * noise).clamp(-1, 1)


def _accuracy(
    network: AttributeNetwork, vae: AutoencoderKL, scenes: EmojiScenes, device: torch.device
) -> dict[str, float]:
    """Shares of right answers on held-out pairs that have come through the VAE."""
    rng = np.random.default_rng([scenes.seed, *b"judged"])
    pairs = [(o, c) for o in range(len(scenes)) for c in range(len(COLOURS)) if is_held_out(o, c)]
    right = np.zeros(2)
    for first in range(0, JUDGED, 32):
        chosen = [pairs[int(rng.integers(len(pairs)))] for _ in range(32)]
        drawn = [scenes.draw("judged", first + i, *pair) for i, pair in enumerate(chosen)]
        images = _through(vae, as_tensor([one.image for one in drawn]).to(device), 32)
        with torch.no_grad():
            objects, colours = (logits.argmax(1).cpu().numpy() for logits in network(images))
        truth = np.array(chosen)
        right += [(objects == truth[:, 0]).sum(), (colours == truth[:, 1]).sum()]
    share = right / JUDGED
    return {"object": float(share[0]), "colour": float(share[1])}
