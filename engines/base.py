"""An engine runs one built network: named tensors in, named tensors out."""

from __future__ import annotations

import abc
from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from engines.contract import Network
from engines.errors import EngineError, InputError, reason

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine"]


class Engine(abc.ABC):
    """One network on one backend. `infer` checks, a backend's `infer_impl` works.

    Use it as a context manager or call `close`; a closed engine refuses to run.

    Args:
        network: the contract that inputs and outputs obey.
    """

    backend: ClassVar[str]

    def __init__(self, network: Network) -> None:
        self.network = network
        self.closed = False

    def infer(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once on CPU tensors of any batch size.

        A `timestep` of shape [1] serves the whole batch. The outputs are the caller's own: a later call does not
        write over them.

        Raises:
            InputError: an input is no CPU tensor or contradicts the contract.
            EngineError: the engine is closed, or the backend failed or returned something else than the contract.
        """
        if self.closed:
            raise EngineError(f"{self.network.name}: the {self.backend} engine is closed; open it again")
        for name, tensor in inputs.items():
            if not getattr(tensor, "is_cpu", False):
                raise InputError(f"{self.network.name}: {name} is not a CPU torch tensor; convert it with .cpu() first")
        sample = inputs.get("sample")
        timestep = inputs.get("timestep")
        if sample is not None and timestep is not None and timestep.shape == (1,) and sample.ndim:
            inputs["timestep"] = timestep.expand(sample.shape[0])
        sizes = self.network.bind(inputs)
        ready = {spec.name: inputs[spec.name].detach().contiguous() for spec in self.network.inputs}
        try:
            outputs = self.infer_impl(ready)
        except (InputError, EngineError):
            raise
        except Exception as error:
            raise EngineError(f"{self.network.name}: {self.backend} failed: {reason(error)}") from error
        for spec in self.network.outputs:
            output = outputs.get(spec.name)
            got = None if output is None else f"{str(output.dtype).removeprefix('torch.')} {tuple(output.shape)}"
            wanted = f"{spec.dtype} {spec.shape(sizes)}"
            if got != wanted:
                raise EngineError(
                    f"{self.network.name}: {self.backend} returned {spec.name} as {got}, "
                    f"not {wanted}; verify the bundle"
                )
        return outputs

    @abc.abstractmethod
    def infer_impl(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on checked, contiguous CPU tensors; return fresh CPU tensors by output name."""

    def check_names(self, inputs: Collection[str], outputs: Collection[str]) -> None:
        """Raise EngineError unless a graph's inputs and outputs are the contract's, in any order."""
        for kind, names, specs in (("inputs", inputs, self.network.inputs), ("outputs", outputs, self.network.outputs)):
            wanted = {spec.name for spec in specs}
            if set(names) != wanted:
                raise EngineError(
                    f"{self.network.name}: the {self.backend} graph's {kind} are {', '.join(sorted(names))}, "
                    f"not {', '.join(sorted(wanted))}; rebuild the bundle"
                )

    def close(self) -> None:
        """Free what the backend holds. Closing twice is fine."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
