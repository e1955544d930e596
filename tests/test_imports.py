"""The lazy doors: what `import smooth_rt` and `smooth-rt --help` may not load, and the public names."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import smooth_rt
from engines import errors

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "onnx", "numpy", "PIL", "peft")
ASK = f"import sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY!r}))))"


def loaded_by(code: str) -> list[str]:
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{ASK}"], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "code",
    [
        "import smooth_rt",
        "import smooth_rt.cli",
        "import engines",
        "from smooth_rt import InputError, __version__",
        "from smooth_rt.cli import main; assert main(['--help']) == 0",
        "from smooth_rt.cli import main; assert main(['interpolate', '--help']) == 0",
        "from smooth_rt.cli import main; assert main(['generate', '--no-such-option']) == 2",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code) == []


def test_the_probe_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_every_public_name_is_there() -> None:
    assert len(set(smooth_rt.__all__)) == len(smooth_rt.__all__)
    for name in smooth_rt.__all__:
        assert getattr(smooth_rt, name) is not None, name
    assert set(smooth_rt.__all__) <= set(dir(smooth_rt))
    assert smooth_rt.SmoothPipeline.__module__ == "smooth_rt.pipeline"


def test_every_error_is_public() -> None:
    kinds = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert kinds
    assert kinds <= set(smooth_rt.__all__)
    assert all(getattr(smooth_rt, name) is getattr(errors, name) for name in kinds)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SmothPipeline'"):
        _ = smooth_rt.SmothPipeline


def test_version_is_the_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 9.9")
    assert smooth_rt.__version__ == "smooth-rt 9.9"


def test_version_of_a_checkout_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert smooth_rt.__version__ == "0+uninstalled"
