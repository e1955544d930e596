"""This project's kernels are compiled on the machine: by whatever compiler, into a library that is whole."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import openvino
import pytest

from engines import compiler, kernels
from engines.errors import EngineError


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without kernels."""
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    kernels.library.cache_clear()
    return tmp_path / "kernels"


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(EngineError, match=r"none of c\+\+.* is installed; install g\+\+"):
        kernels.library()
    monkeypatch.setenv("CXX", "g++-of-nowhere")
    with pytest.raises(EngineError, match=r"CXX=g\+\+-of-nowhere is no program"):
        kernels.library()
    assert not fresh.exists()


Compiler = Callable[[str], Path]


@pytest.fixture
def stand_in(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """Write a shell script that is the compiler; $made is the file that it is to write."""

    def write(script: str) -> Path:
        path = tmp_path / "stand-in"
        says = '[ "$1" != --version ] || { echo 1; exit 0; }\n'
        path.write_text(f"#!/bin/sh\n{says}for made; do :; done\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return write


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "x.cpp:1: error: no such thing"),
        (r"printf 'error: \377\n' >&2; exit 1", "error: \N{REPLACEMENT CHARACTER}"),  # of another encoding
        ("exit 1", "exit code 1 and no message"),
        ("kill -9 $$", "ended by signal 9 and no message"),
    ],
)
def test_a_compiler_that_fails(fresh: Path, stand_in: Compiler, script: str, fault: str) -> None:
    stand_in(script)
    with pytest.raises(EngineError, match=rf"stand-in fails \({re.escape(fault)}\); set CXX"):
        kernels.library()
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("exit 0", "wrote no file"),
        ('mkdir "$made"', "wrote no file"),
        (': > "$made"', "file too short"),
        ('echo nonsense > "$made"', "file too short|invalid ELF header"),
        ('cp "$OTHER" "$made"', "undefined symbol: create_extensions"),
        ('head -c 50000 "$GOOD" > "$made"', "signal|ELF|section|segment|read"),
    ],
)
def test_a_compiler_that_makes_no_library(
    fresh: Path, own_kernels: Path, stand_in: Compiler, monkeypatch: pytest.MonkeyPatch, script: str, fault: str
) -> None:
    monkeypatch.setenv("GOOD", str(own_kernels))
    monkeypatch.setenv(
        "OTHER", next(str(path) for path in (Path(openvino.__file__).parent / "libs").glob("libtbb.so*"))
    )
    stand_in(script)
    with pytest.raises(EngineError, match=rf"stand-in made no library \(.*({fault}).*\); set CXX") as caught:
        kernels.library()
    assert "\n" not in str(caught.value)
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("first", ["", "sleep 600 & wait"])
def test_a_compiler_that_does_not_end(
    fresh: Path,
    stand_in: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    first: str,
) -> None:
    monkeypatch.setattr(compiler, "LONGEST", 1.0)
    monkeypatch.setattr(compiler, "LONGEST_SAID", 1.0)
    path = stand_in(f'echo "$TMPDIR" > {tmp_path}/where; sleep 600')
    if first:
        path.write_text(f"#!/bin/sh\n{first}\n")
    with caplog.at_level("INFO", "smooth_rt"), pytest.raises(EngineError, match="stand-in has not ended in 1 seconds"):
        kernels.library()
    assert bool(first) != (f"compiling kernels with {path}" in caplog.text)
    assert not fresh.exists() or list(fresh.iterdir()) == []
    if not first:  # what a compiler keeps for itself went with it
        assert Path((tmp_path / "where").read_text().strip()).parent == fresh


@pytest.mark.parametrize("text", ["no program\n", "#!/no/such/interpreter\n"])
def test_a_compiler_that_cannot_be_run(stand_in: Compiler, text: str) -> None:
    stand_in("").write_text(text)
    with pytest.raises(EngineError, match=r"stand-in cannot be run \(.+\); set CXX"):
        kernels.library()


def test_a_compiler_with_options(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -O2")
    with pytest.raises(
        EngineError, match=r"CXX=g\+\+ -O2 is no program \(it takes a name or a path, without options\)"
    ):
        kernels.library()


def zeros(whole: bytes) -> bytes:
    return whole[: len(whole) // 2] + bytes(128) + whole[len(whole) // 2 + 128 :]


@pytest.mark.parametrize("damage", [zeros, lambda whole: whole[: len(whole) // 2], lambda _: b""])
def test_a_damaged_library_is_compiled_anew(
    fresh: Path,
    own_kernels: Path,
    stand_in: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setenv("GOOD", str(own_kernels))
    stand_in('cp "$GOOD" "$made"')
    path = kernels.library()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    kernels.library.cache_clear()
    assert kernels.library() == path
    assert path.read_bytes() == good
    assert f"{path}: damaged; compiled anew" in caplog.text
    caplog.clear()
    kernels.library.cache_clear()
    kernels.library()
    assert caplog.text == ""


def test_what_a_killed_compilation_left_is_removed(
    fresh: Path, own_kernels: Path, stand_in: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, others = fresh / f".compiling-{ended.pid}", fresh / f".compiling-{os.getppid()}"
    for folder in (left, others):
        folder.mkdir(parents=True)
        (folder / "half.so").touch()
    monkeypatch.setenv("GOOD", str(own_kernels))
    stand_in('cp "$GOOD" "$made"')
    path = kernels.library()
    assert sorted(fresh.iterdir()) == sorted([others, path])  # which is of a process that lives


def test_a_cache_that_takes_no_file(monkeypatch: pytest.MonkeyPatch, own_kernels: Path) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", "/proc/none")
    kernels.library.cache_clear()
    with pytest.raises(EngineError, match="set SMOOTH_RT_CACHE to a folder"):
        kernels.library()


def test_other_sources_are_other_kernels(
    fresh: Path, own_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernels._digest("c++")
    shutil.copytree(kernels.SOURCES, tmp_path / "native")
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "native")
    assert kernels._digest("c++") == before
    with (tmp_path / "native" / "vector.hpp").open("a") as source:
        source.write("// more\n")
    assert kernels._digest("c++") != before


def _compiled(_: int) -> str:
    return str(kernels.library())


def test_processes_that_compile_at_the_same_time(fresh: Path, own_kernels: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = set(pool.map(_compiled, range(2), chunksize=1))
    assert len(found) == 1
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
