"""The cache gives what would be encoded without it, and mends itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from smooth_rt.errors import InputError, SmoothRTError
from smooth_rt.model import Model, load_model
from smooth_rt.training import encoded as module
from smooth_rt.training.data import EmojiScenes
from smooth_rt.training.encoded import Encoded, Encoder, cached
from smooth_rt.training.pictures import Listed
from smooth_rt.training.pictures.folder import FolderSource
from smooth_rt.training.smooth_lora import train_smooth_lora
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.world import World


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(tiny_model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "SHARD", 3)
    found = tmp_path / "pictures"
    found.mkdir()
    for index in range(7):
        Image.effect_noise((24, 20), 80).convert("RGB").save(found / f"{index}.png")
        (found / f"{index}.txt").write_text(f"picture {index % 3}")
    (found / "4.png").write_bytes(b"broken")
    return found


def pictures(folder: Path, size: int = 16) -> Listed:
    return Listed(FolderSource(folder), size)


def refuse(*_: object) -> None:
    raise AssertionError("encoded again")


def assert_same(one: Encoded, other: Encoded) -> None:
    assert one.name == other.name
    for name in ("mean", "std", "context"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_cache_equals_encoding_and_is_filled_once(
    tmp_path: Path, folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, drawn = Encoder(model), pictures(folder)
    wanted = [encoder(drawn.draw("train", index)) for index in range(14)]
    seen: list[tuple[int, int]] = []
    cached(tmp_path / "cache", model, pictures(folder), World(), lambda *done: seen.append(done))
    assert seen == [(3, 7), (6, 7), (7, 7)]
    monkeypatch.setattr(Encoder, "__call__", refuse)
    identity, encode = cached(tmp_path / "cache", model, pictures(folder), World())
    assert identity == drawn.identity
    for index, one in enumerate(wanted):
        assert_same(encode("train", index), one)


def test_a_damaged_shard_is_made_anew_and_an_interruption_loses_one(
    tmp_path: Path, folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    made: list[Path] = []
    make = module._Shards._make

    def interrupted(self: object, path: Path, *rest: object) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        make(self, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Shards, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(cache, model, pictures(folder), World())
    assert sorted(path.name for path in cache.iterdir()) == ["cache.json", *(path.name for path in made)]
    monkeypatch.setattr(module._Shards, "_make", make)
    cached(cache, model, pictures(folder), World())
    path = made[1]
    before = {key: value.clone() for key, value in load_file(path).items()}  # else it is the file itself
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    caplog.clear()
    for content in (bytes(flipped), path.read_bytes()[:-9]):
        path.write_bytes(content)
        cached(cache, model, pictures(folder), World())
        after = load_file(path)
        assert all(torch.equal(after[key], value) for key, value in before.items())
    assert sum(f"{path.name}: damaged" in message for message in caplog.messages) == 2


def test_a_cache_of_something_else_is_refused(tmp_path: Path, folder: Path, model: Model) -> None:
    cached(tmp_path / "cache", model, pictures(folder), World())
    with pytest.raises(InputError, match="a cache of another pictures; name another --cache"):
        cached(tmp_path / "cache", model, pictures(folder, 8), World())
    with pytest.raises(InputError, match="holds files that are not a cache's"):
        cached(folder, model, pictures(folder), World())


def test_a_full_disk_is_said(tmp_path: Path, folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(SmoothRTError, match=r"latents-000000\.safetensors: .*No space.*make room"):
        cached(tmp_path / "cache", model, pictures(folder), World())


def test_training_from_the_cache_is_the_same(
    tmp_path: Path, folder: Path, tiny_model: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SmoothLoraConfig(batch_size=2, lr=1e-3)
    trained = [
        load_file(
            train_smooth_lora(load_model(tiny_model), pictures(folder), tmp_path / name, 2, config=config, cache=c)
        )
        for name, c in (("without", None), ("with", tmp_path / "cache"))
    ]
    assert all(torch.equal(trained[1][key], value) for key, value in trained[0].items())
    # Pictures without an end are cached as their first ones.
    monkeypatch.setattr(module, "ENDLESS", 5)
    scenes = EmojiScenes(emoji, 16)
    train_smooth_lora(load_model(tiny_model), scenes, tmp_path / "scenes", 4, config=config, cache=tmp_path / "five")
    assert len(list((tmp_path / "five").glob("*.safetensors"))) == 2
