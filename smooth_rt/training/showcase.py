"""What ships beside the default model's weights: example images that training never saw, and evaluation prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from smooth_rt.training.data import COLOURS, EmojiScenes, is_held_out

# Held-out pairs of object and background (`data.is_held_out`), and an object to edit each into.
EXAMPLES = (
    ("dog face", "blue", "panda face"),
    ("panda face", "blue", "owl"),
    ("tiger face", "white", "dog face"),
    ("lion face", "yellow", "tiger face"),
    ("owl", "blue", "penguin"),
    ("taxi", "purple", "rocket"),
    ("rocket", "green", "airplane"),
    ("red heart", "green", "tomato"),
)


def write_examples(scenes: EmojiScenes, folder: Path) -> None:
    """Draw `EXAMPLES` as PNG files, with captions, edit targets and masks of the objects in metadata.jsonl."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (name, colour, target) in enumerate(EXAMPLES):
        obj, shade = scenes.captions.index(name), COLOURS.index(colour)
        if not is_held_out(obj, shade):
            raise ValueError(f"{name} on {colour} is trained on; choose a held-out pair")
        file = f"{name.replace(' ', '-')}.png"
        drawn = scenes.draw("example", index, obj, shade)
        Image.fromarray(drawn.image).save(folder / file)
        Image.fromarray(drawn.mask).save(folder / "masks" / file)
        record = {"file_name": file, "text": f"{name} on {colour} background"}
        record |= {"target": f"{target} on {colour} background", "mask": f"masks/{file}"}
        records.append(json.dumps(record))
    (folder / "metadata.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")


def evaluation_prompts(scenes: EmojiScenes, count: int = 100) -> list[str]:
    """`count` different captions, objects and backgrounds drawn at random; each object at most once."""
    rng = np.random.default_rng([scenes.seed, *b"evaluation"])
    objects = rng.permutation(len(scenes))[:count]
    return [f"{scenes.captions[obj]} on {COLOURS[int(rng.integers(len(COLOURS)))]} background" for obj in objects]
