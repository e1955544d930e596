"""Whatever a caller has becomes [N, 3, H, W] in 0..1, or one line that says why not."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smooth_rt.errors import InputError
from smooth_rt.images import as_list, read, to_images
from smooth_rt.ranges import MAX_SIDE

RAMP = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
EXPECTED = torch.from_numpy(RAMP).permute(2, 0, 1)[None] / 255


def test_every_form_of_one_image_reads_the_same(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    tensor = torch.from_numpy(RAMP).permute(2, 0, 1)
    forms: list[Any] = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(RAMP), RAMP, RAMP.astype(np.float32) / 255,
        tensor, tensor / 255, tensor[None] / 255,
    ]  # fmt: skip
    for form in forms:
        torch.testing.assert_close(read(form, 8, 8), EXPECTED)
    assert read(forms, 8, 8).shape == (len(forms), 3, 8, 8)
    assert len(as_list(torch.zeros(5, 3, 8, 8))) == 5


def test_alpha_lies_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read(clear, 8, 8).min() == 1
    half = np.zeros((8, 8, 4), dtype=np.float32)
    half[..., 3] = 0.25
    torch.testing.assert_close(read(half, 8, 8), torch.full((1, 3, 8, 8), 0.75))
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert read(palette, 8, 8).min() == 1


def test_grey_and_sixteen_bits(tmp_path: Path) -> None:
    assert torch.equal(read(Image.new("L", (8, 8), 51), 8, 8), torch.full((1, 3, 8, 8), 0.2))
    Image.fromarray(np.full((8, 8), 13107, dtype=np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(read(tmp_path / "deep.png", 8, 8), torch.full((1, 3, 8, 8), 0.2))
    assert read(np.zeros((8, 8)), 8, 8).shape == (1, 3, 8, 8)


def test_exif_orientation(tmp_path: Path) -> None:
    left = np.zeros((8, 8, 3), dtype=np.uint8)
    left[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(left).save(tmp_path / "turned.png", exif=exif)
    turned = read(tmp_path / "turned.png", 8, 8)[0, 0]
    assert turned[:, :4].max() == 0
    assert turned[:, 4:].min() == 1


def test_cover_and_centre_crop() -> None:
    wide = np.zeros((8, 24, 3), dtype=np.float32)
    wide[:, 8:16] = 1
    assert read(wide, 8, 8).min() == 1
    enlarged = read(wide, 16, 16)
    assert enlarged.shape == (1, 3, 16, 16)
    assert enlarged[..., 4:12].min() > 0.99
    assert enlarged.min() >= 0
    assert enlarged.max() <= 1


def test_out_again() -> None:
    (image,) = to_images(EXPECTED, "pil")
    assert np.array_equal(np.asarray(image), RAMP)
    array = to_images(EXPECTED, "np")
    assert isinstance(array, np.ndarray)
    assert array.shape == (1, 8, 8, 3)
    assert to_images(EXPECTED, "pt") is EXPECTED


def bomb(path: Path, side: int) -> Path:
    """A PNG that claims side x side pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [MAX_SIDE + 1, 20_000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    with pytest.raises(InputError, match=r"bomb\.png: .*too large; give at most 10000 px") as caught:
        read(bomb(tmp_path / "bomb.png", side), 8, 8)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_file_with_an_image(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no image")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:4000])
    for name, said in (
        ("note.png", "not an image"),
        ("cut.png", "damaged"),
        ("none.png", "no such file"),
        ("", "image"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            read(tmp_path / name, 8, 8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("RGB", (1, 1)), "1x1 px is too small"),
        (np.zeros((1, 1, 3)), "1x1 px is too small"),
        (np.zeros((8, 8, 2)), r"shape \[8, 8, 2\]"),
        (np.zeros((8, 8, 3), dtype=np.int64), "int64"),
        (np.full((8, 8, 3), 2.0), "values from 2 to 2"),
        (np.full((8, 8, 3), np.nan), "NaN"),
        (torch.full((3, 8, 8), -1.0), "values from -1 to -1"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "int32"),
        (torch.zeros(8), r"shape \[8\]"),
        (torch.tensor(1.0), r"shape \[\]"),
        (torch.zeros(3, 8, 8).to_sparse(), "images: a nested or sparse tensor"),
        ([torch.zeros(3, 8, 8, device="meta")], "image 1 of 1: a tensor on 'meta' has no values"),
        ("a" * 5000, "image 'a{59}...: File name too long; check the path"),
        (7, "int is not an image"),
        ([7], "int is not an image"),
        ([], "list is empty"),
        (Image.new("F", (8, 8)), "float image"),
        (np.zeros((4, 9_000, 3), dtype=np.uint8), "cannot cover"),
    ],
)
def test_bad_images(image: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read(image, 512, 512)
    assert "\n" not in str(caught.value)
