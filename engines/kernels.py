"""Kernels of this project's own for OpenVINO on the CPU: `native/`, compiled once a machine for its processor.

OpenVINO loads them as an extension. A graph that was built with `--kernels native` holds operations of the opset
`OPSET` and cannot be opened without, nor with those of another revision. They are compiled from the sources of the
installed package alone, never from anything in a bundle.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from engines.errors import EngineError, reason

__all__ = ["OPSET", "REVISION", "WIDEST", "holds", "library", "operations", "register"]

# Counted up when an operation of `native/` takes or means something else: inputs, outputs, attributes, layouts. What
# was built before is stale then (`recipes.build_revision`), and its graphs, which name the opset, open nowhere.
REVISION = 1
OPSET = f"smooth_rt{REVISION}"
WIDEST = 256  # numbers a head of attention; native/attention.hpp
SOURCES = Path(__file__).parent / "native"
# Without the two flags a maximum is a branch. None that would let the compiler take sums for associative: rounding to
# whole numbers in exp2 rests on their order.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
DEFINED = f'-DSMOOTH_RT_OPSET="{OPSET}"'
COMPILERS = ("c++", "g++", "clang++")
_NAMED = re.compile(rb'version="(smooth_rt[0-9]*)"')


def holds(path: Path) -> bool:
    """Whether the OpenVINO graph (.xml) at `path` has operations of this project.

    Raises:
        OSError: the file cannot be read.
        EngineError: they are of another revision than this version's.
    """
    found = {name.decode() for name in _NAMED.findall(path.read_bytes())}
    others = sorted(found - {OPSET})
    if others:
        raise EngineError(f"{path}: its kernels are those of {others[0]}, this version has {OPSET}; rebuild")
    return bool(found)


@cache
def register(core: Any) -> None:
    """Let an `openvino.Core` read and run graphs with them.

    Raises:
        EngineError: they cannot be compiled or loaded here.
    """
    path = library()
    try:
        core.add_extension(str(path))
    except Exception as error:
        raise _unloadable(path, error) from error


@cache
def operations() -> Any:
    """The factory of nodes: `create("Attention", inputs, attributes)`; native/operations.cpp has what there is.

    Raises:
        EngineError: as `register`.
    """
    from openvino.utils.node_factory import NodeFactory

    path = library()
    try:
        factory = NodeFactory()
        factory.add_extension(str(path))
    except Exception as error:
        raise _unloadable(path, error) from error
    return factory


def _unloadable(path: Path, error: Exception) -> EngineError:
    return EngineError(f"{path}: openvino cannot load these kernels ({reason(error, -1)}); delete the file")


@cache
def library() -> Path:
    """The compiled kernels, kept beside the cache of bundles (SMOOTH_RT_CACHE). Compiled, which takes some seconds,
    where there are none of these sources for this processor, compiler and openvino.

    Raises:
        EngineError: there is no C++ compiler, or it fails.
    """
    compiler = _compiler()
    path = _folder() / f"{_digest(compiler)}.so"
    if path.is_file():
        return path
    import openvino

    package = Path(openvino.__file__).parent
    libraries = [_shared(package / "libs", stem) for stem in ("libopenvino.so", "libtbb.so")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may compile at the same time: each into a folder of its own, and the last one's stays.
        with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [
                compiler,
                *FLAGS,
                DEFINED,
                f"-I{package / 'include'}",
                str(SOURCES / "operations.cpp"),
                "-o",
                str(made),
            ]
            command += [*map(str, libraries), f"-Wl,-rpath,{package / 'libs'}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                fault = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
                raise EngineError(
                    f"kernels 'native': {compiler} fails ({fault.strip():.140}); set CXX to another compiler, or build "
                    "with --kernels backend"
                )
            made.replace(path)
    except OSError as error:
        raise EngineError(
            f"kernels 'native': {error.filename or path}: {error.strerror}; set SMOOTH_RT_CACHE to a folder that "
            "can be written to"
        ) from error
    return path


def _folder() -> Path:
    from platformdirs import user_cache_path

    chosen = os.environ.get("SMOOTH_RT_CACHE")
    return (Path(chosen).expanduser() if chosen else user_cache_path("smooth-rt", appauthor=False)) / "kernels"


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    missing = f"CXX={asked} is no program" if asked else f"none of {', '.join(COMPILERS)} is installed"
    raise EngineError(
        f"kernels 'native': they are compiled on the machine that they run on, and {missing}; install g++ (Debian: "
        "`apt install g++`), or build with --kernels backend"
    )


def _shared(folder: Path, stem: str) -> Path:
    found = sorted(folder.glob(f"{stem}*"))
    if not found:
        raise EngineError(
            f"kernels 'native': {folder}/{stem} is missing, which openvino brings on Linux; build with "
            "--kernels backend"
        )
    return found[0]


def _digest(compiler: str) -> str:
    """Of everything that decides what is compiled."""
    import openvino

    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    said = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (said, " ".join((*FLAGS, DEFINED)).encode(), openvino.__version__.encode(), _processor()):
        digest.update(part + b"\0")
    return digest.hexdigest()[:32]


def _processor() -> bytes:
    """What the processor can do, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}
    return b"\n".join(sorted(told)) or platform.machine().encode()
