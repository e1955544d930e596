"""The machine that was measured: processor, cores, versions, threads, and whether it was busy with something else."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from bench.results import Environment

__all__ = ["busy", "environment", "uneven", "warn"]

DISTRIBUTIONS = (
    "smooth-rt", "torch", "diffusers", "transformers", "peft", "numpy",
    "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx",
)  # fmt: skip
# The instruction sets that decide the matrix rate.
INSTRUCTIONS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# Load a usable core above which times are not to be trusted.
BUSY_LOAD = 0.25


def environment() -> Environment:
    """Describe this machine and this process now."""
    model, flags = _processor()
    threads = {"torch": torch.get_num_threads(), "torch_interop": torch.get_num_interop_threads()}
    openvino = _openvino_threads()
    if openvino is not None:
        threads["openvino"] = openvino
    return Environment(
        cpu=model,
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        logical_cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        memory_bytes=_memory(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={"python": platform.python_version(), **_versions()},
        threads=threads,
        thread_variables={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        load_average_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def warn(console: Console, *warnings: str | None) -> None:
    """Say those that there are, a line each."""
    for warning in filter(None, warnings):
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def busy(now: Environment) -> str | None:
    """A warning where the machine has other work, else None."""
    load = now.load_average_1min
    if load is None or load <= BUSY_LOAD * now.usable_cores:
        return None
    return (
        f"the machine is busy: load average {load:.2f} on {now.usable_cores} usable cores at the start; trust "
        "neither times nor ratios (waiting for a core slows torch's threads far more than others'); end the other work "
        "and run again"
    )


def uneven(now: Environment) -> str | None:
    """A warning where torch, and with it the engines, has another number of threads than OpenVINO GenAI takes, else
    None."""
    torch_threads, others = now.threads["torch"], now.threads.get("openvino", now.usable_cores)
    if torch_threads == others:
        return None
    said = ", ".join(f"{name}={value}" for name, value in now.thread_variables.items()) or "no variable says so"
    return (
        f"uneven threads: torch and the engines run on {torch_threads}, OpenVINO GenAI on {others} ({said}); "
        f"speed-ups over it are not fair; set OMP_NUM_THREADS={others} and run again"
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and its instruction sets, each as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields: dict[str, str] = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
        flags = fields.get("flags", fields.get("features", ""))
        return fields.get("model name") or platform.machine(), frozenset(flags.split())
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return said or platform.machine(), frozenset()
    return platform.processor() or platform.machine(), frozenset()


def _openvino_threads() -> int | None:
    """The number of threads that OpenVINO takes for one inference where nobody says otherwise."""
    try:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as opset

        from engines.ov import core
    except ImportError:
        return None
    parameter = opset.parameter([1], np.float32)
    compiled = core().compile_model(ov.Model([opset.relu(parameter)], [parameter]), "CPU")
    return int(compiled.get_property("INFERENCE_NUM_THREADS"))
