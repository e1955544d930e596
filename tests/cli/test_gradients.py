"""The gradients that engines are built with for a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smooth_rt.errors import EngineError, InputError
from smooth_rt.model import Model
from smooth_rt.pipeline import SmoothPipeline

FAST = ["--num-inference-steps", "2"]
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
    refused: Any,
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
    assert "far enough" in refused(*named, "--output", tmp_path / "o")
    assert asked == [wanted]


def test_gradients_that_cannot_be_built_are_left_to_eager_aloud(
    run: Any,
    refused: Any,
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
    assert refused(*arguments) == "error: it takes more memory than there is"
    assert asked == [("text",), (), ("text",), ()]
