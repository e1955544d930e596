"""The command line: what is refused, in one line and with exit code 2, before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.options import parse


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "--repeats=0: give a whole number from 1 to 10000"),
        (["--repeats", "9" * 20], f"--repeats={'9' * 20}: give a whole number from 1 to 10000"),
        (["--repeats", "many"], "--repeats"),
        (["--warmup", "-1"], "--warmup=-1: give a whole number from 0 to 10000"),
        (["--frames", "1"], "--frames=1: give a whole number from 2 to 10000"),
        (["--num-inference-steps", "0"], "--num-inference-steps=0"),
        (["--num-inference-steps", "1001"], "--num-inference-steps=1001: give a whole number from 1 to 999"),
        (["--seed", str(2**70)], f"--seed={2**70}: does not fit into 64 bits"),
        (["--seed", str(2**64 - 1)], f"--seed={2**64}: does not fit into 64 bits"),
        (["--seed", "-1"], "--seed=-1: give a whole number of at least 0"),
        (["--lora-strength", "1e9"], "--lora-strength=1000000000.0: give a number from -100 to 100"),
        (["--prompt", "a\udcff"], "--prompt: character 2 is not valid UTF-8"),
        (["--lora", "a\udcff"], "--lora: character 2 is not valid UTF-8"),
        (["--lora", " "], "--lora=' ': empty"),
        (["--batch-sizes", "1,100000"], "'1,100000' is not a list of whole numbers from 1 to 10000"),
        (["--model-config", "some/where"], "--model-config (in Python: config=) is for a .safetensors checkpoint"),
        (["--batch-sizes", "1,0"], "'1,0' is not a list of whole numbers from 1 to 10000"),
        (["--batch-sizes", "one"], "'one' is not a list"),
        (["--batch-sizes", ""], "not a list"),
        (["--engine", ","], "--engine: empty; name one or more of auto, eager"),
        (["--guidance-scale", "nan"], "--guidance-scale=nan"),
        (["--guidance-scale", "0.5"], "at least 1"),
        (["--lora-strength", "inf"], "--lora-strength=inf"),
        (["--prompt", " "], "--prompt: empty"),
        (["--speed", "high"], "unrecognized arguments"),
        (["--engine", "quantum"], "--engine: 'quantum' is unknown; name one or more of auto, eager"),
        (["--engine", "eager,tensorrt"], "engine 'tensorrt'"),
    ],
)
def test_refused(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("began to build")

    monkeypatch.setattr("bench.subject.build_engines", build)
    output = tmp_path / "results"
    assert main(["--quick", "--model", str(tiny_model), "--output", str(output), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert words in said
    assert not output.exists()


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no-such-model"
    assert main(["--quick", "--engine", "eager", "--model", str(missing), "--output", str(tmp_path / "out")]) == 2
    assert str(missing) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_no_multiple(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    arguments = ["--quick", "--engine", "eager", "--model", str(tiny_model), "--height", "13"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "height=13" in capsys.readouterr().err


def test_an_output_under_a_file_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--quick", "--model", str(tiny_model), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_an_interruption_has_its_own_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.measure.measure", interrupted)
    assert main(["--quick", "--model", str(tiny_model), "--output", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--batch-sizes" in capsys.readouterr().out


def test_quick_changes_only_what_was_not_asked_for() -> None:
    options = parse(["--quick", "--repeats", "7"])
    assert options is not None
    assert (options.repeats, options.steps) == (7, 2)
    assert options.engines is None


def test_batch_sizes_are_sorted_and_said_once() -> None:
    options = parse(["--batch-sizes", "4,1,4"])
    assert options is not None
    assert options.batch_sizes == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "lora"),
    [
        ([], "default"),
        (["--model", "m"], None),
        (["--lora", "none"], None),
        (["--model", "m", "--lora", "l.safetensors"], "l.safetensors"),
    ],
)
def test_the_lora_of_every_command(arguments: list[str], lora: str | None) -> None:
    options = parse(arguments)
    assert options is not None
    assert options.lora == lora
