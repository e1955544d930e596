"""The package's front door: every promised name is there, and knocking loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import engines

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "diffusers", "transformers")


def test_every_promised_name_resolves() -> None:
    assert len(set(engines.__all__)) == len(engines.__all__)
    for name in engines.__all__:
        assert getattr(engines, name) is not None
    assert set(engines.__all__) <= set(dir(engines))
    with pytest.raises(AttributeError, match="no attribute 'Torch'"):
        engines.Torch  # noqa: B018


def test_importing_engines_loads_nothing_heavy() -> None:
    code = (
        "import sys, engines, engines.errors, engines.contract, engines.bundle, engines.select\n"
        "engines.Bundle, engines.choose, engines.staging\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_onnxruntime_keeps_nothing_of_its_user(tmp_path: Path, write_graph: Callable[[Path], Path]) -> None:
    graph, home = write_graph(tmp_path / "model.onnx"), tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    code = f"import engines.ort, onnxruntime; onnxruntime.InferenceSession({str(graph)!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not [path for path in home.rglob("*") if path.is_file()]
