"""Torch module -> a package of native code (.pt2), compiled ahead of time by AOTInductor."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from engines.contract import Axis, Dims, Network
from engines.errors import EngineError, InputError, reason
from engines.pt2 import Package
from export import aoti_compile
from export.graphs import TRACED_BATCH_MAX, Case, random_inputs
from export.half import DTYPES, Cast, channels_last
from export.quiet import quiet

__all__ = ["DTYPES", "cannot_build", "to_inductor"]

DEVICES = ("cpu", "cuda")
COMPILERS = ("g++", "clang++", "c++")  # tried in this order where CXX names none

Bounds = Mapping[str, tuple[int, int | None]]

# Torch's caches and Triton's, and every temporary file: all inside the room.
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_FOLDERS = {_CACHE: "cache", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}


def cannot_build(device: str = "cpu") -> str | None:
    """None if packages for `device` can be compiled here, else one line: what is missing, and how to mend it.

    Running a package needs none of it.
    """
    if sys.platform not in ("linux", "darwin"):
        return f"AOTInductor packages are compiled on Linux and macOS, not on {sys.platform}; use another backend"
    if _compiler() is None:
        named = os.environ.get("CXX")
        lacking = f"CXX names {named!r}, which is not there" if named else f"none of {', '.join(COMPILERS)} is on PATH"
        return f"compiling needs a C++ compiler and {lacking}; run `apt install g++` or set CXX"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "compiling for CUDA needs a GPU that this torch can use, and it finds none; compile for the cpu"
        if find_spec("triton") is None:
            return "compiling for CUDA needs Triton; run `pip install triton`"
    return None


def to_inductor(
    module: nn.Module,
    network: Network,
    dims: Dims,
    path: Path,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    symbol_bounds: Bounds | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write `path`: weights and code in one file, for this processor or GPU and this version of torch.

    The file appears whole or not at all, and nothing else is left: torch's caches lie in a folder beside `path` that
    goes with the call, and the compilers end with it, also when it is interrupted or killed. That folder holds about
    three times the weights.

    Args:
        module: a module of `engines.eager.torch_networks`, or that by `half.in_half`, on the CPU; it stays as it is.
        network: its contract.
        dims: the model's sizes.
        path: the .pt2 file; its folder is created.
        precision: fp32, bf16 or fp16, in which `module` computes. Inputs and outputs are the contract's.
        device: "cpu", or "cuda" for the GPU that torch takes by default; the module stays on the CPU.
        symbol_bounds: per symbol of the contract, the least and the greatest size (None: no bound). Equal ones make
            the axis static. None, or a symbol left out: what the network itself takes.
        progress: called as `progress(stage, done, total)`.

    Raises:
        InputError: an unknown precision or device, bounds that the contract does not allow, or a path not in .pt2.
        EngineError: there is no compiler, or the module cannot be exported or compiled.
        OSError: the file cannot be written.
    """
    bounds = _checked(network, path, precision, device, symbol_bounds)
    fault = cannot_build(device)
    if fault is not None:
        raise EngineError(f"{network.name}: {fault}")
    report = progress or (lambda *_: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished file is renamed and not copied.
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        room = Path(folder)
        report(f"{network.name}: export", 0, 2)
        with _cache(room / _FOLDERS[_CACHE]):
            _export(module, network, dims, room / aoti_compile.PROGRAM, device, bounds)
        report(f"{network.name}: compile", 1, 2)
        package = Package.of_this_machine(network, precision, device, bounds)
        job = {"name": path.name, "device": device, "precision": precision, "options": _options(package)}
        (room / aoti_compile.JOB).write_text(json.dumps(job), encoding="utf-8")
        _compile(network, room)
        os.replace(room / path.name, path)
        report(f"{network.name}: compile", 2, 2)


def _checked(network: Network, path: Path, precision: str, device: str, given: Bounds | None) -> Bounds:
    """Bounds for every symbol of the contract."""
    if precision not in DTYPES:
        raise InputError(f"precision {precision!r}: unknown; choose from {', '.join(DTYPES)}")
    if device not in DEVICES:
        raise InputError(f"device {device!r}: unknown; choose from {', '.join(DEVICES)}")
    if path.suffix != ".pt2" or path.name == aoti_compile.PROGRAM:
        raise InputError(f"{path}: a package's name ends in .pt2 and is not {aoti_compile.PROGRAM}; rename it")
    own: dict[str, tuple[int, int | None]] = {s: (network.multiples.get(s, 1), None) for s in network.symbols}
    for symbol, (low, high) in (given or {}).items():
        if symbol not in own:
            raise InputError(f"{network.name}: no symbol {symbol!r}; it has {', '.join(own)}")
        multiple = network.multiples.get(symbol, 1)
        wrong = low < 1 or low % multiple or (high is not None and (high < low or high % multiple))
        if wrong:
            raise InputError(
                f"{network.name}: {symbol} from {low} to {high}: give two multiples of {multiple}, the lesser first"
            )
    return {**own, **(given or {})}


def _export(module: nn.Module, network: Network, dims: Dims, path: Path, device: str, bounds: Bounds) -> None:
    inputs, shapes = _traced(network, dims, bounds)
    if isinstance(module, Cast):  # it takes any number of inputs, in one tuple
        shapes = (shapes,)
    try:
        with quiet(), torch.no_grad():
            laid = channels_last(module) if device == "cuda" else module
            program = torch.export.export(laid, inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise EngineError(f"{network.name}: torch.export failed: {reason(error)}") from error
    with quiet(), _Archive(io.FileIO(path, "w")) as archive:
        torch.export.save(program, archive)
        archive.check()


class _Archive(io.BufferedWriter):
    """What torch writes an archive to. An OSError in the midst would end the process, in C++: it is told afterwards."""

    fault: OSError | None = None

    def write(self, data: Any) -> int:
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as error:
                self.fault = error
        return memoryview(data).nbytes

    def check(self) -> None:
        """Raise what was met."""
        if self.fault is not None:
            raise self.fault


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """torch.export, too, makes inductor's cache folder in this process, if only once and empty."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_CACHE)
        if before is not None:
            os.environ[_CACHE] = before


def _traced(network: Network, dims: Dims, bounds: Bounds) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs to trace with, and the symbolic dimensions of each, in the manner of `graphs`, inside the bounds.

    A symbol is traced at two or more of its units where its bounds allow: torch.export takes a size of 1 for a fixed
    one. Height and width are unlike.
    """
    unit = max(network.multiples.values(), default=1)
    side = dims.supported_latent_size[0]
    wanted = {"batch": 2, "height": side + unit, "width": side + 2 * unit}
    sizes: dict[str, int] = {}
    roots: dict[str, Any] = {}
    for symbol, (low, high) in bounds.items():
        multiple = network.multiples.get(symbol, 1)
        size = max(wanted[symbol], low, 2 * multiple)
        sizes[symbol] = size if high is None else min(size, high)
        if low != high:
            most = TRACED_BATCH_MAX * multiple if symbol == "batch" and high is None else high
            roots[symbol] = Dim(symbol, min=low // multiple, max=None if most is None else most // multiple)

    def dimension(axis: Axis) -> Any:
        multiple = axis.of(network.multiples.get(axis.symbol, 1))
        return roots[axis.symbol] if multiple == 1 else multiple * roots[axis.symbol]

    inputs = random_inputs(network, dims, Case(sizes, 1.0), torch.Generator().manual_seed(0))
    shapes = tuple(
        {i: dimension(axis) for i, axis in enumerate(spec.axes) if isinstance(axis, Axis) and axis.symbol in roots}
        for spec in network.inputs
    )
    return tuple(inputs.values()), shapes


def _options(package: Package) -> dict[str, Any]:
    """Inductor's settings, each measured on the default model's UNet."""
    return {
        "aot_inductor.package": True,
        "aot_inductor.metadata": package.metadata(),
        # A precompiled header pays where many files share it; here it is gone with its folder.
        "aot_inductor.precompile_headers": False,
        # Line tables hold this machine's folders.
        "aot_inductor.enable_line_tables": False,
        # Else the number of threads at the time of compilation is written into the code; one means no threads at all.
        "cpp.dynamic_threads": True,
        # Weights laid out for oneDNN once, here. On the CPU about a fifth faster; not measured on a GPU.
        "freezing": package.device == "cpu",
    }


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = shlex.split(named)[:1] if named else COMPILERS
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _compile(network: Network, room: Path) -> None:
    """Run `aoti_compile` over what lies in `room`, silently, and end it and its compilers whatever happens."""
    caches = {name: str(room / folder) for name, folder in _FOLDERS.items()}
    for folder in caches.values():
        Path(folder).mkdir(exist_ok=True)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, **caches, "CXX": _compiler() or "", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    with (room / "said").open("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            # -P: the folder of the script is `export`, whose names are not to hide others.
            [sys.executable, "-P", aoti_compile.__file__, str(room)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=room,
            env=environment,
            start_new_session=True,  # its group is what is ended, compilers too
        )
        try:
            code = process.wait()
        finally:
            _end(process)
        said.seek(0)
        last = said.read().strip()
    try:
        fault = json.loads((room / aoti_compile.RESULT).read_text(encoding="utf-8"))["fault"]
    except (FileNotFoundError, json.JSONDecodeError):  # nothing, or on a full disk an empty file
        fault = f"the compiling process ended with code {code}: {last.splitlines()[-1] if last else 'it said nothing'}"
    if fault is not None:
        raise EngineError(f"{network.name}: AOTInductor failed: {_cause(fault)}; use another backend")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is gone: all have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _cause(fault: str) -> str:
    """The compiler's first error if there is one, else the first line: what torch wraps it in is its command line."""
    errors = re.findall(r"^.*\berror: .*$", fault, re.MULTILINE)
    return reason(RuntimeError(errors[0] if errors else fault))
