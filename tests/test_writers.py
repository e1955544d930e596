"""Files appear whole or not at all, and films play."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation
from PIL import Image
from skimage.data import astronaut, cat

from smooth_rt import writers
from smooth_rt.errors import InputError, SmoothRTError


def frames(count: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def full_disk(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC, after: int = 0) -> None:
    """The write that follows `after` good ones fails when it is flushed to the disk, as on a full one."""
    left = [after]

    def fsync(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)


def test_files_are_written_in_order(tmp_path: Path) -> None:
    paths = writers.write_files(tmp_path / "new" / "folder", {"b.txt": b"1", "a.txt": b"2"})
    assert [(path.name, path.read_bytes()) for path in paths] == [("b.txt", b"1"), ("a.txt", b"2")]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("below", ["", "config", "config/new"])
def test_nothing_goes_into_a_bundle(tmp_path: Path, below: str) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"lies in the bundle .*; name another folder with --output"):
        writers.check_output(tmp_path / below, ["a.png"])
    writers.check_output(tmp_path)  # what is added to it, a build puts there
    (tmp_path / "mine.txt").write_text("")  # so it is none
    writers.check_output(tmp_path / below, ["a.png"])


@pytest.mark.parametrize("after", [0, 1])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    full_disk(monkeypatch, after=after)
    with pytest.raises(SmoothRTError, match=r"[ab]\.txt: cannot be written: No space left .* free some") as caught:
        writers.write_files(tmp_path / "new" / "folder", {"a.txt": b"1", "b.txt": b"2"})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    full_disk(monkeypatch, errno.EROFS, after=1)
    with pytest.raises(SmoothRTError, match="Read-only file system"):
        writers.write_files(tmp_path, {"a.txt": b"new", "b.txt": b"new"})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"old")]


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writers.write_files(tmp_path / "new", {"a.txt": b"1"})
    assert list(tmp_path.iterdir()) == []


class Interrupted:
    """`os.replace` that is interrupted right after its `after`-th call, as by Ctrl-C."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        self.replace = os.replace
        monkeypatch.setattr(os, "replace", self)

    def __call__(self, source: Path, target: Path) -> None:
        self.replace(source, target)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_interrupt_between_the_renames_puts_back_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    old = {"a.txt": b"old a", "c.txt": b"old c"}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    # Five renames in all: two files are kept aside, three take their places.
    Interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        writers.write_files(tmp_path, {"a.txt": b"1", "b.txt": b"2", "c.txt": b"3"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_interrupt_between_the_renames_leaves_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Interrupted(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        writers.write_files(tmp_path / "new" / "folder", {"a.txt": b"1", "b.txt": b"2", "c.txt": b"3"})
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_the_old_files_go_leaves_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    unlink = Path.unlink
    seen: list[Path] = []

    def interrupt(path: Path, missing_ok: bool = False) -> None:
        seen.append(path)
        if len(seen) == 1:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writers.write_files(tmp_path, {"a.txt": b"new", "b.txt": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.txt": b"new", "b.txt": b"new"}


def test_files_of_the_same_names_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    (tmp_path / "theirs.txt").write_bytes(b"theirs")
    (tmp_path / "b.txt").symlink_to(tmp_path / "theirs.txt")
    writers.write_files(tmp_path, {"a.txt": b"new", "b.txt": b"new"})
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"a.txt": b"new", "b.txt": b"new", "theirs.txt": b"theirs"}


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    picture = mine / "original-001.png"
    picture.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(picture)
    (tmp_path / "way").symlink_to(mine)
    names = ["sheet.png", "original-001.png"]
    for folder, given in (
        (mine, picture),
        (mine, tmp_path / "link.png"),
        (tmp_path / "way", str(picture)),
        (mine / ".." / "mine", picture),
    ):
        with pytest.raises(InputError) as caught:
            writers.check_output(folder, names, ["default", "some/model", given])
        assert str(caught.value).startswith(f"{folder / 'original-001.png'}: would replace the input {given};")
    assert writers.check_output(mine, ["sheet.png"], [picture]) == mine
    assert writers.check_output(tmp_path / "new", names, [picture]) == tmp_path / "new"


def test_output_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(InputError, match="file is a file, not a folder"):
            writers.check_output(path)


def test_output_is_not_created_by_the_check(tmp_path: Path) -> None:
    assert writers.check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_unwritable_folder() -> None:
    # chmod stops nobody who is root, and nobody writes there.
    with pytest.raises(InputError, match=r"/proc is not writable .*name another folder with --output"):
        writers.check_output("/proc/new")


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = f"{tmp_path / 'pipe'}: is a device or a pipe where a file should go"
    with pytest.raises(InputError, match=said):
        writers.check_output(tmp_path, ["pipe"])
    with pytest.raises(InputError, match=said):
        writers.write_files(tmp_path, {"pipe": b"x"})
    assert (tmp_path / "pipe").is_fifo()


def test_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(InputError, match=r"b\.txt: is a folder"):
        writers.write_files(tmp_path, {"a.txt": b"1", "b.txt": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.parametrize(("size", "shown"), [((64, 64), (256, 256)), ((33, 21), (264, 168)), ((301, 200), (302, 200))])
def test_mp4_plays(size: tuple[int, int], shown: tuple[int, int]) -> None:
    film = iio.imread(writers.encode_mp4(frames(7, size)), extension=".mp4", plugin="pyav")
    assert film.shape == (7, shown[1], shown[0], 3)


def test_mp4_shows_the_frames_in_order() -> None:
    greys = [Image.new("RGB", (64, 64), (value,) * 3) for value in (0, 60, 120, 180, 240)]
    film = iio.imread(writers.encode_mp4(greys), extension=".mp4", plugin="pyav")
    assert film.mean(axis=(1, 2, 3)) == pytest.approx([0, 60, 120, 180, 240], abs=4)


def shown(film: bytes) -> list[np.ndarray]:
    """Decode a film as a player does: by the matrix and the range that it is tagged with. Frames of [H, W, 3]."""
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(io.BytesIO(film)) as container:
        return [
            picture.reformat(format="rgb24", interpolation=flags).to_ndarray().astype(float)
            for picture in container.decode(video=0)
        ]


def photographs(size: tuple[int, int], count: int) -> list[Image.Image]:
    """Two photographs that fade into each other."""
    ends = [Image.fromarray(data()).convert("RGB").resize(size, Image.Resampling.LANCZOS) for data in (astronaut, cat)]
    return [Image.blend(*ends, share) for share in np.linspace(0, 1, count)]


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (768, 768), (640, 360), (1280, 720), (65, 33), (1, 1)])
def test_encode_mp4_solid_colours_within_two_levels(size: tuple[int, int]) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (200, 60, 40), (99, 224, 34), (128,) * 3, (0,) * 3]
    film = shown(writers.encode_mp4([Image.new("RGB", size, colour) for colour in colours]))
    for frame, colour in zip(film, colours, strict=True):
        assert np.abs(frame - colour).max() <= 2


def test_encode_mp4_photographs_within_two_levels() -> None:
    photos = photographs((512, 512), 5)
    for frame, photo in zip(shown(writers.encode_mp4(photos)), photos, strict=True):
        difference = frame - np.asarray(photo)
        assert np.abs(difference).mean() <= 2
        assert np.abs(difference.mean(axis=(0, 1))).max() <= 2


@pytest.mark.parametrize("size", [(64, 64), (768, 768), (33, 21), (1, 1)])
def test_encode_mp4_tags_bt709_and_starts_fast(size: tuple[int, int]) -> None:
    content = writers.encode_mp4(frames(3, size))
    with av.open(io.BytesIO(content)) as container:
        codec = container.streams.video[0].codec_context
        tags = (codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc)
        picture = next(container.decode(video=0))
    assert tags == (1, ColorRange.MPEG, ColorPrimaries.BT709, ColorTrc.BT709)
    assert (picture.colorspace, picture.color_range) == (1, ColorRange.MPEG)
    assert b"colr" in content
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("count", [1, 2, 3, 25])
def test_encode_mp4_keeps_count_and_rate(count: int) -> None:
    with av.open(io.BytesIO(writers.encode_mp4(frames(count, (32, 32)), fps=10))) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, float(stream.duration * stream.time_base)) == (10, pytest.approx(count / 10))
        assert sum(1 for _ in container.decode(video=0)) == count


def test_encode_mp4_repeats_bit_for_bit() -> None:
    assert writers.encode_mp4(frames(9)) == writers.encode_mp4(frames(9))


def test_webp_plays(tmp_path: Path) -> None:
    film = writers.there_and_back(frames(5))
    assert len(film) == 8
    path, *_ = writers.write_files(tmp_path, {"film.webp": writers.encode_webp(film, fps=10)})
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (8, (256, 256), 0)
        image.seek(3)
        image.load()
        assert image.info["duration"] == 100


def test_png_is_lossless() -> None:
    image = frames(1)[0]
    assert np.array_equal(iio.imread(writers.encode_png(image)), np.asarray(image))


def test_contact_sheet_holds_every_image() -> None:
    images = frames(5, (8, 6))
    sheet = writers.contact_sheet(images, columns=3)
    assert sheet.size == (3 * 10 + 2, 2 * 8 + 2)
    assert np.array_equal(np.asarray(sheet)[10:16, 12:20], np.asarray(images[4]))


@pytest.mark.parametrize("encode", [writers.encode_mp4, writers.encode_webp, writers.contact_sheet])
def test_nothing_to_show(encode: object) -> None:
    assert callable(encode)
    with pytest.raises(InputError, match="at least one"):
        encode([])


def test_json_ends_with_a_newline() -> None:
    assert writers.encode_json({"ä": [1]}) == '{\n  "ä": [\n    1\n  ]\n}\n'.encode()


def test_json_holds_a_path_that_is_not_utf8() -> None:
    assert json.loads(writers.encode_json({"path": "a\udcff"})) == {"path": "a\udcff"}


def test_threads_that_write_the_same_file_take_turns(tmp_path: Path) -> None:
    contents = [bytes([number]) * 1000 for number in range(4)]
    faults: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                writers.write_files(tmp_path, {"one.bin": content})
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert (tmp_path / "one.bin").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["one.bin"]
