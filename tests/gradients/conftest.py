"""A bundle that gradients were added to, and pipelines on it and on eager."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.bundle import Bundle
from smooth_rt.build import Built, ensure_engines
from smooth_rt.pipeline import SmoothPipeline


@dataclass
class Grown:
    """A bundle without gradients, the same with those of the text, and what the second build said."""

    model: Path
    before: Bundle
    nodes: dict[str, int]
    built: Built
    steps: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def grown(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    """Built for real, twice: the gradients are added to what is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = ensure_engines(small_model, backends=["onnxruntime"]).bundle
        nodes = {file.path: (before.path / file.path).stat().st_ino for file in before.manifest.files}
        steps: list[tuple[str, int, int]] = []
        built = ensure_engines(
            small_model, backends=["onnxruntime"], gradients=["text"], progress=lambda *step: steps.append(step)
        )
        yield Grown(small_model, before, nodes, built, steps)


@pytest.fixture(scope="module")
def pipe(grown: Grown) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_engines(grown.built.bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def eager(grown: Grown) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_pretrained(grown.model, engine="eager") as pipe:
        yield pipe
