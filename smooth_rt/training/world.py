"""The processes of a training run: one alone, or those that `accelerate launch` started.

Double backward through DistributedDataParallel is unsupported by PyTorch, and a LoRA's gradients are small, so no
module is wrapped: every process holds the whole model, works on its share of each step, and what the shares give is
added up.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from smooth_rt.errors import InputError, reason
from smooth_rt.training.settings import Precision

__all__ = ["Launched", "World", "launched", "training_device"]

Item = TypeVar("Item")
WRAPPED = {"FSDP", "DEEPSPEED", "MEGATRON_LM"}  # they cut the weights up, and a penalty on gradients needs them whole


class World:
    """One process alone.

    Attributes:
        device: where tensors are.
        rank, size: this process's number, of so many.
        scaler: of the loss, where gradients in fp16 would fall to zero without.
    """

    rank = 0
    size = 1

    def __init__(self, device: torch.device | None = None, precision: Precision = "no") -> None:
        self.device = device or torch.device("cpu")
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, rows: range) -> range:
        """This process's part of rows, whose number the processes divide."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]

    def autocast(self) -> AbstractContextManager[Any]:
        """What a network runs under."""
        if self.precision == "no":
            return nullcontext()
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=kind)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place; all of one type and device."""

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in their order."""
        return list(items)

    def wait(self) -> None:
        """Go on when all are here."""

    def report(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand numbers to the trackers."""

    def close(self) -> None:
        """Finish the trackers."""


class Launched(World):
    """The processes of an `accelerate.Accelerator`, and its trackers."""

    def __init__(self, accelerator: Any, precision: Precision) -> None:
        super().__init__(accelerator.device, precision)
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        if self.size == 1 or not tensors:
            return
        # One message for all.
        whole = self.accelerator.reduce(torch.cat([tensor.detach().flatten() for tensor in tensors]), reduction="sum")
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def gather(self, items: Sequence[Item]) -> list[Item]:
        from accelerate.utils import gather_object

        found: list[Item] = gather_object(list(items))
        return found

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def report(self, numbers: Mapping[str, float], step: int) -> None:
        self.accelerator.log(dict(numbers), step=step)

    def close(self) -> None:
        self.accelerator.end_training()


def launched(
    folder: Path,
    precision: Precision = "no",
    device: str = "auto",
    trackers: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> World:
    """The processes that `accelerate launch` started, this one among them; this one alone without it.

    Args:
        device: "cpu", "cuda" or "cuda:1"; "auto" takes a GPU where there is one. Under a launcher each process takes
            its own GPU.
        trackers: names that accelerate knows, as "tensorboard"; they write under `folder`.
        settings: what the trackers show of the run.

    Raises:
        InputError: a precision that the device has not, an unknown tracker or one that is not installed, a device that
            is not there, or a launcher that cuts the model up.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import LoggerType

    known = sorted(str(kind.value) for kind in LoggerType)
    if unknown := sorted(set(trackers) - set(known)):
        raise InputError(f"report_to={unknown[0]!r}: unknown; choose from {', '.join(known)}")
    if precision not in get_args(Precision):
        raise InputError(f"mixed_precision={precision!r}: unknown; choose from {', '.join(get_args(Precision))}")
    chosen = training_device(device)
    if precision == "fp16" and chosen.type == "cpu":
        raise InputError("mixed_precision='fp16': a CPU has no fast half precision; use bf16, or a GPU")
    if chosen.index is not None and not PartialState._shared_state:
        torch.cuda.set_device(chosen)
    # The state is the interpreter's; of a run before, only the processes stay.
    AcceleratorState._reset_state()
    try:
        with warnings.catch_warnings():
            # Of a tracker that is not installed, which is an error of our own below.
            warnings.filterwarnings("ignore", message=".*log_with.*")
            accelerator = Accelerator(
                mixed_precision=precision, cpu=chosen.type == "cpu", log_with=list(trackers) or None, project_dir=folder
            )
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"accelerate: {reason(error)}") from error
    if accelerator.distributed_type.value in WRAPPED:
        raise InputError(
            f"accelerate: {accelerator.distributed_type.value} cuts the weights up, and the penalty on gradients needs "
            "them whole on each device; launch with --multi_gpu or --cpu"
        )
    there = {str(tracker.value) for tracker in accelerator.log_with}
    if missing := sorted(set(trackers) - there):
        raise InputError(f"report_to={missing[0]!r}: not installed; pip install it, or leave it out")
    if trackers:
        plain = {key: value for key, value in (settings or {}).items() if isinstance(value, str | int | float | bool)}
        accelerator.init_trackers("tracking", config=plain)
    return Launched(accelerator, precision)


def training_device(name: str) -> torch.device:
    """The device of that name, "auto" being a GPU where there is one.

    Raises:
        InputError: a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name!r}: unknown; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name!r}: not supported; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu or leave it out")
    return device
