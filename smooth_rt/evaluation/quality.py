"""What a model's images are worth: near to real ones, of what the prompt says, different from each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engines.paths import absolute
from smooth_rt.errors import InputError, SmoothRTError, reason
from smooth_rt.evaluation.rows import ASIDE, Progress, in_batches
from smooth_rt.images import read, to_images
from smooth_rt.metrics.attributes import Attributes
from smooth_rt.metrics.frechet import Gaussian, fit, frechet, frechet_intervals, vae_features
from smooth_rt.metrics.pretrained import CLIP, Fid, MissingError, clip_model, clip_score
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.ranges import check, seeds_from

__all__ = ["ByNetworks", "QualityTask", "summarise_quality"]

DRAWS = 2000
BATCH = 32  # images a call of a network that judges them


@dataclass(frozen=True)
class QualityTask:
    """For each prompt, two images of independent noises: item i is prompt i % P, with seeds `seed + 2 i` and the next.

    Args:
        count: of items; twice as many images.
        attributes: judges what is seen; None: nothing is judged.
        pictures: a folder that keeps the images as PNG, in the order of items; None: they are not kept.

    Raises:
        InputError: a number out of its range.
    """

    prompts: tuple[str, ...]
    count: int
    attributes: Attributes | None = field(metadata=ASIDE)
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    prompts_per_batch: int = 16
    pictures: Path | None = field(default=None, metadata=ASIDE)

    def __post_init__(self) -> None:
        if not self.prompts or self.count < 1:
            raise InputError("images=0: give at least 2")
        check(batch=self.prompts_per_batch)
        seeds_from(self.seed, 2 * self.count)
        if self.pictures is not None:
            object.__setattr__(self, "pictures", absolute(self.pictures))

    def batches(self) -> list[list[int]]:
        return in_batches(self.count, self.prompts_per_batch)

    def measure(self, pipe: SmoothPipeline, items: Sequence[int]) -> list[dict[str, Any]]:
        """Features of both images, whether they show object and colour, and the distance between them."""
        captions = [self.prompts[item % len(self.prompts)] for item in items for _ in (0, 1)]
        seeds = [self.seed + 2 * item + k for item in items for k in (0, 1)]
        images = pipe(
            captions,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            output_type="np",
        ).images
        pixels = cast("NDArray[np.float32]", images)
        latents = pipe.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2), self.height, self.width)
        features = vae_features(latents / pipe.scaling_factor)
        judged = self.attributes.judge(pixels, captions) if self.attributes is not None else None
        self._keep(items, pixels)
        rows = []
        for k in range(len(items)):
            pair = slice(2 * k, 2 * k + 2)
            rows.append(
                {
                    "features": features[pair].tolist(),
                    "objects": list(judged.objects[pair]) if judged else [None, None],
                    "colours": list(judged.colours[pair]) if judged else [None, None],
                    "apart": 255 * float(np.linalg.norm(pixels[2 * k] - pixels[2 * k + 1])),
                }
            )
        return rows

    def _keep(self, items: Sequence[int], pixels: NDArray[np.float32]) -> None:
        if self.pictures is None:
            return
        images = cast("list[Image.Image]", to_images(torch.from_numpy(pixels).permute(0, 3, 1, 2), "pil"))
        paths = [path for item in items for path in self._kept(item)]
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for image, path in zip(images, paths, strict=True):
                image.save(path)
        except OSError as error:
            raise SmoothRTError(f"{self.pictures}: cannot be written ({reason(error)}); make room") from error

    def kept(self) -> list[tuple[Path, str]]:
        """The images that were kept, each with its prompt.

        Raises:
            InputError: one is not there any more.
        """
        found = [(path, self.prompts[i % len(self.prompts)]) for i in range(self.count) for path in self._kept(i)]
        for path, _ in found:
            if not path.is_file():
                raise InputError(f"{path}: is gone; remove the file of rows beside its folder to sample it again")
        return found

    def _kept(self, item: int) -> list[Path]:
        assert self.pictures is not None
        return [self.pictures / f"{item:05d}-{k}.png" for k in (0, 1)]


class ByNetworks:
    """FID and CLIP score of the images that a task has kept, where the networks are at hand.

    Args:
        real: real images for FID, scaled and cropped to the size of those that are judged; none: no FID.
        clip: the CLIP model, which must be at hand; None: the usual one, if it is.

    Raises:
        MissingError: `clip` is named and not at hand.
    """

    def __init__(self, real: Sequence[Path], clip: str | None = None) -> None:
        if clip is not None:
            clip_model(clip)
        self.real, self.clip = [absolute(path) for path in real], clip or CLIP
        self.missing: dict[str, None] = {}  # why something was not measured, in order
        self._fid: Fid | None = None

    def of(self, kept: Sequence[tuple[Path, str]], progress: Progress | None = None) -> dict[str, float | None]:
        """`fid` and `clip`; None for what is not at hand."""
        with Image.open(kept[0][0]) as first:
            width, height = first.size
        tell = progress or (lambda *_: None)
        paths = [path for path, _ in kept]
        fid = clip = None
        try:
            if not self.real:
                raise MissingError("FID: real images are missing; name a folder of them with --reference")
            self._fid = self._fid or Fid(_batches(self.real, height, width))
            fid = self._fid.of(_batches(paths, height, width))
        except MissingError as error:
            self.missing[f"Not measured: {error}."] = None
        tell(len(paths), 2 * len(paths))
        try:
            captions = [[caption for _, caption in kept[k : k + BATCH]] for k in range(0, len(kept), BATCH)]
            clip = clip_score(zip(_batches(paths, height, width), captions, strict=True), self.clip)
        except MissingError as error:
            self.missing[f"Not measured: {error}."] = None
        tell(2 * len(paths), 2 * len(paths))
        return {"fid": fid, "clip": clip}


def _batches(paths: Sequence[Path], height: int, width: int) -> Iterator[Tensor]:
    for first in range(0, len(paths), BATCH):
        yield (read(list(paths[first : first + BATCH]), height, width) * 255).round().byte()


def summarise_quality(
    rows: Sequence[dict[str, Any]], reference: Gaussian, base: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """What rows of a `QualityTask` come to; beside those of the base model, with 95 % intervals of the difference.

    Returns:
        `images`, `vae_frechet` with `vae_frechet_95_percent`; `object_accuracy` and `colour_accuracy`, None where no
        caption names one; `diversity`, the mean pixel distance of two images of a prompt. With `base`, for the first
        three also `..._less_base_95_percent`.

    Raises:
        InputError: fewer than two images, or features of another model than the reference's.
    """
    features = _features(rows)
    spread, apart = frechet_intervals(features, reference, _features(base) if base else None)
    found: dict[str, Any] = {
        "images": len(features),
        "vae_frechet": frechet(fit(features), reference),
        "vae_frechet_95_percent": list(spread),
    }
    for name in ("object", "colour"):
        right = _right(rows, name)
        found[f"{name}_accuracy"] = float(np.nanmean(right)) if not np.isnan(right).all() else None
        if base and found[f"{name}_accuracy"] is not None:
            found[f"{name}_accuracy_less_base_95_percent"] = _paired(right - _right(base, name))
    found["diversity"] = float(np.mean([row["apart"] for row in rows]))
    if base:
        found["vae_frechet_less_base_95_percent"] = list(apart)
    return found


def _features(rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    return np.asarray([one for row in rows for one in row["features"]], dtype=np.float64)


def _right(rows: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """[N, 2] of 1, 0 and nan where nothing is named."""
    return np.asarray([[np.nan if x is None else float(x) for x in row[f"{name}s"]] for row in rows])


def _paired(differences: NDArray[np.float64]) -> list[float]:
    """A bootstrap over items of the mean difference."""
    each = np.nanmean(differences, axis=1)
    rng = np.random.default_rng(0)
    drawn = each[rng.integers(0, len(each), (DRAWS, len(each)))].mean(1)
    return [float(value) for value in np.percentile(drawn, [2.5, 97.5])]
