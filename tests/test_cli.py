"""The command line: results as files and JSON, errors as one line, exit codes."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from smooth_rt import cli
from smooth_rt.commands.show import show
from smooth_rt.errors import EngineError, InputError
from smooth_rt.evaluation import examples
from smooth_rt.model import Model, load_model
from smooth_rt.pipeline import SmoothPipeline

FAST = ["--num-inference-steps", "2"]


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Model:
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def eager(tiny: Model) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_pretrained(tiny, engine="eager") as pipe:
        yield pipe


@pytest.fixture
def opened(tiny: Model, eager: SmoothPipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The command line opens the same pipeline each time; the list holds what it asked for."""
    asked: list[tuple[Any, ...]] = []

    def from_pretrained(model: Model, *args: Any, **_: Any) -> SmoothPipeline:
        asked.append((model.source, *args))
        return eager

    def load_model(source: str, **_: Any) -> Model:
        return replace(tiny, source=source)

    monkeypatch.setattr("smooth_rt.model.load_model", load_model)
    monkeypatch.setattr(SmoothPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(SmoothPipeline, "close", lambda _: None)
    return asked


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds no pixel."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def refused(result: tuple[int, str, str], code: int = 2) -> str:
    """The one line on stderr of a command that failed, and printed nothing else."""
    assert (result[0], result[1]) == (code, "")
    lines = [line for line in result[2].splitlines() if line.startswith(("error: ", "interrupted"))]
    assert len(lines) == 1
    assert result[2].splitlines()[-1] == lines[0]
    assert "Traceback" not in result[2]
    return lines[0]


def test_generate(opened: list[Any], run: Any, tmp_path: Path) -> None:
    code, out, _ = run(
        "generate", "--prompt", "dog", "--prompt", "red apple", *FAST, "--output", tmp_path / "o", "--json", "--seed", 3
    )
    assert code == 0
    result = json.loads(out)
    assert result["engine"] == "eager"
    assert [Path(file).name for file in result["files"]] == ["image-001.png", "image-002.png", "sheet.png"]
    assert [iio.imread(file).shape for file in result["files"][:2]] == [(16, 16, 3)] * 2
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["image-001.png", "image-002.png", "sheet.png"]
    # The second image is the one that the next seed makes alone.
    run("generate", "--prompt", "red apple", *FAST, "--output", tmp_path / "alone", "--seed", 4)
    alone = iio.imread(tmp_path / "alone" / "image-001.png").astype(int)
    assert np.abs(alone - iio.imread(tmp_path / "o" / "image-002.png")).max() <= 1


def test_result_for_people(opened: list[Any], run: Any, tmp_path: Path) -> None:
    code, out, _ = run("generate", "--prompt", "dog", *FAST, "--output", tmp_path / "o")
    assert code == 0
    assert "engine: eager" in out
    assert str(tmp_path / "o" / "image-001.png") in out


@pytest.mark.parametrize("ends", [["--seeds", 1, 2, "--prompt", "dog"], ["--prompt", "dog", "--prompt", "red apple"]])
def test_interpolate_from_noise(opened: list[Any], run: Any, tmp_path: Path, ends: list[Any]) -> None:
    code, out, _ = run("interpolate", *ends, *FAST, "--frames", 3, "--output", tmp_path / "o", "--json")
    assert code == 0
    result = json.loads(out)
    names = [Path(file).name for file in result["files"]]
    assert names == ["frame-001.png", "frame-002.png", "frame-003.png", "sheet.png", "morph.mp4", "morph.webp"]
    assert iio.imread(result["files"][4], plugin="pyav").shape == (3, 256, 256, 3)
    with Image.open(result["files"][5]) as film:
        assert (film.n_frames, film.size) == (4, (256, 256))
    assert len(result["distances"]) == 2
    assert result["istd"] == pytest.approx(abs(result["distances"][0] - result["distances"][1]) / 2, rel=0.5)


def test_interpolate_images(opened: list[Any], run: Any, picture: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "interpolate", picture, picture, "--prompt", "dog", *FAST, "--frames", 2, "--output", tmp_path / "o", "--json"
    )
    assert code == 0
    assert len(json.loads(out)["files"]) == 5


@pytest.mark.parametrize("method", ["ddim", "ddim-without-text", "negative-prompt"])
def test_invert(opened: list[Any], run: Any, picture: Path, tmp_path: Path, method: str) -> None:
    from safetensors.numpy import load_file

    arguments = ["invert", picture, "--prompt", "dog", "--method", method, *FAST, "--output", tmp_path / "o", "--json"]
    code, out, _ = run(*arguments)
    assert code == 0
    result = json.loads(out)
    original, rebuilt = (iio.imread(tmp_path / "o" / f"{name}-001.png") for name in ("original", "reconstruction"))
    assert np.array_equal(original, iio.imread(picture))
    error = np.mean((original / 255.0 - rebuilt / 255.0) ** 2)
    assert result["psnr"] == [pytest.approx(-10 * np.log10(error), abs=0.1)]
    assert load_file(tmp_path / "o" / "noise.safetensors")["latents"].shape == (1, 4, 8, 8)


def test_the_noise_of_an_inversion_samples_back(opened: list[Any], run: Any, picture: Path, tmp_path: Path) -> None:
    common = ["--prompt", "dog", "--guidance-scale", 1, *FAST]
    assert run("invert", picture, *common, "--output", tmp_path / "o")[0] == 0
    noise = tmp_path / "o" / "noise.safetensors"
    assert run("generate", *common, "--latents", noise, "--output", tmp_path / "again")[0] == 0
    rebuilt, again = (
        iio.imread(tmp_path / name).astype(int) for name in ("o/reconstruction-001.png", "again/image-001.png")
    )
    assert np.abs(rebuilt - again).max() <= 1


@pytest.mark.parametrize("method", [["eq15", "--source-prompt", "dog"], ["sdedit"]])
def test_edit(opened: list[Any], run: Any, picture: Path, tmp_path: Path, method: list[str]) -> None:
    arguments = ["edit", picture, picture, "--prompt", "red apple", "--edit-method", *method, *FAST]
    code, out, _ = run(*arguments, "--output", tmp_path / "o", "--json")
    assert code == 0
    names = [Path(file).name for file in json.loads(out)["files"]]
    assert names == ["before-001.png", "before-002.png", "after-001.png", "after-002.png", "sheet.png"]
    assert not np.array_equal(iio.imread(tmp_path / "o" / "after-001.png"), iio.imread(picture))


def test_json_stands_alone_on_stdout(
    opened: list[Any], eager: SmoothPipeline, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SmoothPipeline.decode

    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("a library says something")
        return decode(*args, **kwargs)

    monkeypatch.setattr(SmoothPipeline, "decode", chatty)
    code, out, err = run("generate", "--prompt", "dog", *FAST, "--output", tmp_path / "o", "--json")
    assert code == 0
    assert json.loads(out)["command"] == "generate"
    assert "a library says something" in err


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], ("default", "default", 1.0, "auto")),
        (["--lora", "none"], ("default", None, 1.0, "auto")),
        (["--model", "some/model"], ("some/model", None, 1.0, "auto")),
        (
            ["--model", "m", "--lora", "l", "--lora-strength", "0.5", "--engine", "openvino"],
            ("m", "l", 0.5, "openvino"),
        ),
    ],
)
def test_which_lora(opened: list[Any], run: Any, tmp_path: Path, options: list[str], asked: tuple[Any, ...]) -> None:
    assert run("generate", "--prompt", "dog", *FAST, *options, "--output", tmp_path / "o")[0] == 0
    assert opened == [asked]


