"""Values of options that nothing can be done with: exit code 2, and one line that names the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from smooth_rt import cli

GENERATE = ["generate", "--prompt", "dog"]
EDIT = ["edit", "a.png", "b.png", "--prompt", "a"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which an empty path would mean; no command may get as far as a model."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    for place in (
        "pipeline.SmoothPipeline.from_pretrained",
        "pipeline.SmoothPipeline.from_engines",
        "model.load_model",
    ):
        monkeypatch.setattr(f"smooth_rt.{place}", work)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(empty_folder: Path) -> None:
    """The files that EDIT names, so that it gets beyond looking for them."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(empty_folder / name)


def test_an_image_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([*EDIT, "--source-prompt", "b"], ["invert", "a.png", "--prompt", "a"]):
        assert refused(capsys, arguments) == "error: a.png: no such file; name an image"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*GENERATE, "--lora", ""], "--lora"),
        ([*GENERATE, "--lora="], "--lora"),
        ([*GENERATE, "--model", ""], "--model"),
        ([*GENERATE, "--model", " "], "--model"),
        ([*GENERATE, "--engines", ""], "--engines"),
        ([*GENERATE, "--output", ""], "--output"),
        ([*GENERATE, "--seed", ""], "--seed"),
        (["interpolate", "--seeds", "1", ""], "--seeds"),
        (["interpolate", "a.png", "", "--prompt", "a"], "A B"),
        (["invert", ""], "IMAGE"),
        (["engines", "inspect", ""], "BUNDLE"),
        (["engines", "verify", "a", ""], "BUNDLE"),
        (["fuse", "--output", ""], "--output"),
        (["build-engine", "--output", ""], "--output"),
        (["demo", "--output", ""], "--output"),
        (["train", "tiny", "--output", "o", "--data", ""], "--data"),
        (["evaluate", "istd", "--prompts", ""], "--prompts"),
    ],
)
def test_empty(capsys: pytest.CaptureFixture[str], empty_folder: Path, arguments: list[str], named: str) -> None:
    assert refused(capsys, arguments) == f"error: {named}: empty; give a value, or leave it out"
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["generate", "--prompt", ""], [*GENERATE, "--negative-prompt", ""], [*EDIT, "--source-prompt", ""]]
)
@pytest.mark.usefixtures("images")
def test_the_empty_prompt_is_a_prompt(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 1
    assert "AssertionError: began to work" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt"])
def test_a_prompt_that_is_not_utf8(capsys: pytest.CaptureFixture[str], option: str) -> None:
    line = refused(capsys, [*GENERATE, option, "a\udcff"])
    assert line == f"error: {option}: character 2 is not valid UTF-8; type the prompt as UTF-8"


@pytest.mark.parametrize("strength", ["nan", "inf", "-0.1", "1.5"])
def test_edit_strength(capsys: pytest.CaptureFixture[str], strength: str) -> None:
    line = refused(capsys, [*EDIT, "--edit-method", "sdedit", "--edit-strength", strength])
    assert line == f"error: --edit-strength={strength}: give a number from 0 to 1"


@pytest.mark.usefixtures("images")
def test_steps_beyond_any_float(capsys: pytest.CaptureFixture[str]) -> None:
    # Only the model's schedule knows how many there are.
    assert cli.main([*EDIT, "--edit-method", "sdedit", "--num-inference-steps", "9" * 400]) == 1
    assert "AssertionError: began to work" in capsys.readouterr().err


@pytest.mark.parametrize("command", [GENERATE, ["build-engine"], ["demo"], ["invert", "a.png"]])
def test_an_output_with_too_long_a_name(
    capsys: pytest.CaptureFixture[str], empty_folder: Path, command: list[str]
) -> None:
    line = refused(capsys, [*command, "--output", "a" * 300])
    assert line == f"error: {'a' * 60}...: File name too long; name another folder with --output"
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_input_with_too_long_a_name(capsys: pytest.CaptureFixture[str], command: str) -> None:
    line = refused(capsys, ["engines", command, "a" * 300])
    assert line == f"error: {'a' * 60}...: File name too long; give a shorter path"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["interpolate", "--seeds", "1", "2", "3"], "--seeds: takes two values"),
        (["interpolate", "--seeds", "1", "--prompt", "a"], "--seeds: takes 2 values; got 1 --prompt"),
        (["interpolate", "--prompt", "a", "--seeds", "1"], "Option '--seeds' requires 2 arguments"),
        ([*EDIT, "--source-prompt", "a", *["--source-prompt", "b"] * 2], "--source-prompt: 3 for 2 images; give one"),
        (EDIT, "--source-prompt: missing; eq15 needs"),
        ([*EDIT, "--prompt", "b", "--prompt", "c"], "--prompt: 3 for 2 images; give one"),
    ],
)
def test_wrong_numbers(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert refused(capsys, arguments).startswith(f"error: {said}")


def test_a_missing_default_lora(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smooth_rt.errors import ModelError
    from smooth_rt.lora import read

    monkeypatch.setattr(read, "default_lora", lambda: empty_folder / "gone.safetensors")
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing; .* or give `--lora none`"):
        read.read_lora()
