"""One pipeline that the commands open, a command line that is heard, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smooth_rt import cli
from smooth_rt.model import Model, load_model
from smooth_rt.pipeline import SmoothPipeline


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
def refused(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The one line on stderr of a command that fails, and prints nothing else."""

    def call(*arguments: object, code: int = 2) -> str:
        found, out, err = run(*arguments)
        assert (found, out) == (code, "")
        lines = [line for line in err.splitlines() if line.startswith(("error: ", "interrupted"))]
        assert len(lines) == 1
        assert err.splitlines()[-1] == lines[0]
        assert "Traceback" not in err
        return lines[0]

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path