INVERT = ["invert", "PICTURE", "--prompt", "a"]
EDIT = ["edit", "PICTURE", "--prompt", "a", "--source-prompt", "b"]
BETWEEN = ["interpolate", "--prompt", "dog", "--seeds", 1, 2]
ALONG = ["interpolate", "PICTURE", "PICTURE", "--prompt", "a"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (INVERT, ()),
        ([*INVERT, "--method", "null-text"], ("text",)),
        ([*INVERT, "--method", "null-text", "--guidance-scale", 1], ()),  # which fits nothing
        ([*INVERT, "--method", "spdinv"], ("sample",)),
        ([*INVERT, "--method", "null-text", "--engine", "onnxruntime-cuda"], ("text",)),
        ([*INVERT, "--method", "null-text", "--engine", "inductor"], ()),  # has none: eager takes them, aloud
        ([*INVERT, "--method", "null-text", "--precision", "int8"], ()),
        ([*ALONG, "--method", "null-text"], ("text",)),
        ([*BETWEEN, "--method", "null-text"], ()),
        ([*EDIT, "--method", "spdinv"], ("sample",)),
        (["edit", "PICTURE", "--prompt", "a", "--edit-method", "sdedit", "--method", "spdinv"], ()),
        (["evaluate", "inversion", "--method", "null-text"], ("text",)),
        (["evaluate", "interpolation", "--method", "spdinv"], ("sample",)),
    ],
)
def test_engines_are_built_with_what_the_method_takes(
    run: Any,
    tiny: Model,
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[Any],
    wanted: tuple[str, ...],
) -> None:
    asked: list[Any] = []

    def from_pretrained(*_: Any, gradients: Any = (), **__: Any) -> SmoothPipeline:
        asked.append(tuple(gradients))
        raise InputError("far enough")

    monkeypatch.setattr("smooth_rt.model.load_model", lambda *_, **__: tiny)
    monkeypatch.setattr(SmoothPipeline, "from_pretrained", from_pretrained)
    named = [picture if part == "PICTURE" else part for part in arguments]
    assert "far enough" in refused(run(*named, "--output", tmp_path / "o"))
    assert asked == [wanted]


