"""The pipeline on the eager engine, and a record of its calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from engines.base import Engine
from smooth_rt.pipeline import SmoothPipeline


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_pretrained(tiny_model, engine="eager") as pipe:
        yield pipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The batch size of every call, by network."""
    seen: dict[str, list[int]] = {}
    infer = Engine.infer

    def count(engine: Engine, **inputs: Tensor) -> dict[str, Tensor]:
        seen.setdefault(engine.network.name, []).append(len(next(iter(inputs.values()))))
        return infer(engine, **inputs)

    monkeypatch.setattr(Engine, "infer", count)
    return seen
