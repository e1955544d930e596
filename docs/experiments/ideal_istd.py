"""What ISTD the default model's data itself allows: `python docs/experiments/ideal_istd.py EMOJI` (what `train tiny`
fetches). Pictures are drawn, not sampled: their place, size and shade follow from Gaussian noise in the smoothest way.

`factors of the noise`: the six numbers that a picture of one caption has (size, place, shade) are each the normal
distribution's function of one dimension of noise, along the same slerp as ISTD's. `straight`: they move from those of
one end to those of the other in a straight line at an even pace, which no function of the noise does for all pairs.
`cross-fade`: pixels are mixed from one end to the other; no picture in between is of the data.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
from PIL import Image

from smooth_rt.evaluation import read_prompts
from smooth_rt.metrics import diversity, istd
from smooth_rt.training.data import BACKGROUNDS, COLOUR_JITTER, COLOURS, SCALE, EmojiScenes

FINER = 4  # drawn so much larger and averaged, so that a thing moves by less than a pixel
FRAMES = 11


def drawn(scenes: EmojiScenes, obj: int, colour: int, factors: np.ndarray) -> np.ndarray:
    """The picture of six factors in 0..1: size, left, top, shade."""
    side = (SCALE[0] + (SCALE[1] - SCALE[0]) * factors[0]) * scenes.size * FINER
    whole = scenes.size * FINER
    sprite = scenes.sprites[obj].resize((round(side), round(side)), Image.Resampling.LANCZOS)
    layer = Image.new("RGBA", (whole, whole))
    layer.paste(sprite, (round(factors[1] * (whole - side)), round(factors[2] * (whole - side))))
    shade = np.clip(np.array(BACKGROUNDS[COLOURS[colour]]) + COLOUR_JITTER * (2 * factors[3:] - 1), 0, 255)
    pixels = np.asarray(layer, float)
    mixed = pixels[..., :3] * pixels[..., 3:] / 255 + shade * (1 - pixels[..., 3:] / 255)
    return mixed.reshape(scenes.size, FINER, scenes.size, FINER, 3).mean((1, 3)).round().astype(np.uint8)


def main() -> None:
    scenes = EmojiScenes(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    normal = np.vectorize(NormalDist().cdf)
    angles = np.linspace(0, math.pi / 2, FRAMES)[:, None]
    found: dict[str, list[np.ndarray]] = {"factors of the noise": [], "straight": [], "cross-fade": []}
    for prompt in read_prompts():
        name, _, rest = prompt.partition(" on ")
        obj, colour = scenes.captions.index(name), COLOURS.index(rest.removesuffix(" background"))
        start, end = rng.standard_normal((2, 6))
        ways = {
            "factors of the noise": normal(np.cos(angles) * start + np.sin(angles) * end),
            "straight": np.linspace(normal(start), normal(end), FRAMES),
        }
        for way, factors in ways.items():
            found[way].append(np.stack([drawn(scenes, obj, colour, one) for one in factors]))
        first, last = (found["straight"][-1][k].astype(float) for k in (0, -1))
        mixed = [(first + (last - first) * k / (FRAMES - 1)).round().astype(np.uint8) for k in range(FRAMES)]
        found["cross-fade"].append(np.stack(mixed))
    print("| path | ISTD | mean step | ISTD / mean step | diversity |\n|---|---|---|---|---|")
    for way, paths in found.items():
        measured = istd(paths)
        ends = diversity([path[[0, -1]] for path in paths])
        figures = (measured.istd, measured.mean_step, measured.istd_over_mean_step, ends)
        print(f"| {way} | " + " | ".join(f"{figure:.4g}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