def test_gradients_that_cannot_be_built_are_left_to_eager_aloud(
    run: Any,
    tiny: Model,
    eager: SmoothPipeline,
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[Any] = []

    def from_pretrained(*_: Any, gradients: Any = (), **__: Any) -> SmoothPipeline:
        asked.append(tuple(gradients))
        if gradients or len(asked) > 2:
            raise EngineError("it takes more memory than there is")
        return eager

    monkeypatch.setattr("smooth_rt.model.load_model", lambda *_, **__: tiny)
    monkeypatch.setattr(SmoothPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(SmoothPipeline, "close", lambda _: None)
    arguments = ["invert", picture, "--prompt", "a", "--method", "null-text", *FAST, "--output", tmp_path / "o"]
    assert run(*arguments)[0] == 0
    assert "gradients: left to eager autograd, for they could not be built (it takes more memory" in caplog.text
    # What is no fault of theirs is said as it is, once.
    assert refused(run(*arguments)) == "error: it takes more memory than there is"
    assert asked == [("text",), (), ("text",), ()]


GENERATE = ["generate", "--prompt", "dog"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*GENERATE, "--height", 15], "height=15: give a multiple of"),
        ([*GENERATE, "--num-inference-steps", 0], "error: --num-inference-steps=0: "),
        ([*GENERATE, "--guidance-scale", "nan"], "error: --guidance-scale=nan: "),
        ([*GENERATE, "--seed", 2**65], "does not fit into 64 bits"),
        ([*GENERATE, "--convolution", "winograd"], "error: --convolution=winograd: chooses within a bundle"),
        ([*GENERATE, "--convolution", "fft"], "error: --convolution='fft' is unknown; it is one of direct, winograd"),
        ([*GENERATE, "--num-images-per-prompt", 0], "error: --num-images-per-prompt=0: "),
        (["generate"], "--prompt: missing"),
        ([*BETWEEN, "--frames", 1], "frames=1"),
        (["interpolate", "--prompt", "dog"], "give two images, --seeds A B, or --prompt twice"),
        ([*BETWEEN, "--prompt", "b", "--prompt", "c"], "prompts: 3 for 2 ends"),
        (["interpolate", "PICTURE", "--prompt", "dog"], "give the two ends"),
        (["interpolate", "PICTURE", "PICTURE", "--seeds", 1, 2], "the images or the seeds"),
        (["interpolate", "PICTURE", "MISSING", "--prompt", "dog"], "no such file"),
        (["invert", "PICTURE"], "needs one for each image"),
        (["invert", "PICTURE", "--prompt", "a", "--prompt", "b"], "prompts: 2 for 1 images"),
        (["invert", "PICTURE", "--prompt", "a", "--method", "magic"], "method='magic' is unknown"),
        (["invert", "TEXT", "--prompt", "a"], "not an image"),
        (["invert", "DOT", "--prompt", "a"], "1x1 px is too small"),
        (["invert", "HUGE", "--prompt", "a"], "too large"),
        (["invert", "PICTURE", "MISSING", "--prompt", "a"], "no such file"),
        ([*GENERATE, "--latents", "MISSING"], "--latents: "),
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
def test_bad_input(opened: list[Any], run: Any, tmp_path: Path, picture: Path, arguments: list[Any], said: str) -> None:
    (tmp_path / "text.png").write_text("this is no image")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 20_000))
    paths = {"PICTURE": picture, "MISSING": tmp_path / "missing.png", "TEXT": tmp_path / "text.png"}
    paths |= {
        "DOT": tmp_path / "dot.png",
        "HUGE": tmp_path / "huge.png",
        "LORA": examples()[0].path.parents[1] / "smooth_lora.safetensors",
    }
    fast = [] if "--num-inference-steps" in arguments else FAST
    line = refused(run(*(paths.get(a, a) for a in arguments), *fast, "--output", tmp_path / "out"))
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
    opened: list[Any], run: Any, tmp_path: Path, picture: Path, arguments: list[str]
) -> None:
    from safetensors.torch import save_file

    paths = {name: tmp_path / f"{name.lower()}.safetensors" for name in ("NOISE", "NAN", "ABSURD")}
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, paths["NOISE"])
    save_file({"latents": torch.full((1, 4, 8, 8), math.nan)}, paths["NAN"])
    header = b'{"latents":{"dtype":"F32","shape":[0,4,9223372036854775808,2],"data_offsets":[0,0]}}'
    paths["ABSURD"].write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "text.png").write_text("this is no image")
    paths |= {"PICTURE": picture, "TEXT": tmp_path / "text.png"}
    line = refused(run(*(paths.get(a, a) for a in arguments), "--output", tmp_path / "out"))
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
    run: Any, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str
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
    line = refused(run(*(paths.get(a, a) for a in command), "--output", tmp_path / "mine" / ".." / "mine"))
    assert "would replace the input" in line
    assert str(given) in line
    assert given.read_bytes() == before
    assert len(list(mine.iterdir())) == 2


