"""One quick benchmark of the tiny model, run once and looked at by several tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.report import read_report
from bench.results import Report


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of engines that no other test fills."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def quick_run(cache: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python -m bench --quick` filled, with eager and OpenVINO."""
    output = tmp_path_factory.mktemp("bench") / "results"
    few = ["--quick", "--repeats", "2", "--batch-sizes", "2,1", "--engine", "eager,openvino"]
    assert main([*few, "--model", str(tiny_model), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def report(quick_run: Path) -> Report:
    """Its report."""
    return read_report(quick_run / "bench.json")
