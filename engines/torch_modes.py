"""Run torch in its default modes, whatever modes the caller's thread is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from engines import forks

__all__ = ["default_modes"]


@contextmanager
def default_modes() -> Iterator[None]:
    """Leave `torch.inference_mode`, autocast and a default device other than the CPU, for this thread and this while.

    Gradients stay off for a caller in inference mode, who asked for none; tensors that are made here may still take
    part in autograd later. The default dtype belongs to the whole process, so it cannot be left here: code of this
    project names the dtype of each tensor that it makes.
    """
    import torch

    forks.settle()
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield
