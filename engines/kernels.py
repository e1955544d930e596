"""Kernels of this project's own for OpenVINO on the CPU: `native/`, compiled once a machine for its processor.

OpenVINO loads them as an extension. A graph that was built with `--kernels native` holds operations of the opset
`OPSET` and cannot be opened without, nor with those of another revision. They are compiled from the sources of the
installed package alone, never from anything in a bundle.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import threading
from functools import cache
from pathlib import Path
from typing import Any

from engines.cache_dir import cache_root
from engines.compiler import compiled, find, intact, version
from engines.errors import EngineError, reason

__all__ = ["OPSET", "REVISION", "WIDEST", "holds", "library", "operations", "register"]

LOG = logging.getLogger("smooth_rt")

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
_COMPILING = threading.Lock()  # one thread of a process, which has one folder for it
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
    where there are none of these sources for this processor, compiler and openvino, or what is there is damaged.

    Raises:
        EngineError: there is no C++ compiler, it fails, or the folder cannot be written to.
    """
    with _COMPILING:
        compiler = find()
        path = cache_root() / "kernels" / f"{_digest(compiler)}.so"
        try:
            if path.is_file():
                if intact(path):
                    return path
                LOG.warning("%s: damaged; compiled anew", path)
            _compile(compiler, path)
        except OSError as error:
            raise EngineError(
                f"kernels 'native': {error.filename or path}: {error.strerror}; set SMOOTH_RT_CACHE to a folder that "
                "can be written to"
            ) from error
    return path


def _compile(compiler: str, path: Path) -> None:
    import openvino

    package = Path(openvino.__file__).parent
    libraries = [_shared(package / "libs", stem) for stem in ("libopenvino.so", "libtbb.so")]
    options = [*FLAGS, DEFINED, f"-I{package / 'include'}", str(SOURCES / "operations.cpp")]
    compiled(compiler, [*options, *map(str, libraries), f"-Wl,-rpath,{package / 'libs'}"], path)


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
    for part in (version(compiler), " ".join((*FLAGS, DEFINED)).encode(), openvino.__version__.encode(), _processor()):
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
