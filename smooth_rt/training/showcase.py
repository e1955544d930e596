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
    """Draw `EXAMPLES`, as `write_scenes` does."""
    named = {name.replace(" ", "-"): (name, colour, target) for name, colour, target in EXAMPLES}
    write_scenes(scenes, folder, named, "example")


def held_out(scenes: EmojiScenes, count: int = 128) -> dict[str, tuple[str, str, str]]:
    """`count` different pairs of object and background that training never saw, each with an object to edit it into, by
    the name of their file; all pairs where they are fewer."""
    rng = np.random.default_rng([scenes.seed, *b"held out"])
    pairs = [(o, c) for o in range(len(scenes)) for c in range(len(COLOURS)) if is_held_out(o, c)]
    found = {}
    for place in rng.permutation(len(pairs))[:count]:
        obj, colour = pairs[place]
        target = (obj + int(rng.integers(1, len(scenes)))) % len(scenes)
        names = scenes.captions[obj], COLOURS[colour], scenes.captions[target]
        found[f"{names[0]}-on-{names[1]}".replace(" ", "-")] = names
    return found


def write_scenes(scenes: EmojiScenes, folder: Path, named: dict[str, tuple[str, str, str]], stream: str) -> None:
    """Draw objects on backgrounds that are held out of training as PNG files, with captions, edit targets and masks of
    the objects in metadata.jsonl.

    Args:
        named: file to object, background and the object that it is to be edited into.
        stream: of the places and sizes.
    """
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (stem, (name, colour, target)) in enumerate(named.items()):
        obj, shade = scenes.captions.index(name), COLOURS.index(colour)
        if not is_held_out(obj, shade):
            raise ValueError(f"{name} on {colour} is trained on; choose a held-out pair")
        file = f"{stem}.png"
        drawn = scenes.draw(stream, index, obj, shade)
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
