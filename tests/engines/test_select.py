"""Which backend runs, why, and what is said when the one asked for cannot."""

from __future__ import annotations

import importlib
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from engines import select
from engines.contract import Network
from engines.errors import EngineError, InputError
from engines.select import availability, backend_version, choose, open_engine


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by distribution that importlib.metadata reports; a test changes them."""
    versions = {"torch": "2.0", "onnxruntime": "1.0", "openvino": "3.0"}

    def version(distribution: str) -> str:
        if distribution not in versions:
            raise metadata.PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_what_is_installed_here_can_run() -> None:
    assert [availability(name) for name in ("eager", "onnxruntime", "openvino", "inductor")] == [None] * 4
    assert backend_version("onnxruntime") == metadata.version("onnxruntime")


@pytest.mark.parametrize("name", ["cuda", "", "ONNXRuntime", "auto"])
def test_an_unknown_backend_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(EngineError, match=f"engine {name!r}: unknown; choose from auto, eager, onnxruntime, openvino"):
        availability(name)


@pytest.mark.parametrize("name", select.TENSORRT)
def test_tensorrt_without_a_gpu(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installed[name] = "11.0"
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda module: None if "tensorrt" in module else real(module))
    monkeypatch.setattr(select, "gpu", lambda: None)
    assert select.buildable(name) is None
    assert availability(name) == f"{name} runs on a CUDA GPU and torch finds none here; choose openvino or onnxruntime"
    with pytest.raises(EngineError, match="torch finds none here"):
        choose(name, [name])
    del installed[name]
    assert availability(name) == f"{name} is not installed; run `pip install {name}`"


def test_auto_on_a_gpu_takes_tensorrt(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda module: None if "tensorrt" in module else real(module))
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    installed["tensorrt-rtx"] = "1.7"
    choice = choose("auto", ["openvino", "tensorrt-rtx"])
    assert (choice.backend, "first choice on a GPU" in choice.reason) == ("tensorrt-rtx", True)
    assert "tensorrt (not built)" in choice.reason
    assert choose("auto", ["openvino"]).backend == "openvino"


def test_what_is_built_for_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "gpu", lambda: None)
    here = select.architecture()
    assert [select.target(name) for name in ("openvino", "inductor", "tensorrt-rtx")] == [here, here, "rtx"]
    assert select.target("tensorrt-rtx", "SM80, sm89,sm80") == "sm80,sm89"
    assert select.runs_here(here) is None
    assert "torch finds none" in str(select.runs_here("sm89"))
    for name in ("tensorrt", "onnxruntime"):
        with pytest.raises(InputError, match=r"gpu_arch=sm89: .* the GPU at hand, and there is none; tensorrt-rtx"):
            select.target(name, "sm89")
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    assert [select.target(name) for name in ("openvino", "inductor", "tensorrt")] == [here, "sm89", "sm89"]
    assert [select.runs_here(built) for built in ("sm80,sm89", "rtx", here)] == [None, None, None]
    assert select.runs_here("sm80") == "this is sm89"
    with pytest.raises(InputError, match="is built for the GPU at hand, sm89"):
        select.target("tensorrt", "sm80")


def test_both_onnxruntime_packages_at_once(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = "1.0"
    reason = availability("onnxruntime")
    assert reason is not None
    assert "onnxruntime and onnxruntime-gpu are installed together" in reason
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" in reason
    with pytest.raises(EngineError, match="installed together"):
        choose("onnxruntime", ["onnxruntime"])


def test_the_gpu_package_alone_is_onnxruntime_too(installed: dict[str, str]) -> None:
    del installed["onnxruntime"]
    installed["onnxruntime-gpu"] = "1.5"
    assert availability("onnxruntime") is None
    assert backend_version("onnxruntime") == "1.5"


def test_a_backend_that_is_not_installed(installed: dict[str, str]) -> None:
    del installed["openvino"]
    assert availability("openvino") == "openvino is not installed; run `pip install openvino`"
    with pytest.raises(EngineError, match="pip install openvino"):
        backend_version("openvino")
    assert choose("auto", ["openvino", "onnxruntime"]).backend == "onnxruntime"


def test_a_backend_that_does_not_load(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "openvino":
            raise ImportError("libopenvino.so: cannot open shared object\nmore")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert availability("openvino") == (
        "openvino is installed and does not load (libopenvino.so: cannot open shared object); "
        "run `pip install --force-reinstall openvino`"
    )


@pytest.mark.parametrize(
    ("built", "taken"),
    [(["onnxruntime", "openvino"], "openvino"), (["onnxruntime"], "onnxruntime"), ([], "eager")],
)
def test_auto_takes_the_fastest_that_is_built_and_says_why_once(
    caplog: pytest.LogCaptureFixture, built: list[str], taken: str
) -> None:
    with caplog.at_level(logging.INFO, "smooth_rt"):
        choice = choose("auto", built)
    assert choice.backend == taken
    assert [record.getMessage() for record in caplog.records] == [f"engine: {taken} ({choice.reason})"]
    for name in {"onnxruntime", "openvino"} - set(built):
        assert f"{name} (not built)" in choice.reason or taken == "openvino"


def test_a_named_engine_is_never_replaced() -> None:
    with pytest.raises(EngineError, match=r"'openvino': not in the bundle, which holds onnxruntime; run `smooth-rt"):
        choose("openvino", ["onnxruntime"])
    assert choose("eager", []).backend == "eager"
    assert choose("onnxruntime", ["openvino", "onnxruntime"]).backend == "onnxruntime"


def test_eager_has_no_graph_to_open(network: Network, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="runs torch modules, not graphs"):
        open_engine("eager", network, tmp_path / "graph.onnx")
