"""Whatever a caller has becomes [N, 3, H, W] in 0..1, or one line that says why not."""

from __future__ import annotations

import io
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


@pytest.mark.parametrize("values", [np.full((8, 8, 3), 51, np.uint8), np.full((8, 8), 13107, np.uint16)])
def test_unreadable_exif_leaves_the_image_as_it_is(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.png", exif=b"Exif\0\0" + b"garbage" * 5)
    torch.testing.assert_close(read(tmp_path / "a.png", 8, 8), torch.full((1, 3, 8, 8), 0.2))


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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, bits: int, colours: int, key: tuple[int, ...] = (), exif: bytes = b"") -> io.BytesIO:
    """A PNG as Pillow does not write it: of any depth, with a transparent colour and EXIF."""
    rows = b""
    for row in pixels:
        values = row.reshape(-1)
        if bits < 8:  # several in a byte
            packed = values.reshape(-1, 8 // bits) << np.arange(8 - bits, -1, -bits)
            values = packed.sum(axis=1)
        rows += b"\0" + values.astype(">u2" if bits == 16 else np.uint8).tobytes()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colours, 0, 0, 0))
    more = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    more += chunk(b"eXIf", exif) if exif else b""
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def half(key: Any, other: Any) -> tuple[np.ndarray, torch.Tensor]:
    """8x8 values, the upper half `key`, and where they are opaque."""
    values = np.empty((8, 8, len(key)), dtype=np.int64)
    values[:4], values[4:] = key, other
    return values, torch.arange(8) >= 4


@pytest.mark.parametrize(("bits", "key"), [(1, 1), (2, 2), (4, 9), (8, 77), (16, 1000)])
def test_transparent_grey_is_white(bits: int, key: int) -> None:
    other = key - 1
    values, opaque = half((key,), other)
    found = read(Image.open(png(values, bits, 0, (key,))), 8, 8)[0]
    assert torch.all(found[:, ~opaque] == 1)
    torch.testing.assert_close(found[:, opaque], torch.full((3, 4, 8), other / (2**bits - 1)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "key"), [(8, (3, 7, 11)), (16, (1000, 2000, 3000))])
def test_transparent_colour_is_white_and_its_neighbour_is_not(bits: int, key: tuple[int, int, int]) -> None:
    other = (key[0] + 1, *key[1:])
    values, opaque = half(key, other)
    found = read(Image.open(png(values, bits, 2, key)), 8, 8)[0]
    assert torch.all(found[:, ~opaque] == 1)
    wanted = torch.tensor(other)[:, None, None].expand(3, 4, 8) / (2**bits - 1)
    torch.testing.assert_close(found[:, opaque], wanted, atol=1e-6, rtol=0)


def test_transparent_colour_of_a_decoded_image() -> None:
    values, opaque = half((1000, 2000, 3000), 40000)
    image = Image.open(png(values, 16, 2, (1000, 2000, 3000)))
    image.load()
    found = read(image, 8, 8)[0]
    assert torch.all(found[:, ~opaque] == 1)
    torch.testing.assert_close(found[:, opaque], torch.full((3, 4, 8), 40000 / 65535), atol=1 / 255, rtol=0)


@pytest.mark.parametrize(("colours", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bit_colours_keep_their_precision(tmp_path: Path, colours: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, channels))
    (tmp_path / "deep.png").write_bytes(png(values, 16, colours).getvalue())
    wanted = torch.from_numpy(values).permute(2, 0, 1).double() / 65535
    if channels == 4:
        wanted = wanted[:3] * wanted[3:] + (1 - wanted[3:])
    image = Image.open(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", image, image):  # reading leaves an image as it was
        torch.testing.assert_close(read(source, 8, 8)[0].double(), wanted, atol=1e-6, rtol=0)
    image.close()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bit_colours_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    written = exif.tobytes().removeprefix(b"Exif\0\0")
    decoded = Image.open(png(values, 16, 2, exif=written))
    decoded.load()  # to 8 bits, which Pillow turns
    found = read(Image.open(png(values, 16, 2, exif=written)), 8, 8)
    torch.testing.assert_close(found, read(decoded, 8, 8), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("cut", [40, 200])
def test_sixteen_bit_colours_that_are_cut_off_are_damaged(tmp_path: Path, cut: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    (tmp_path / "cut.png").write_bytes(png(values, 16, 2).getvalue()[:-cut])
    with pytest.raises(InputError, match=r"cut\.png: the image is damaged"):
        read(tmp_path / "cut.png", 8, 8)


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
def test_deep_grey_is_scaled(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(np.full((8, 8), 13107, dtype=kind))
    image.save(tmp_path / "deep.tif")
    for source in (image, tmp_path / "deep.tif"):
        torch.testing.assert_close(read(source, 8, 8), torch.full((1, 3, 8, 8), 0.2))


def test_mode_i_holds_eight_bits_or_sixteen(tmp_path: Path) -> None:
    torch.testing.assert_close(read(Image.new("I", (8, 8), 51), 8, 8), torch.full((1, 3, 8, 8), 0.2))
    torch.testing.assert_close(read(Image.new("I", (8, 8), 13107), 8, 8), torch.full((1, 3, 8, 8), 0.2))
    dark = np.full((8, 8), 200, dtype=">u2").tobytes()
    (tmp_path / "dark.pgm").write_bytes(b"P5 8 8 65535\n" + dark)
    torch.testing.assert_close(read(tmp_path / "dark.pgm", 8, 8), torch.full((1, 3, 8, 8), 200 / 65535))
    for value in (70000, -1):
        with pytest.raises(InputError, match=rf"values from {value} to {value} in a 32-bit image, whose range is not"):
            read(Image.new("I", (8, 8), value), 8, 8)


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("1", 1, (1, 1, 1)),
        ("LA", (51, 128), (1 - 128 / 255 * 0.8,) * 3),
        ("La", (51, 128), (1 - 128 / 255 + 0.2,) * 3),
        ("RGBa", (51, 0, 0, 128), (1 - 128 / 255 + 0.2, 1 - 128 / 255, 1 - 128 / 255)),
        ("PA", (0, 0), (1, 1, 1)),
        ("CMYK", (0, 255, 255, 0), (1, 0, 0)),
        ("YCbCr", (255, 128, 128), (1, 1, 1)),
        ("HSV", (0, 255, 255), (1, 0, 0)),
    ],
)
def test_other_modes(mode: str, colour: Any, wanted: tuple[float, float, float]) -> None:
    found = read(Image.new(mode, (8, 8), colour), 8, 8)[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), atol=1.5 / 255, rtol=0)


def test_partly_transparent_palette_is_composited() -> None:
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = bytes([128])
    wanted = torch.tensor([1, 1 - 128 / 255, 1 - 128 / 255])
    torch.testing.assert_close(read(palette, 8, 8)[0, :, 0, 0], wanted, atol=1 / 255, rtol=0)


def test_image_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.testing.assert_close(read("~/a.png", 8, 8), EXPECTED)
