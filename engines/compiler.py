"""The C++ compiler of this machine, run so that whatever it does ends in a library that loads or in one clear line.

A compiled library carries the sha256 of its bytes behind them, in the same file so that both are published at once;
loaders of ELF files do not read so far.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.errors import EngineError, reason
from engines.staging import at_work, held

__all__ = ["COMPILERS", "compiled", "find", "intact", "version"]

LOG = logging.getLogger("smooth_rt")

COMPILERS = ("c++", "g++", "clang++")
LONGEST = 300.0  # seconds to compile, which took 7 on one core
LONGEST_SAID = 20.0  # seconds to say the version
OTHERWISE = "set CXX to another compiler, or build with --kernels backend"
_ENTRY = "create_extensions"  # of an extension of OpenVINO
# In a process of its own, which a damaged library may bring down.
_LOADS = f"import ctypes, sys; ctypes.CDLL(sys.argv[1]).{_ENTRY}"
_PARTIAL = re.compile(r"\.compiling-(?P<pid>\d+)(-\w+)?")
_DIGEST = hashlib.sha256().digest_size


def find() -> str:
    """The path of the compiler: CXX, or else the first of `COMPILERS` that is installed.

    Raises:
        EngineError: there is none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    missing = f"none of {', '.join(COMPILERS)} is installed"
    if asked:
        missing = f"CXX={asked} is no program"
        if len(asked.split()) > 1:
            missing += " (it takes a name or a path, without options)"
    raise EngineError(
        f"kernels 'native': they are compiled on the machine that they run on, and {missing}; install g++ (Debian: "
        "`apt install g++`), or build with --kernels backend"
    )


def version(compiler: str) -> bytes:
    """What the compiler says of itself; empty where it takes no --version.

    Raises:
        EngineError: it cannot be run, or does not end.
    """
    return _run(compiler, ["--version"], LONGEST_SAID)[1]


def intact(path: Path) -> bool:
    """Whether `path` is a library as `compiled` wrote it.

    Raises:
        OSError: it cannot be read.
    """
    whole = path.read_bytes()
    return hashlib.sha256(whole[:-_DIGEST]).digest() == whole[-_DIGEST:]


def compiled(compiler: str, options: Sequence[str], path: Path) -> None:
    """Run `compiler` with `options`, and put the library that it makes at `path` once it is known to load.

    It is made in a folder of this process beside `path`, so several may compile at the same time, and the last one's
    stays. Folders of processes that died are removed.

    Raises:
        EngineError: the compiler fails, does not end, or makes no library that can be loaded.
        OSError: nothing can be written beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir():
        found = _PARTIAL.fullmatch(left.name)
        if found and not at_work(left, int(found["pid"])):
            shutil.rmtree(left, ignore_errors=True)
    # The number alone may be another container's as well.
    folder = Path(tempfile.mkdtemp(prefix=f".compiling-{os.getpid()}-", dir=path.parent))
    LOG.info("compiling kernels with %s, once for this machine", compiler)
    try:
        with held(folder):
            made = folder / path.name
            # What it keeps for itself lies there too, and goes with it when it is ended.
            code, _, said = _run(compiler, [*options, "-o", str(made)], LONGEST, {"TMPDIR": str(folder)})
            if code != 0:
                raise EngineError(f"kernels 'native': {compiler} fails ({_fault(code, said)}); {OTHERWISE}")
            fault = _unloadable(made)
            if fault is not None:
                raise EngineError(f"kernels 'native': {compiler} made no library ({fault}); {OTHERWISE}")
            with made.open("r+b") as library:
                digest = hashlib.sha256(library.read()).digest()
                library.write(digest)
            made.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unloadable(made: Path) -> str | None:
    """Why `made` is no library of operations; None: it is one."""
    if not made.is_file():
        return "it ended without an error and wrote no file"
    code, _, said = _run(sys.executable, ["-I", "-c", _LOADS, str(made)], LONGEST)
    if code == 0:
        return None
    lines = said.strip().splitlines()
    told = lines[-1].replace(f"{made}: ", "") if lines else _ended(code)
    return f"{told:.140}"


def _fault(code: int, said: str) -> str:
    """What a compiler that failed said of it."""
    lines = [line for line in said.splitlines() if line.strip()]
    fault = next((line for line in lines if "error" in line), lines[0] if lines else f"{_ended(code)} and no message")
    return f"{fault.strip():.140}"


def _ended(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"ended by signal {-code}"


def _run(
    program: str, options: Sequence[str], longest: float, environment: Mapping[str, str] | None = None
) -> tuple[int, bytes, str]:
    """The exit code of a program, its stdout and its stderr.

    Raises:
        EngineError: it cannot be run, or has not ended in `longest` seconds and was ended, with all that it started.
    """
    try:
        process = subprocess.Popen(
            [program, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a group of its own: a compiler starts others
        )
    except OSError as error:
        raise EngineError(f"kernels 'native': {program} cannot be run ({reason(error)}); {OTHERWISE}") from error
    with process:
        try:
            out, said = process.communicate(timeout=longest)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise EngineError(
                f"kernels 'native': {program} has not ended in {longest:g} seconds; {OTHERWISE}"
            ) from error
    return process.returncode, out, said.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    if os.name == "nt":
        process.kill()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
