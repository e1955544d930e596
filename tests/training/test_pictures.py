"""Pictures of every source: in an order that follows from its key, broken ones passed over and named."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smooth_rt import cli
from smooth_rt.errors import InputError
from smooth_rt.training.pictures import Listed, Reading, open_pictures
from smooth_rt.training.pictures.folder import FolderSource
from smooth_rt.training.pictures.order import Order, bucket_sizes, nearest_bucket
from smooth_rt.training.pictures.shards import expanded


def picture(index: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new("RGB", size, (37 * index % 256, 91 * index % 256, 53 * index % 256))


def encoded(index: int) -> bytes:
    held = io.BytesIO()
    picture(index).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "pictures"
    found.mkdir()
    for index in range(6):
        picture(index).save(found / f"{index}.png")
        (found / f"{index}.txt").write_text(f"picture {index}")
    return found


def shard(path: Path, samples: dict[str, tuple[bytes, str | None]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for stem, (image, caption) in samples.items():
            files = {f"{stem}.png": image}
            if caption is not None:
                files[f"{stem}.txt"] = caption.encode()
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_an_epoch_is_a_permutation_and_the_order_needs_no_history() -> None:
    order = Order([range(7)], 1, seed=3)
    drawn = [next(order.candidates("train", index)) for index in range(21)]
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert len({tuple(drawn[7 * epoch : 7 * epoch + 7]) for epoch in range(3)}) == 3
    for index in (20, 3, 11, 0):
        assert next(Order([range(7)], 1, seed=3).candidates("train", index)) == drawn[index]
    assert [next(Order([range(7)], 1, seed=4).candidates("train", index)) for index in range(7)] != drawn[:7]
    assert sorted(order.candidates("train", 5)) == list(range(7))


def test_groups_are_of_one_bucket_and_every_item_comes() -> None:
    buckets = [range(5), range(5, 6), range(6, 14)]
    order = Order(buckets, 4, seed=0)
    epoch = 4 * (2 + 1 + 2)
    drawn = [next(order.candidates("train", index)) for index in range(epoch)]
    of = {item: number for number, bucket in enumerate(buckets) for item in bucket}
    for start in range(0, epoch, 4):
        assert len({of[item] for item in drawn[start : start + 4]}) == 1
    assert set(drawn) == set(range(14))
    assert max(Counter(drawn).values()) == 4  # the one alone in its bucket


def test_bucket_sizes_have_one_area_and_fit_the_model() -> None:
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes
    assert len(sizes) > 5
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.5 <= width / height <= 2
        assert abs(height * width / 512**2 - 1) < 0.13
    assert sizes[nearest_bucket(sizes, 1000, 990)] == (512, 512)
    height, width = sizes[nearest_bucket(sizes, 1920, 1080)]
    assert width > 1.5 * height


def test_buckets_keep_the_shape_of_pictures(tmp_path: Path) -> None:
    for index in range(9):
        picture(index, [(64, 64), (64, 40), (40, 64)][index % 3]).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(str(index))
    listed = open_pictures(tmp_path, Reading(32, crop="buckets", group=2, multiple=8))
    shapes = [listed.draw("train", index).image.shape[:2] for index in range(12)]
    assert all(shapes[k] == shapes[k + 1] for k in range(0, 12, 2))
    assert {h < w for h, w in shapes} == {True, False}
    assert {listed.draw("train", index).caption for index in range(12)} == {str(index) for index in range(9)}


def test_broken_ones_are_passed_over_and_named(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    (folder / "2.png").write_bytes(b"")
    picture(4, (15, 30)).save(folder / "4.png")
    first, again = (Listed(FolderSource(folder), 16, seed=1) for _ in range(2))
    drawn = [first.draw("train", index) for index in range(6)]
    assert {found.caption for found in drawn} == {"picture 0", "picture 3", "picture 5"}
    assert set(first.skipped) == {str(folder / f"{index}.png") for index in (1, 2, 4)}
    assert first.skipped[str(folder / "4.png")] == "15x30 is smaller than 16x16"
    # From the other end: what was met before does not matter.
    for index in reversed(range(6)):
        assert np.array_equal(again.draw("train", index).image, drawn[index].image)
    assert again.skipped.keys() == first.skipped.keys()


def test_all_too_small_is_said(folder: Path) -> None:
    with pytest.raises(InputError, match=r"the largest picture is 20 pixels .* training is at 64; lower --resolution"):
        Listed(FolderSource(folder), 64).draw("train", 0)


def test_images_without_a_caption_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "5.txt").unlink()
    assert len(FolderSource(folder)) == 5
    assert caplog.messages == [f"{folder}: no caption for 1 of 6 images, as 5.png"]


def test_shards_are_read_by_number(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"part-{number:03d}.tar", {f"{number}/{k}": (encoded(k), f"{number} {k}") for k in range(3)})
    shard(tmp_path / "part-002.tar", {"bare": (encoded(9), None), "bad": (b"no image", "broken")})
    for data in (tmp_path, tmp_path / "part-{000..002}.tar"):
        listed = open_pictures(data, Reading(16))
        drawn = [listed.draw("train", index) for index in range(7)]
        assert {found.caption for found in drawn} == {f"{number} {k}" for number in range(2) for k in range(3)}
        assert list(listed.skipped) == [f"{tmp_path / 'part-002.tar'}:bad.png"]
        for found in drawn:
            colour = np.asarray(picture(int(found.caption.split()[1])))[0, 0]
            assert np.abs(found.image - colour.astype(int)).max() <= 1
    assert expanded("a-{08..10}-{1..2}.tar")[:3] == [Path("a-08-1.tar"), Path("a-08-2.tar"), Path("a-09-1.tar")]


def test_a_shard_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {str(k): (encoded(k), f"{k}") for k in range(9)})
    whole = path.read_bytes()
    for content in (whole[:700], b"no tar at all" * 99, b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.tar: (not a whole tar file|no sample)"):
            open_pictures(path, Reading(16))
    with pytest.raises(InputError, match=r"b\.tar: no such shard; fetch it"):
        open_pictures(tmp_path / "b.tar", Reading(16))


def test_captions_from_other_systems_read_the_same(folder: Path) -> None:
    captions = [text for _, text in FolderSource(folder).items]
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(f"\ufeffpicture {index}\r\n".encode())
    assert [text for _, text in FolderSource(folder).items] == captions
    for index in range(6):
        (folder / f"{index}.txt").rename(folder / f"{index}.TXT")
    assert [text for _, text in FolderSource(folder).items] == captions
    lines = [json.dumps({"file_name": f"{index}.png", "text": f"\ufeffpicture {index}"}) for index in range(6)]
    (folder / "metadata.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert [text for _, text in FolderSource(folder).items] == captions


def test_hidden_files_are_not_trained_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = FolderSource(folder)
    for hidden in (".ipynb_checkpoints/0-checkpoint", "__MACOSX/0", "._0"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / f"{hidden}.png").write_bytes(b"\0\5\x16\7")
        (folder / f"{hidden}.txt").write_bytes(b"\0\5\x16\7\xb0")
    found = FolderSource(folder)
    assert (found.items, found.identity, caplog.messages) == (expected.items, expected.identity, [])


def test_hidden_members_and_shards_are_passed_over(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"./0": (encoded(0), "\ufeffpicture 0\r\n"), "x/1": (encoded(1), "picture 1")})
    expected = open_pictures(tmp_path, Reading(16))
    with tarfile.open(path, "a") as tar:
        for name in ("._0.png", "._0.txt", "x/.ipynb_checkpoints/1-checkpoint.png", "__MACOSX/x/2.png"):
            for suffix, content in ((".png", encoded(2)), (".txt", b"hidden")):
                info = tarfile.TarInfo(str(Path(name).with_suffix(suffix)))
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    found = open_pictures(tmp_path, Reading(16))
    assert isinstance(found, Listed)
    assert [found.source.caption(item) for item in range(len(found.source))] == ["picture 0", "picture 1"]
    assert found.identity == expected.identity


def test_a_caption_in_a_shard_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("0.png", encoded(0)), ("0.txt", "dog".encode("utf-16"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=rf"^{path}:0\.txt: is UTF-16, not UTF-8; save it as UTF-8$"):
        open_pictures(path, Reading(16))


@pytest.mark.parametrize("kind", ["folder", "shards", "saved", "rows.parquet"])
def test_relative_data_is_read_from_any_folder(
    tmp_path: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path / "a-0.tar", {str(k): (encoded(k), f"{k}") for k in range(3)})
    if kind == "saved":
        rows().save_to_disk(str(tmp_path / "saved"))
    elif kind == "rows.parquet":
        rows().to_parquet(str(tmp_path / "rows.parquet"))
    data = {"folder": "pictures", "shards": "a-{0..0}.tar"}.get(kind, kind)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    named = open_pictures(data, Reading(16))
    monkeypatch.chdir("/")
    drawn = named.draw("train", 0)
    for other in (str(tmp_path / data), f"~/{data}"):
        same = open_pictures(other, Reading(16))
        assert (same.identity, same.draw("train", 0).caption) == (named.identity, drawn.caption)


def rows(text: str = "text", **more: Any) -> Any:
    import datasets

    held = {"image": [{"bytes": encoded(k), "path": None} for k in range(4)], text: [f"row {k}" for k in range(4)]}
    features = datasets.Features({"image": datasets.Image(), text: datasets.Value("string")})
    return datasets.Dataset.from_dict({**held, **more}, features=features if not more else None)


def test_dataset_captions_have_no_marks(tmp_path: Path) -> None:
    rows().to_parquet(str(tmp_path / "plain.parquet"))
    rows().map(lambda row: {"text": f"\ufeff{row['text']}"}).to_parquet(str(tmp_path / "marked.parquet"))
    marked, plain = (open_pictures(tmp_path / f"{name}.parquet", Reading(16)) for name in ("marked", "plain"))
    assert marked.draw("a", 0).caption == plain.draw("a", 0).caption


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    rows().save_to_disk(str(tmp_path / "saved"))
    rows("caption").to_parquet(str(tmp_path / "rows.parquet"))
    for data in ("saved", "rows.parquet"):
        listed = open_pictures(tmp_path / data, Reading(16))
        drawn = [listed.draw("train", index) for index in range(4)]
        assert sorted(found.caption for found in drawn) == [f"row {k}" for k in range(4)]
        assert drawn[0].name.startswith(f"{tmp_path / data} row ")
        assert listed.identity == open_pictures(tmp_path / data, Reading(16)).identity
    with pytest.raises(InputError, match=r"no column 'words'; name one with --caption-column: image, text"):
        open_pictures(tmp_path / "saved", Reading(16, caption_column="words"))
    rows("words").save_to_disk(str(tmp_path / "words"))
    with pytest.raises(InputError, match=r"holds the caption is not clear; .*--caption-column: image, words"):
        open_pictures(tmp_path / "words", Reading(16))
    assert open_pictures(tmp_path / "words", Reading(16, caption_column="words")).draw("a", 0).caption[:3] == "row"


def test_a_hub_that_cannot_be_reached_is_said() -> None:
    with pytest.raises(InputError, match=r"^nobody/nothing: no folder of that name, and no dataset .*network$"):
        open_pictures("nobody/nothing", Reading(16))


def test_a_file_of_another_kind_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no pictures")
    with pytest.raises(InputError, match=r"/notes: a file that is neither \.tar nor \.parquet; give a folder"):
        open_pictures(tmp_path / "notes", Reading(16))
    with pytest.raises(InputError, match=r"/a-0\.tar: no such shard; "):
        open_pictures(tmp_path / "a-{0..1}.tar", Reading(16))


def test_an_unknown_crop_is_named() -> None:
    with pytest.raises(InputError, match="crop='round': unknown; choose from centre, buckets"):
        Reading(16, crop="round")


@pytest.mark.parametrize("kind", ["folder", "shards", "dataset"])
def test_a_lora_is_trained_on_every_source(
    tmp_path: Path, tiny_model: Path, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "shards":
        shard(tmp_path / "a.tar", {str(k): (encoded(k), f"{k}") for k in range(3)})
    elif kind == "dataset":
        rows().save_to_disk(str(tmp_path / "saved"))
    else:
        (folder / "3.png").write_bytes(b"broken")
    data = {"folder": folder, "shards": tmp_path / "a.tar", "dataset": tmp_path / "saved"}[kind]
    command = ["train", "smooth-lora", "--model", str(tiny_model), "--data", str(data), "--device", "cpu", "--json"]
    command += ["--batch-size", "4", "--steps", "2", "--crop", "buckets", "--resolution", "16"]
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert Path(result["output"]).exists()
    assert result.get("skipped", 0) == (kind == "folder")
