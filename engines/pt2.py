"""What an AOTInductor package (.pt2) says of itself, read without loading any of its native code."""

from __future__ import annotations

import json
import platform
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engines.contract import Network
from engines.errors import EngineError, reason

__all__ = ["METADATA", "Package", "gpu_capability", "instruction_sets", "machine", "read_package"]

METADATA = "smooth_rt"  # the key of our record among those that torch writes into the package
_RECORDS = "wrapper_metadata.json"  # how the name of that file inside the package ends

# What `get_capabilities` tells beside the instruction sets, which are its True values.
_NO_INSTRUCTIONS = frozenset({"clflush", "clflushopt", "clwb"})


@dataclass(frozen=True)
class Package:
    """What was compiled, and what it needs in order to run.

    Args:
        network: the contract's name of the network.
        tensors: its inputs and outputs as the contract writes them; the model's sizes are in there.
        precision: fp32, bf16 or fp16, in which it computes. Its inputs and outputs are the contract's.
        device: "cpu" or "cuda".
        torch: the version that compiled it. Generated code calls into torch's own libraries, so no other will do.
        machine: system and processor family, such as "linux x86_64".
        instructions: the processor's instruction sets where it was compiled: the compiler may use every one of them.
        capability: of the GPU, such as "9.0"; empty for the CPU.
        bounds: per symbol, the least and the greatest size (None: no bound).
    """

    network: str
    tensors: tuple[str, ...]
    precision: str
    device: str
    torch: str
    machine: str
    instructions: tuple[str, ...]
    capability: str
    bounds: Mapping[str, tuple[int, int | None]]

    @classmethod
    def of_this_machine(
        cls, network: Network, precision: str, device: str, bounds: Mapping[str, tuple[int, int | None]]
    ) -> Package:
        """The record of a package that is compiled here and now."""
        return cls(
            network=network.name,
            tensors=_tensors(network),
            precision=precision,
            device=device,
            torch=torch.__version__,
            machine=machine(),
            instructions=tuple(sorted(instruction_sets())),
            capability=gpu_capability() if device == "cuda" else "",
            bounds=dict(bounds),
        )

    def metadata(self) -> dict[str, str]:
        """For torch to write into the package, which takes strings alone."""
        return {METADATA: json.dumps(asdict(self), sort_keys=True)}

    def misfit(self, network: Network) -> str | None:
        """None if the package is `network`'s and can run here, else why not, without an end stop."""
        if self.network != network.name:
            return f"it holds {self.network}, not {network.name}"
        if self.tensors != _tensors(network):
            return "its tensors are those of a model of other sizes"
        if self.torch != torch.__version__:
            return f"it was compiled by torch {self.torch}, and this is {torch.__version__}"
        if self.machine != machine():
            return f"it was compiled for {self.machine}, and this is {machine()}"
        missing = sorted(set(self.instructions) - instruction_sets())
        if missing:
            return f"it was compiled for a processor with {', '.join(missing)}, which this one lacks"
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "it was compiled for a CUDA GPU, and torch finds none here"
            if self.capability != gpu_capability():
                return f"it was compiled for a GPU of capability {self.capability}, and this is {gpu_capability()}"
        return None


def read_package(path: Path) -> Package:
    """The record that `path` carries. Nothing of the package is executed.

    Raises:
        EngineError: the file cannot be read, is damaged, or was not made by this project.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(_RECORDS)]
            written = json.loads(archive.read(names[0]))[METADATA] if names else None
        return _parse(json.loads(written)) if written is not None else _foreign(path)
    except (KeyError, TypeError, ValueError, AttributeError):
        return _foreign(path)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise EngineError(f"{path}: no whole AOTInductor package ({reason(error)}); rebuild") from error


def machine() -> str:
    """System and processor family, such as "linux x86_64"."""
    return f"{sys.platform} {platform.machine()}"


def instruction_sets() -> set[str]:
    """The instruction sets of this processor that a compiler could use, as torch names them."""
    told: Mapping[str, Any] = torch.cpu.get_capabilities()
    return {name for name, value in told.items() if value is True and name not in _NO_INSTRUCTIONS}


def gpu_capability() -> str:
    """Of the GPU that torch takes by default, such as "9.0"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _tensors(network: Network) -> tuple[str, ...]:
    return tuple(str(spec) for spec in (*network.inputs, *network.outputs))


def _parse(record: dict[str, Any]) -> Package:
    bounds = {
        symbol: (int(low), None if high is None else int(high)) for symbol, (low, high) in record["bounds"].items()
    }
    lists = {name: tuple(record[name]) for name in ("tensors", "instructions")}
    return Package(**{**record, **lists, "bounds": bounds})


def _foreign(path: Path) -> Package:
    raise EngineError(f"{path}: an AOTInductor package of another program; rebuild") from None
