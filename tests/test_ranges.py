"""What can be said of an option without a model is said before one is loaded, by one table, wherever it is given."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smooth_rt import cli, ranges
from smooth_rt.errors import EngineError, InputError, SmoothRTError
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.schedule import Schedule
from smooth_rt.tasks.edit import edit
from smooth_rt.tasks.generate import generate
from smooth_rt.tasks.interpolate import interpolate
from smooth_rt.tasks.inversion import METHODS, invert

GENERATE = ["generate", "--prompt", "dog"]
BETWEEN = ["interpolate", "--prompt", "dog", "--seeds", "1", "2"]
INVERT = ["invert", "a.png", "--prompt", "dog"]
EDIT = ["edit", "a.png", "--prompt", "dog", "--edit-method", "sdedit"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    for place in (
        "model.load_model",
        "pipeline.load_model",
        "opening.load_model",
        "lora.read_lora",
        "lora.read.safe_open",
    ):
        monkeypatch.setattr(f"smooth_rt.{place}", work)
    monkeypatch.setattr("engines.bundle.Bundle.open", work)
    monkeypatch.setattr("smooth_rt.build.ensure_engines", work)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*GENERATE, "--num-inference-steps", "0"], "--num-inference-steps=0: give a whole number of at least 1"),
        ([*BETWEEN, "--num-inference-steps", "-3"], "--num-inference-steps=-3: "),
        ([*INVERT, "--guidance-scale", "nan"], "--guidance-scale=nan: give a number from -1000 to 1000"),
        ([*EDIT, "--guidance-scale", "inf"], "--guidance-scale=inf: "),
        ([*BETWEEN, "--frames", "1"], "--frames=1: give a whole number from 2 to 10000"),
        ([*GENERATE, "--height", "0"], "--height=0: give a whole number of pixels, at least 1"),
        ([*EDIT, "--width", "-64"], "--width=-64: "),
        ([*GENERATE, "--width", "20000"], "--width=20000: give at most 10000 pixels a side"),
        ([*GENERATE, "--seed", str(2**64)], f"--seed={2**64}: does not fit into 64 bits"),
        ([*GENERATE, "--seed", str(2**64 - 1), "--num-images-per-prompt", "2"], f"--seed={2**64}: does not fit"),
        (["interpolate", "--prompt", "a", "--seeds", "1", str(2**65)], f"--seeds={2**65}: does not fit"),
        ([*GENERATE, "--lora-strength", "nan"], "--lora-strength=nan: give a number from -100 to 100"),
        (["fuse", "--output", "o", "--lora-strength", "1e9"], "--lora-strength=1000000000.0: "),
        (["build-engine", "--lora-strength", "inf"], "--lora-strength=inf: "),
        ([*EDIT, "--edit-strength", "1.5"], "--edit-strength=1.5: give a number from 0 to 1"),
        ([*GENERATE, "--engine", "abacus"], "engine 'abacus': unknown; choose from auto, eager"),
        ([*GENERATE, "--engines", "bundle", "--engine", "abacus"], "engine 'abacus': unknown"),
        (["demo", "--engine", "openvino,abacus"], "engine 'abacus': unknown"),
        ([*INVERT, "--method", "magic"], "--method='magic' is unknown; it is one of ddim, ddim-without-text"),
        ([*EDIT, "--edit-method", "brush"], "--edit-method='brush' is unknown; it is one of eq15, sdedit"),
        ([*GENERATE, "--num-images-per-prompt", "0"], "--num-images-per-prompt=0: "),
        (["evaluate", "istd", "--batch", "0"], "--batch=0: give a whole number from 1 to 10000"),
        (["evaluate", "istd", "--frames", "1"], "--frames=1: "),
        (
            ["evaluate", "istd", "--frames", "5000000", "--limit", "1"],
            "--frames=5000000: give a whole number from 2 to",
        ),
        (["evaluate", "istd", "--frames", "2501"], "--frames=2501: makes 10004 images with 4 prompts in a batch; give"),
        (["evaluate", "istd", "--seed", str(2**70)], f"--seed={2**70}: does not fit"),
        (["evaluate", "istd", "--seed", str(2**64 - 1)], f"--seed={2**64 + 198}: does not fit"),
        (
            [*GENERATE, "--num-images-per-prompt", "2000000"],
            "--num-images-per-prompt=2000000: give a whole number from",
        ),
        (
            [*GENERATE, "--prompt", "cat", "--num-images-per-prompt", "5001"],
            "--num-images-per-prompt=5001: makes 10002 images with 2 prompts; give at most 10000 in all",
        ),
        (["edit", "a.png", "b.png", *EDIT[2:], "--seed", str(2**64 - 1)], f"--seed={2**64}: does not fit"),
        ([*GENERATE, "--seed", "1.5"], "Invalid value for '--seed': '1.5'"),
        ([*GENERATE, "--num-inference-steps", "-" + "9" * 400], "--num-inference-steps=a number of 1329 bits: give"),
        (["evaluate", "inversion", "--num-inference-steps", "0"], "--num-inference-steps=0: "),
        ([*GENERATE, "--output", "file/out"], "file/out: file is a file, not a folder"),
    ],
)
def test_a_command_says_it_before_it_loads_a_model(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"lora_strength": math.nan}, InputError, "lora_strength=nan"),
        ({"lora_strength": "1"}, InputError, "lora_strength='1'"),
        ({"lora_strength": None}, InputError, "lora_strength=None: give a number"),
        ({"engine": ["onnxruntime"]}, InputError, r"engine=\['onnxruntime'\]: give the name of one, such as"),
        ({"engine": None}, InputError, "engine=None: give the name of one"),
        ({"config": ""}, InputError, "config='': empty"),
        ({"batch_size": 0}, InputError, "batch_size=0: give a whole number of at least 1, or 'auto'"),
        ({"batch_size": True}, InputError, "batch_size=True"),
        ({"engine": "abacus"}, EngineError, "engine 'abacus': unknown"),
        ({"kernels": "own"}, InputError, "kernels='own' is unknown; it is one of backend, native"),
    ],
)
def test_python_says_it_before_it_loads_a_model(options: dict[str, Any], kind: type[SmoothRTError], said: str) -> None:
    with pytest.raises(kind, match=said):
        SmoothPipeline.from_pretrained("default", "default", **options)
    if "lora_strength" not in options:
        with pytest.raises(kind, match=said):
            SmoothPipeline.from_engines("bundle", **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-inference-steps", "1001"], "--num-inference-steps=1001: give a whole number from 1 to 999"),
        (["--height", "15"], "--height=15: give a multiple of 8; the nearest is 16"),
    ],
)
@pytest.mark.parametrize("command", [GENERATE, ["evaluate", "istd"]])
def test_what_the_model_decides_is_said_before_an_engine_is_built(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    arguments: list[str],
    said: str,
) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("began to build")

    monkeypatch.setattr("smooth_rt.build.build_engines", build)
    wanted = ["--model", str(tiny_model), "--engine", "onnxruntime", "--output", str(tmp_path / "out")]
    assert cli.main([*command, *wanted, *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "='': empty; give a path or a name"),
        (" ", "=' ': empty"),
        (5, "=5: give a path or a name"),
        (["a"], r"=\['a'\]: give a path or a name"),
        (b"a", "=b'a': give a path or a name"),
        ("a\0b", r"='a\\x00b': holds a null character"),
        ("a" * 5000, f"='{'a' * 59}...: File name too long; give a shorter path"),
        (Path("a" * 5000), f"='{'a' * 59}...: File name too long; give a shorter path"),
    ],
)
def test_what_cannot_name_a_model_or_a_bundle(source: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^model{said}"):
        SmoothPipeline.from_pretrained(source)
    with pytest.raises(InputError, match=f"^lora{said}"):
        SmoothPipeline.from_pretrained("default", source)
    with pytest.raises(InputError, match=f"^bundle{said}"):
        SmoothPipeline.from_engines(source)


def test_no_bundle() -> None:
    with pytest.raises(InputError, match=r"^bundle=None: give a path or a name"):
        SmoothPipeline.from_engines(None)  # type: ignore[arg-type]


def test_the_table_knows_the_options_by_the_names_they_have() -> None:
    assert tuple(METHODS) == ranges.INVERSION_METHODS
    opening = (SmoothPipeline.from_pretrained, SmoothPipeline.from_engines)
    calls = (generate, interpolate, invert, edit, *opening)
    named = {name for call in calls for name in inspect.signature(call).parameters}
    assert set(ranges.RANGES) <= named | {"batch", "output", "seed", "seeds"}


def test_what_is_in_its_range() -> None:
    ranges.check(
        num_inference_steps=1, guidance_scale=-2, frames=2, height=None, width=8, seed=-(2**63), seeds=(0, 2**64 - 1),
        lora_strength=-100, edit_strength=0, engine="auto", batch_size="auto", batch=1,
    )  # fmt: skip
    assert ranges.choice("method", "ddim_without_text", ranges.INVERSION_METHODS) == "ddim-without-text"
    assert ranges.check(frames=np.int64(5), guidance_scale=np.float32(0.5), edit_strength=1, height=np.uint16(64)) == (
        5, 0.5, 1.0, 64,
    )  # fmt: skip
    assert [type(value) for value in ranges.check(frames=np.int64(5), lora_strength=np.float32(0.5))] == [int, float]
    for options in ({"height": 64.0}, {"height": np.float32(64)}, {"frames": np.bool_(True)}, {"width": np.array([8])}):
        with pytest.raises(InputError, match=f"{next(iter(options))}="):
            ranges.check(**options)
    for options in ({"guidance_scale": 10**400}, {"seed": 1.0}, {"height": True}, {"edit_strength": None}):
        with pytest.raises(InputError, match=f"{next(iter(options))}="):
            ranges.check(**options)


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000], ids=["large", "negative", "unspeakable"])
@pytest.mark.parametrize(
    "name", ["num_inference_steps", "guidance_scale", "lora_strength", "edit_strength", "seed", "height", "frames"]
)
def test_a_number_beyond_all_sense_is_not_spelled_out(name: str, number: int) -> None:
    if name == "num_inference_steps":  # the model knows how many there are
        config = {"num_train_timesteps": 1000, "clip_sample": False}
        with pytest.raises(InputError, match=f"{name}=a number of [0-9]+ bits") as caught:
            Schedule.from_config(config, number)
    else:
        with pytest.raises(InputError, match=f"{name}=a number of [0-9]+ bits") as caught:
            ranges.check(**{name: number})
    assert len(str(caught.value)) < 160


def test_a_long_value_is_cut() -> None:
    with pytest.raises(InputError) as caught:
        ranges.check(edit_method="a" * 10_000)
    assert str(caught.value).startswith(f"edit_method='{'a' * 59}... is unknown; it is one of")


def test_the_table_loads_nothing_heavy() -> None:
    bad = ["generate", "--prompt", "a", "--num-inference-steps", "0"]
    code = f"import sys; from smooth_rt.cli import main; assert main({bad}) == 2; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
