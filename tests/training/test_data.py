"""The pictures: drawn from their key alone, held-out pairs never by chance, captions that say what is there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smooth_rt.errors import InputError
from smooth_rt.evaluation import edit_cases
from smooth_rt.training.data import BACKGROUNDS, COLOUR_JITTER, COLOURS, EmojiScenes, fetch, is_held_out
from smooth_rt.training.pictures import Listed, Reading, open_pictures
from smooth_rt.training.pictures.folder import FolderSource
from smooth_rt.training.showcase import evaluation_prompts, held_out, write_examples, write_scenes

# A PNG that says that it is 50,000 pixels a side, and holds none.
CHUNKS = (b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
LARGE_PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in CHUNKS
)


@pytest.fixture(scope="module")
def scenes(emoji: Path) -> EmojiScenes:
    return EmojiScenes(emoji, size=32, seed=5)


def test_a_picture_follows_from_its_key(scenes: EmojiScenes, emoji: Path) -> None:
    again = EmojiScenes(emoji, size=32, seed=5).draw("vae", 17)
    first = scenes.draw("vae", 17)
    assert np.array_equal(first.image, again.image)
    assert first.caption == again.caption
    others = [scenes.draw("vae", 18), scenes.draw("unet", 17), EmojiScenes(emoji, size=32, seed=6).draw("vae", 17)]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_the_background_is_what_the_caption_says(scenes: EmojiScenes) -> None:
    named = 0
    for index in range(200):
        sample = scenes.draw("unet", index)
        empty = sample.mask == 0
        shade = sample.image[empty].mean(axis=0)
        assert np.abs(shade - BACKGROUNDS[COLOURS[sample.colour]]).max() <= COLOUR_JITTER + 0.5
        assert sample.caption.startswith(scenes.captions[sample.obj])
        named += sample.caption.endswith(f" on {COLOURS[sample.colour]} background")
    assert 130 < named < 190  # four fifths


def test_held_out_pairs_come_only_when_asked_for(scenes: EmojiScenes) -> None:
    drawn = [scenes.draw("unet", index) for index in range(500)]
    assert not any(is_held_out(sample.obj, sample.colour) for sample in drawn)
    pairs = [(o, c) for o in range(len(scenes)) for c in range(len(COLOURS)) if is_held_out(o, c)]
    assert 0.04 < len(pairs) / (len(scenes) * len(COLOURS)) < 0.08
    asked = scenes.draw("unet", 0, *pairs[0])
    assert (asked.obj, asked.colour) == pairs[0]


def test_examples_are_held_out_and_prompts_differ(scenes: EmojiScenes, tmp_path: Path) -> None:
    write_examples(scenes, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert records
    for record in records:
        name, colour = record["text"].removesuffix(" background").split(" on ")
        assert is_held_out(scenes.captions.index(name), COLOURS.index(colour))
        with Image.open(tmp_path / record["file_name"]) as picture:
            assert picture.size == (32, 32)
    named = held_out(scenes, 40)
    assert len(named) == 40
    write_scenes(scenes, tmp_path / "more", named, "held out")
    cases = edit_cases(tmp_path / "more")
    assert len(cases) == 40
    assert all(case.caption != case.target and case.path.is_file() and case.mask.is_file() for case in cases)
    pairs = itertools.product(range(len(scenes)), range(len(COLOURS)))
    assert len(held_out(scenes, 10**6)) == sum(itertools.starmap(is_held_out, pairs))
    prompts = evaluation_prompts(scenes, 100)
    assert len(set(prompts)) == 100


def test_a_captioned_folder_reads_both_kinds_of_captions(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (20 + index, 30), (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}\n")
    beside = Listed(FolderSource(tmp_path), 16)
    drawn = [beside.draw("train", index) for index in range(3)]
    assert {d.caption for d in drawn} == {"picture 0", "picture 1", "picture 2"}
    assert all(d.image.shape == (16, 16, 3) for d in drawn)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "the second"}\n')
    listed = open_pictures(tmp_path, Reading(16))
    assert listed.draw("train", 0).caption == "the second"


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no captioned image"):
        FolderSource(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_pictures(tmp_path / "none", Reading(16))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n')
    for content, why in (
        (None, "No such file"),
        (b"", "cannot identify image file"),
        (b"not an image", "cannot identify image file"),
        (LARGE_PNG, "too large|exceeds limit"),
    ):
        if content is not None:
            (tmp_path / "1.png").write_bytes(content)
        pictures = Listed(FolderSource(tmp_path), 16)
        with pytest.raises(InputError, match=rf"none of its 1 pictures can be used \(.*1\.png: .*({why})"):
            pictures.draw("train", 0)
        assert list(pictures.skipped) == [str(tmp_path / "1.png")]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metadata\.jsonl: Is a directory"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"file_name": "1.png"}', b"[1]", b"{", b'{"file_name": "1.png", "text": null}', b"[" * 100_000,
        b'{"file_name": "1.png", "text": "\\ud800"}', b'{"file_name": 1, "text": "x"}',
        b'{"file_name": "1.png", "text": ["x", "y"]}',
    ],
)  # fmt: skip
def test_a_line_without_a_caption_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "1.png").touch()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "text": "x"}\n\n' + line)
    with pytest.raises(InputError, match=r"metadata\.jsonl:3: needs file_name and text"):
        Listed(FolderSource(tmp_path), 16)


@pytest.mark.parametrize("name", ["metadata.jsonl", "1.txt"])
def test_captions_that_are_not_utf8_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "1.png").touch()
    (tmp_path / name).write_bytes("a cafe\u0301 or café".encode("latin-1", "ignore"))
    with pytest.raises(InputError, match=rf"{name}: byte \d+ is not UTF-8"):
        Listed(FolderSource(tmp_path), 16)


def test_the_identity_follows_captions_names_and_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"1234")
    (folder / "1.txt").write_text("a dog")
    seen = [Listed(FolderSource(folder), 16).identity]
    moved = folder.rename(tmp_path / "moved")
    assert Listed(FolderSource(moved), 16, seed=3).identity == seen[0]
    (moved / "1.txt").write_text("a cat")
    seen.append(Listed(FolderSource(moved), 16).identity)
    (moved / "1.png").write_bytes(b"12345")
    seen.append(Listed(FolderSource(moved), 16).identity)
    seen.append(Listed(FolderSource(moved), 32).identity)
    assert len(set(seen)) == 4


def test_emoji_that_are_not_as_fetched_are_named(emoji: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    shutil.copytree(emoji, folder)
    assert EmojiScenes(folder, 16).identity == EmojiScenes(emoji, 16).identity
    picture = min((folder / "fluent" / "package" / "assets").iterdir())
    picture.write_bytes(picture.read_bytes()[:20])
    with pytest.raises(InputError, match=rf"{picture.name} cannot be read.*fetch"):
        open_pictures(folder, Reading(16))
    picture.unlink()
    with pytest.raises(InputError, match=r"has no picture.*fetch"):
        open_pictures(folder, Reading(16))
    (folder / "names" / "package" / "emoji.json").unlink()
    with pytest.raises(InputError, match=r"emoji\.json cannot be read: No such file.*fetch"):
        open_pictures(folder, Reading(16))


def test_a_download_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text('#!/bin/sh\nfor last; do :; done; echo half > "$last/a.tgz"; exit 7\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    with pytest.raises(InputError, match="`npm pack` failed: exit code 7"):
        fetch(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
