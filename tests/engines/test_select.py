"""Which backend runs, why, and what is said when the one asked for cannot."""

from __future__ import annotations

import importlib
import logging
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
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
    assert availability(name) == f"{name} is not installed; run `pip install 'smooth-rt[{name}]'`"


@pytest.fixture
def rtx(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX is installed, and builds for some GPUs."""
    known = {name: object() for name in ("NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120")}
    module = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=known))
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: module if name == "tensorrt_rtx" else real(name))
    installed["tensorrt-rtx"] = "1.7"


@pytest.mark.usefixtures("rtx")
def test_auto_on_a_gpu_takes_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    choice = choose("auto", ["openvino", "tensorrt-rtx"])
    assert (choice.backend, "first choice on a GPU" in choice.reason) == ("tensorrt-rtx", True)
    assert "tensorrt (not built)" in choice.reason
    assert choose("auto", ["openvino"]).backend == "openvino"
    # Of a bundle, what was built for another GPU is none of the choice.
    choice = choose("auto", ["openvino", "tensorrt-rtx"], {"tensorrt-rtx": "this is sm89"})
    assert (choice.backend, "tensorrt-rtx (this is sm89)" in choice.reason) == ("openvino", True)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("at_hand", "target", "taken"),
    [
        ("sm75", "sm75", "tensorrt-rtx"),
        ("sm89", "sm89", "tensorrt-rtx"),
        ("sm90", "rtx", "onnxruntime-cuda"),  # Hopper, which lies between those that it names
        ("sm100", "rtx", "onnxruntime-cuda"),
        ("sm130", "rtx", "tensorrt-rtx"),  # newer than all of them
        (None, "rtx", "onnxruntime"),
    ],
)
def test_a_gpu_that_tensorrt_for_rtx_does_not_name(
    at_hand: str | None, target: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "gpu", lambda: at_hand)
    monkeypatch.setattr(select, "lacking", lambda _: None)
    assert select.target("tensorrt-rtx") == target
    assert select.target("tensorrt-rtx", "sm80") == "sm80"
    choice = choose("auto", ["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx"])
    assert choice.backend == taken
    if at_hand is not None and taken != "tensorrt-rtx":
        why = f"TensorRT for RTX is made for sm75, sm80, sm86, sm89, sm120 and newer, and this is {at_hand}"
        assert f"tensorrt-rtx ({why})" in choice.reason
        # By name it is tried.
        assert choose("tensorrt-rtx", ["tensorrt-rtx"]).backend == "tensorrt-rtx"


def test_an_architecture_is_for_the_backends_that_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "gpu", lambda: None)
    here = select.architecture()
    named = select.targets(["openvino", "inductor", "tensorrt-rtx", "onnxruntime-cuda"], "sm89")
    assert named == {"openvino": here, "inductor": here, "tensorrt-rtx": "sm89", "onnxruntime-cuda": "sm89"}
    assert select.targets(["openvino", "tensorrt-rtx"]) == {"openvino": here, "tensorrt-rtx": "rtx"}
    with pytest.raises(InputError, match="gpu_arch=sm89: openvino, inductor is built for the CPU here; leave it out"):
        select.targets(["openvino", "inductor"], "sm89")
    with pytest.raises(InputError, match="tensorrt is built for the GPU at hand, and there is none"):
        select.targets(["openvino", "tensorrt"], "sm89")
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    assert select.targets(["openvino", "inductor"], "sm89") == {"openvino": here, "inductor": "sm89"}
    with pytest.raises(InputError, match="inductor is built for the GPU at hand, sm89"):
        select.targets(["inductor", "tensorrt-rtx"], "sm80")


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


def test_of_a_named_engine_no_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """`demo` and `bench` name them of their own accord."""
    with caplog.at_level(logging.INFO, "smooth_rt"):
        choose("onnxruntime", ["onnxruntime", "openvino"])
    assert [record.getMessage() for record in caplog.records] == ["engine: onnxruntime"]


def test_a_named_engine_is_never_replaced() -> None:
    with pytest.raises(EngineError, match=r"'openvino': not in the bundle, which holds onnxruntime; run `smooth-rt"):
        choose("openvino", ["onnxruntime"])
    assert choose("eager", []).backend == "eager"
    assert choose("onnxruntime", ["openvino", "onnxruntime"]).backend == "onnxruntime"


def test_eager_has_no_graph_to_open(network: Network, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="runs torch modules, not graphs"):
        open_engine("eager", network, tmp_path / "graph.onnx")
