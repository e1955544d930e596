"""Measure a pipeline: how smooth its latent space is (ISTD, with diversity beside it), and how well it inverts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from smooth_rt.errors import InputError, reason
from smooth_rt.images import read
from smooth_rt.metrics.istd import Istd, diversity, istd
from smooth_rt.metrics.reconstruction import Reconstruction, reconstruction
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import check, check_images, seeds_from
from smooth_rt.tasks.interpolate import slerp

__all__ = [
    "Example",
    "Smoothness",
    "captioned",
    "check_istd",
    "examples",
    "measure_inversion",
    "measure_istd",
    "read_prompts",
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Example:
    """A real image and what it shows."""

    path: Path
    caption: str

    def image(self) -> Image.Image:
        with Image.open(self.path) as file:
            return file.convert("RGB")


@dataclass(frozen=True)
class Smoothness:
    """ISTD over the prompts, and the mean pixel distance between the two ends of each: images of independent noises."""

    istd: Istd
    diversity: float


def examples() -> list[Example]:
    """The images that ship with the default model; it was not trained on these pairs of object and background."""
    return captioned(Path(str(resources.files("smooth_rt"))) / "assets" / "examples")


def captioned(folder: Path) -> list[Example]:
    """The captioned images of a folder: metadata.jsonl with `file_name` and `text`, or a .txt beside each image.

    Raises:
        InputError: no captioned image is there.
    """
    from smooth_rt.training.pictures.folder import captions_of

    found = [Example(path, caption) for path, caption in captions_of(folder)]
    for example in found:
        try:
            example.path.stat()
        except OSError as error:
            raise InputError(f"{example.path}: {reason(error)}; mend or remove it") from error
    return found


def read_prompts(path: Path | None = None) -> list[str]:
    """One prompt a line, empty lines left out; None: the prompts that ship with the default model.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    path = Path(str(resources.files("smooth_rt"))) / "assets" / "prompts.txt" if path is None else path
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file; give one prompt a line") from error
    if not prompts:
        raise InputError(f"{path}: holds no prompt; give one a line")
    return prompts


def check_istd(prompts: int, frames: int, seed: int, prompts_per_batch: int) -> None:
    """Whether `measure_istd` can be asked for so much, asked before a model is loaded.

    Raises:
        InputError: no prompt, a number out of its range, more images in a batch than MOST_IMAGES, or a seed that does
            not fit into 64 bits.
    """
    if prompts < 1:
        raise InputError("prompts=0: give at least 1")
    check(frames=frames, batch=prompts_per_batch)
    check_images("frames", frames, min(prompts, prompts_per_batch), "prompts in a batch")
    seeds_from(seed, 2 * prompts)


def measure_istd(
    pipe: SmoothPipeline,
    prompts: Sequence[str],
    *,
    frames: int = 11,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    prompts_per_batch: int = 4,
    progress: Progress | None = None,
    look: Callable[[NDArray[np.float32]], None] | None = None,
) -> Smoothness:
    """ISTD as in Smooth Diffusion (arXiv 2312.04410): for each prompt, slerp between two noises, `frames` images.

    The noises of prompt i are drawn from seeds `seed + 2 i` and `seed + 2 i + 1`, on the CPU: the same for every model
    and engine, whatever the batch.

    Args:
        prompts: N of them.
        frames: images a prompt with both ends, at least 2; the paper has 11.
        prompts_per_batch: prompts sampled together, with at most MOST_IMAGES frames in all.
        progress: called with prompts done and in all.
        look: called with the frames [F, H, W, 3] of each prompt, in 0..1.

    Raises:
        InputError: no prompt, or an option out of its range.
    """
    check_istd(len(prompts), frames, seed, prompts_per_batch)
    alphas = [i / (frames - 1) for i in range(frames)]
    found: list[NDArray[np.float32]] = []
    for first in range(0, len(prompts), prompts_per_batch):
        batch = list(prompts[first : first + prompts_per_batch])
        paths = []
        for i in range(first, first + len(batch)):
            pair = [torch.Generator().manual_seed(seed + 2 * i + end) for end in (0, 1)]
            start, end = pipe.draw_noise(2, height, width, pair)
            paths.append(torch.stack([slerp(start, end, alpha) for alpha in alphas]))
        images = pipe(
            [prompt for prompt in batch for _ in alphas],
            latents=torch.cat(paths),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        ).images
        parts = np.split(cast("NDArray[np.float32]", images), len(batch))
        found += parts
        if look is not None:
            for part in parts:
                look(part)
        if progress is not None:
            progress(first + len(batch), len(prompts))
    return Smoothness(istd(found), diversity([path[[0, -1]] for path in found]))


def measure_inversion(
    pipe: SmoothPipeline,
    images: Sequence[Example],
    *,
    method: str = "ddim",
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    images_per_batch: int = 16,
    progress: Progress | None = None,
) -> tuple[list[Reconstruction], list[Reconstruction]]:
    """Invert and rebuild each image; the distances of each to its original.

    Returns:
        The reconstructions, and the VAE's own bound: encode and decode alone.

    Raises:
        InputError: no image, or an option out of its range.
    """
    if not images:
        raise InputError("images=0: give at least 1")
    check(batch=images_per_batch)
    rebuilt: list[Reconstruction] = []
    bound: list[Reconstruction] = []
    for first in range(0, len(images), images_per_batch):
        batch = images[first : first + images_per_batch]
        pictures = [example.path for example in batch]
        made = pipe.invert(
            pictures,
            [example.caption for example in batch],
            method=method,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        )
        back = cast("NDArray[np.float32]", made.images)
        alone = cast("NDArray[np.float32]", pipe.decode(made.image_latents, "np"))
        originals: Any = read(pictures, *back.shape[1:3]).permute(0, 2, 3, 1).numpy()
        rebuilt += [reconstruction(a, b) for a, b in zip(originals, back, strict=True)]
        bound += [reconstruction(a, b) for a, b in zip(originals, alone, strict=True)]
        if progress is not None:
            progress(first + len(batch), len(images))
    return rebuilt, bound
