"""A stand-in for the npm packages: each listed object as a coloured disc, in the packages' own layout."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `smooth_rt.training.data.fetch` takes for complete."""
    folder = tmp_path_factory.mktemp("emoji")
    pictures = folder / "fluent" / "package" / "assets"
    names = folder / "names" / "package"
    pictures.mkdir(parents=True)
    names.mkdir(parents=True)
    listed = (resources.files("smooth_rt.training") / "objects.txt").read_text(encoding="utf-8")
    records = []
    for index, line in enumerate(line for line in listed.splitlines() if line and not line.startswith("#")):
        short_name = line.split("=")[0].strip()
        code = f"{0x1F000 + index:x}"
        picture = Image.new("RGBA", (32, 32))
        colour = (37 * index % 256, 91 * index % 256, 53 * index % 256, 255)
        ImageDraw.Draw(picture).ellipse((2, 2, 29, 29), fill=colour)
        picture.save(pictures / f"{code}.webp", lossless=True)
        records.append({"short_name": short_name, "unified": code.upper(), "non_qualified": None})
    (names / "emoji.json").write_text(json.dumps(records), encoding="utf-8")
    return folder
