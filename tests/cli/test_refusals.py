"""What a command refuses: exit code 2 and one line, before it works and without a trace on the disk."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from smooth_rt.evaluation import examples

FAST = ["--num-inference-steps", "2"]
GENERATE = ["generate", "--prompt", "dog"]
BETWEEN = ["interpolate", "--prompt", "dog", "--seeds", 1, 2]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds no pixel."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*GENERATE, "--height", 15], "height=15: give a multiple of"),
        ([*GENERATE, "--num-inference-steps", 0], "error: --num-inference-steps=0: "),
        ([*GENERATE, "--guidance-scale", "nan"], "error: --guidance-scale=nan: "),
        ([*GENERATE, "--guidance-scale", "1e30"], "error: --guidance-scale=1e+30: give a number from -1000 to 1000"),
        ([*GENERATE, "--engines", "x", "--model-config", "y"], "error: --model-config: with --engines it is read for"),
        ([*GENERATE, "--seed", 2**65], "does not fit into 64 bits"),
        ([*GENERATE, "--convolution", "winograd"], "error: --convolution=winograd: chooses within a bundle"),
        ([*GENERATE, "--convolution", "fft"], "error: --convolution='fft' is unknown; it is one of direct, winograd"),
        ([*GENERATE, "--kernels", "own"], "error: --kernels='own' is unknown; it is one of backend, native"),
        ([*GENERATE, "--num-images-per-prompt", 0], "error: --num-images-per-prompt=0: "),
        (["generate"], "--prompt: missing"),
        ([*BETWEEN, "--frames", 1], "frames=1"),
        (["interpolate", "--prompt", "dog"], "give two images, --seeds A B, or --prompt twice"),
        ([*BETWEEN, "--prompt", "b", "--prompt", "c"], "prompts: 3 for 2 ends"),
        (["interpolate", "PICTURE", "--prompt", "dog"], ".png); give the two ends"),
        (["interpolate", "PICTURE", "PICTURE", "--seeds", 1, 2], "the images or the seeds"),
        (["interpolate", "PICTURE", "MISSING", "--prompt", "dog"], "no such file"),
        (["invert", "PICTURE"], "error: --prompt: method 'ddim' needs one for each image; give it"),
        (["invert", "PICTURE", "--prompt", "a", "--prompt", "b"], "error: --prompt: 2 for 1 images"),
        (["invert", "PICTURE", "--prompt", "a", "--method", "magic"], "method='magic' is unknown"),
        (["invert", "TEXT", "--prompt", "a"], "not an image"),
        (["invert", "DOT", "--prompt", "a"], "1x1 px is too small"),
        (["invert", "HUGE", "--prompt", "a"], "too large"),
        (["invert", "PICTURE", "MISSING", "--prompt", "a"], "no such file"),
        ([*GENERATE, "--latents", "MISSING"], "--latents: "),
        ([*GENERATE, "--latents", "FIFO"], "fifo: not a file; name the noise.safetensors"),
        ([*GENERATE, "--latents", "TEXT"], "no safetensors file"),
        ([*GENERATE, "--latents", "LORA"], "no float32 tensor named latents"),
        (["edit", "PICTURE", "--prompt", "a"], "eq15 needs what each image shows now"),
        (["edit", "PICTURE"], "--prompt: missing"),
        (
            ["edit", "PICTURE", "--prompt", "a", "--edit-method", "sdedit", "--edit-strength", 2],
            "error: --edit-strength=2",
        ),
        (["edit", "PICTURE", "--prompt", "a", "--edit-method", "x"], "error: --edit-method='x' is unknown"),
    ],
)
def test_bad_input(
    opened: list[Any], refused: Any, tmp_path: Path, picture: Path, arguments: list[Any], said: str
) -> None:
    (tmp_path / "text.png").write_text("this is no image")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 20_000))
    paths = {"PICTURE": picture, "MISSING": tmp_path / "missing.png", "TEXT": tmp_path / "text.png"}
    paths |= {
        "DOT": tmp_path / "dot.png",
        "HUGE": tmp_path / "huge.png",
        "FIFO": tmp_path / "fifo",
        "LORA": examples()[0].path.parents[1] / "smooth_lora.safetensors",
    }
    fast = [] if "--num-inference-steps" in arguments else FAST
    line = refused(*(paths.get(a, a) for a in arguments), *fast, "--output", tmp_path / "out")
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["invert", "PICTURE"],
        ["invert", "PICTURE", "PICTURE", "--prompt", "a", "--prompt", "b", "--prompt", "c"],
        ["interpolate", "PICTURE", "PICTURE", "--method", "magic"],
        ["interpolate", "PICTURE", "PICTURE", "PICTURE", "--prompt", "a"],
        ["invert", "TEXT", "--prompt", "a"],
        ["interpolate", "PICTURE", "TEXT", "--prompt", "a"],
        ["edit", "TEXT", "--prompt", "a", "--source-prompt", "b"],
        ["interpolate", "--seeds", "1", "2"],
        ["interpolate", "--prompt", "a", "--prompt", "b", "--prompt", "c"],
        ["generate", "--prompt", "a", "--prompt", "b", "--latents", "NOISE"],
        ["generate", "--prompt", "a", "--latents", "NAN"],
        ["generate", "--prompt", "a", "--latents", "ABSURD"],
    ],
)
def test_what_an_inversion_lacks_is_said_before_anything_is_opened(
    opened: list[Any], refused: Any, tmp_path: Path, picture: Path, arguments: list[str]
) -> None:
    from safetensors.torch import save_file

    paths = {name: tmp_path / f"{name.lower()}.safetensors" for name in ("NOISE", "NAN", "ABSURD")}
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, paths["NOISE"])
    save_file({"latents": torch.full((1, 4, 8, 8), math.nan)}, paths["NAN"])
    header = b'{"latents":{"dtype":"F32","shape":[0,4,9223372036854775808,2],"data_offsets":[0,0]}}'
    paths["ABSURD"].write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "text.png").write_text("this is no image")
    paths |= {"PICTURE": picture, "TEXT": tmp_path / "text.png"}
    line = refused(*(paths.get(a, a) for a in arguments), "--output", tmp_path / "out")
    if "--latents" in arguments:
        assert line.startswith(f"error: --latents: {paths[arguments[-1]]}: ")
    assert opened == []


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["invert", "PICTURE", "--prompt", "a"], "original-001.png"),
        (["edit", "PICTURE", "--prompt", "a", "--edit-method", "sdedit"], "before-001.png"),
        (["interpolate", "PICTURE", "PICTURE", "--prompt", "a"], "frame-002.png"),
        (["invert", "SHIPPED", "--prompt", "a", "--lora", "PICTURE"], "noise.safetensors"),
        (["evaluate", "istd", "--prompts", "PICTURE"], "istd.json"),
        (["evaluate", "inversion", "--data", "FOLDER"], "inversion.json"),
    ],
)
def test_an_input_is_never_replaced(
    refused: Any, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr("smooth_rt.model.load_model", work)
    monkeypatch.setattr("smooth_rt.pipeline.load_model", work)
    mine = tmp_path / "mine"
    mine.mkdir()
    given = picture.rename(mine / name)
    (mine / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a dog"}))
    if command[1] == "istd":
        given.write_text("a dog")
    before = given.read_bytes()
    paths = {"PICTURE": given, "FOLDER": mine, "SHIPPED": examples()[0].path}
    line = refused(*(paths.get(a, a) for a in command), "--output", tmp_path / "mine" / ".." / "mine")
    assert "would replace the input" in line
    assert str(given) in line
    assert given.read_bytes() == before
    assert len(list(mine.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*GENERATE, "--model", "no/where/at/all"], "no/where/at/all"),
        ([*GENERATE, "--model", "TINY", "--engine", "quantum"], "engine 'quantum': unknown"),
        ([*GENERATE, "--model", "TINY", "--engine", "tensorrt"], "tensorrt"),
        ([*GENERATE, "--model", "TINY", "--lora", "MISSING"], "missing.safetensors"),
        ([*GENERATE, "--engines", "MISSING"], "no such bundle"),
        ([*GENERATE, "--engines", "MISSING", "--lora", "none"], "--engines: the bundle holds its model"),
        (["fuse", "--model", "TINY"], "--lora: missing"),
        (["fuse", "--model", "TINY", "--lora", "MISSING"], "missing.safetensors"),
        (["build-engine", "--model", "TINY", "--backend", "eager"], "nothing to build"),
        (["build-engine", "--model", "TINY", "--backend", ","], "backends: none named"),
        (["build-engine", "--model", "TINY", "--backend", "auto"], "to build for it; choose from onnxruntime, "),
        (["build-engine", "--model", "TINY", "--gradients", ","], "--gradients=',': names none; name at least one"),
        (["engines", "verify", "MISSING"], "no such bundle"),
        (["engines", "verify", "MISSING", "--parity", "--seed", "-99999999999999999999"], "does not fit into 64 bits"),
        (["engines", "inspect", "MISSING"], "no such bundle"),
        (["train", "smooth-lora", "--model", "TINY", "--data", "MISSING"], "no such folder"),
        (["train", "tiny", "--data", "MISSING", "--stages", "magic"], "'magic'"),
    ],
)
def test_bad_sources(refused: Any, tmp_path: Path, tiny_model: Path, arguments: list[str], said: str) -> None:
    paths = {"TINY": tiny_model, "MISSING": tmp_path / "missing.safetensors"}
    output = [] if arguments[0] == "engines" else ["--output", tmp_path / "out"]
    line = refused(*(paths.get(a, a) for a in arguments), *output)
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--no-such-option"], "No such option: --no-such-option; see `smooth-rt generate --help`"),
        (["no-such-command"], "No such command 'no-such-command'"),
        (["engines"], "Missing command; see `smooth-rt engines --help`"),
        (["generate", "--seed", "x"], "Invalid value for '--seed'"),
        (["interpolate", "--seeds", "1"], "--seeds"),
        (["fuse"], "Missing option '--output'"),
    ],
)
def test_usage_errors(refused: Any, arguments: list[str], said: str) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize("command", [GENERATE, BETWEEN, ["fuse", "--lora", "x"], ["build-engine"], ["demo"]])
def test_output_under_a_file_is_refused_before_any_work(
    refused: Any, tmp_path: Path, command: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    for place in ("smooth_rt.pipeline.SmoothPipeline.from_pretrained", "smooth_rt.model.load_model"):
        monkeypatch.setattr(place, work)
    monkeypatch.setattr("smooth_rt.build.ensure_engines", work)
    (tmp_path / "file").write_text("x")
    line = refused(*command, "--output", tmp_path / "file" / "out")
    assert f"{tmp_path / 'file'} is a file" in line


def test_full_disk(opened: list[Any], refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    line = refused(*GENERATE, *FAST, "--output", tmp_path / "out")
    assert "image-001.png: cannot be written: No space left on device; free some space" in line
    assert list(tmp_path.iterdir()) == []


def test_auto_is_named_where_it_can_be_taken(refused: Any, picture: Path) -> None:
    asked = [picture, "--prompt", "a", "--method", "magic"]
    assert refused("invert", *asked).endswith("edict, belm, auto")
    for other in (["edit", *asked, "--source-prompt", "b"], ["interpolate", picture, *asked]):
        assert refused(*other).endswith("edict, belm")