def test_other_files_of_the_same_names_are_replaced(opened: list[Any], run: Any, tmp_path: Path) -> None:
    (tmp_path / "image-001.png").write_text("old")
    assert run(*GENERATE, *FAST, "--output", tmp_path)[0] == 0
    assert iio.imread(tmp_path / "image-001.png").shape == (16, 16, 3)


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
        (["engines", "verify", "MISSING"], "no such bundle"),
        (["engines", "inspect", "MISSING"], "no such bundle"),
        (["train", "smooth-lora", "--model", "TINY", "--data", "MISSING"], "no such folder"),
        (["train", "tiny", "--data", "MISSING", "--stages", "magic"], "'magic'"),
    ],
)
def test_bad_sources(run: Any, tmp_path: Path, tiny_model: Path, arguments: list[str], said: str) -> None:
    paths = {"TINY": tiny_model, "MISSING": tmp_path / "missing.safetensors"}
    output = [] if arguments[0] == "engines" else ["--output", tmp_path / "out"]
    line = refused(run(*(paths.get(a, a) for a in arguments), *output))
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
def test_usage_errors(run: Any, arguments: list[str], said: str) -> None:
    assert said in refused(run(*arguments))


@pytest.mark.parametrize("command", [GENERATE, BETWEEN, ["fuse", "--lora", "x"], ["build-engine"], ["demo"]])
def test_output_under_a_file_is_refused_before_any_work(
    run: Any, tmp_path: Path, command: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    for place in ("smooth_rt.pipeline.SmoothPipeline.from_pretrained", "smooth_rt.model.load_model"):
        monkeypatch.setattr(place, work)
    monkeypatch.setattr("smooth_rt.build.ensure_engines", work)
    (tmp_path / "file").write_text("x")
    line = refused(run(*command, "--output", tmp_path / "file" / "out"))
    assert f"{tmp_path / 'file'} is a file" in line


def test_full_disk(opened: list[Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    line = refused(run(*GENERATE, *FAST, "--output", tmp_path / "out"))
    assert "image-001.png: cannot be written: No space left on device; free some space" in line
    assert list(tmp_path.iterdir()) == []


def test_interrupt(opened: list[Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SmoothPipeline, "denoise", interrupt)
    line = refused(run(*GENERATE, *FAST, "--output", tmp_path / "out", "--json"), 130)
    assert line.startswith("interrupted; ")
    assert list(tmp_path.iterdir()) == []


def test_fault_of_the_program(opened: list[Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(SmoothPipeline, "denoise", fail)
    line = refused(run(*GENERATE, *FAST, "--output", tmp_path / "out"), 1)
    assert "ZeroDivisionError: by zero" in line
    assert "--debug" in line
    code, _, err = run(*GENERATE, *FAST, "--output", tmp_path / "out", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in fail" in err


def test_debug_shows_where_an_error_was_raised(opened: list[Any], run: Any, tmp_path: Path) -> None:
    code, _, err = run(*GENERATE, "--height", 15, "--output", tmp_path / "out", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: --height=15")


def test_engines_of_an_empty_cache(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    code, out, _ = run("engines", "list", "--json")
    assert (code, json.loads(out)) == (0, {"cache": str(tmp_path), "bundles": []})


def test_prune_removes_what_is_damaged(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    broken = tmp_path / "bundles" / "broken"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    _, out, _ = run("engines", "list", "--json")
    assert "not JSON" in json.loads(out)["bundles"][0]["fault"]
    code, out, _ = run("engines", "prune", "--json")
    assert (code, [row["path"] for row in json.loads(out)["removed"]]) == (0, [str(broken)])
    assert not broken.exists()


def test_bench_passes_its_arguments_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.__main__

    seen: list[str] = []
    monkeypatch.setattr(bench.__main__, "run", seen.extend)
    assert run("bench", "--quick", "--help", "x")[0] == 0
    assert seen == ["--quick", "--help", "x"]


def test_bench_of_another_distribution(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name == "bench" or name.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"bench: is {tmp_path / 'bench'}, another project's" in refused(run("bench"))


def test_no_arguments_is_help(run: Any) -> None:
    code, out, _ = run()
    assert code == 0
    for command in ("demo", "generate", "interpolate", "invert", "edit", "fuse", "build-engine", "engines", "bench"):
        assert command in out
    assert "130, 143, 129 after Ctrl-C, SIGTERM, SIGHUP" in " ".join(out.split())


def test_version(run: Any) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip()


def test_tables_keep_words_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{"engine": "onnxruntime", "seconds": f"{value:.2f}", "name": "ab" * 16} for value in (1.5, 12.25)]
    show({"command": "x", "results": rows, "left": None, "share": math.nan, "kept": True}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "results:"
    assert [line.split() for line in lines[-4:-2]] == [
        ["onnxruntime", "1.50", "ab" * 16], ["onnxruntime", "12.25", "ab" * 16],
    ]  # fmt: skip
    assert lines[-4].index("1.50") == lines[-3].index("12.25") + 1
    assert lines[-2:] == ["share: nan", "kept: yes"]
    show({"command": "x", "share": math.nan, "rows": [{"a": math.inf}]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"command": "x", "share": None, "rows": [{"a": None}]}
