"""The wheel ships exactly the four packages, each module of theirs, and the assets."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("smooth_rt", "export", "engines", "bench")
DATA = ("smooth_rt/assets", "smooth_rt/templates")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the sources."""
    tree = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    out = tree / "out"
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(tree)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_top_level_is_exactly_the_four_packages(shipped: set[str]) -> None:
    top = {name.split("/")[0] for name in shipped}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_every_module_and_asset_is_in_it(shipped: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    data = {p.relative_to(ROOT).as_posix() for name in DATA for p in (ROOT / name).rglob("*") if p.is_file()}
    assert modules | data | {"smooth_rt/training/objects.txt", "engines/py.typed", "smooth_rt/py.typed"} <= shipped
