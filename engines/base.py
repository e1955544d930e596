"""An engine runs one built network: named tensors in, named tensors out."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from engines import forks
from engines.contract import BLOCKS, FEATURES, OF, WRT, Network, NetworkName
from engines.errors import EngineError, InputError, reason, with_command
from engines.locks import ReadWriteLock
from engines.torch_modes import default_modes
from engines.variant import Bounds, Place, fitting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine"]

MOST_NAMES = 4  # in a message


class Engine(abc.ABC):
    """One network on one backend. `infer` checks, a backend's `infer_impl` works.

    It may be called from several threads. `refit` and `close` wait for the calls that run, and later calls wait for
    them, so each call runs on one set of weights.

    Use it as a context manager or call `close`; a closed engine refuses to run.

    Args:
        network: the contract that inputs and outputs obey.
        bounds: the sizes that the graph was built for, one after the other; none stands for every size. A call with
            fewer rows than the tightest of them takes is filled up with copies of its last row.

    Attributes: `outside` says in one line what is wrong with sizes that this one does not take, `places` where in the
    graph the weights lie that `refit` replaces, `rebuild` the command that builds the bundle again, `unchanged` raises
    EngineError where the files are no longer those that were opened: whoever reads them again asks afterwards.
    `gradients` opens the networks that `vjp` and `features` run, by name, and `without_gradient` says how to come by
    one that is lacking; who opens it may set them.
    """

    backend: ClassVar[str]

    def __init__(self, network: Network, bounds: Sequence[Bounds] = ()) -> None:
        self.network = network
        self.bounds = tuple(bounds)
        self.outside: Callable[[Mapping[str, int]], str] | None = None
        self.rebuild: str | None = None
        self.unchanged: Callable[[], None] = lambda: None
        self.places: Mapping[str, Place] = {}
        self.gradients: Mapping[NetworkName, Callable[[], Engine]] = {}
        self.without_gradient: Mapping[NetworkName, str] = {}
        self._gradient_engines: dict[NetworkName, Engine] = {}
        self._replaced_weights: dict[str, Tensor] = {}
        self._lock = ReadWriteLock()  # calls read, changes of what they run on write
        self._opening = ReadWriteLock()  # of a gradient network
        self._unusable: str | None = None  # why it cannot run, in a forked process
        self.closed = False
        forks.watch(self)

    def after_fork(self) -> None:
        """Start afresh in a forked process, or refuse to run there; see `engines.forks`."""
        self._unusable = self.after_fork_impl()

    def after_fork_impl(self) -> str | None:
        """Abandon what depends on threads; it is opened again at the next call. Return why it cannot be, if so."""
        return None

    def most_rows(self, **sides: int) -> int | None:
        """The greatest batch of one call on latents of `height` and `width`; None is any.

        Raises:
            InputError: no batch at all is taken at these sides.
        """
        self._profile({"batch": 1, **sides})
        batches = [bounds["batch"][2] for bounds in self.bounds if fitting([bounds], {"batch": 1, **sides}) is not None]
        finite = [most for most in batches if most is not None]
        return max(finite) if len(finite) == len(batches) and finite else None

    def _profile(self, sizes: Mapping[str, int]) -> int | None:
        """The index of the bounds that a call of `sizes` uses; None where every size goes.

        Raises:
            InputError: no bounds cover them.
        """
        if not self.bounds:
            return None
        index = fitting(self.bounds, {symbol: sizes[symbol] for symbol in self.network.symbols if symbol in sizes})
        if index is None and self.outside is not None:
            raise InputError(self.outside(sizes))
        if index is None:
            asked = ", ".join(f"{symbol} {size}" for symbol, size in sizes.items())
            taken = " or ".join(
                ", ".join(f"{s} {least}:{best}:{most or '*'}" for s, (least, best, most) in bounds.items())
                for bounds in self.bounds
            )
            raise InputError(
                f"{self.network.name}: {asked} lies outside what the {self.backend} engine was built for, {taken} "
                "(rows, and latent cells a side); ask for one of these sizes"
            )
        return index

    def infer(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once on CPU tensors of any batch size.

        A `timestep` of shape [1] serves the whole batch. The outputs are the caller's own: a later call does not
        write over them.

        Raises:
            InputError: an input is no CPU tensor or contradicts the contract.
            EngineError: the engine is closed, or the backend failed or returned something else than the contract.
        """
        with self._lock.read(), default_modes():
            self.check_open()
            return self._infer(inputs)

    def _infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            if not getattr(tensor, "is_cpu", False):
                raise InputError(f"{self.network.name}: {name} is not a CPU torch tensor; convert it with .cpu() first")
        first = inputs.get(self.network.inputs[0].name)
        for spec in self.network.inputs:
            row = inputs.get(spec.name)
            if spec.shared and row is not None and first is not None and row.shape[:1] == (1,) and first.ndim:
                inputs[spec.name] = row.expand(len(first), *row.shape[1:])
        sizes = self.network.bind(inputs)
        profile = self._profile(sizes)
        ready = {spec.name: _ordinary(inputs[spec.name]).contiguous() for spec in self.network.inputs}
        rows = sizes["batch"]
        missing = 0 if profile is None else max(0, self.bounds[profile]["batch"][0] - rows)
        if missing:
            ready = {name: _filled(tensor, missing) for name, tensor in ready.items()}
        try:
            outputs = self.infer_impl(ready, profile)
            if missing:
                outputs = {name: output[:rows] for name, output in outputs.items()}
        except InputError:
            raise
        except EngineError as error:  # of a graph that is opened at its first call, too
            self._mended(error)
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
    def infer_impl(self, inputs: dict[str, Tensor], profile: int | None) -> dict[str, Tensor]:
        """Run on checked, contiguous CPU tensors; return fresh CPU tensors by output name.

        `profile` is the index of the bounds that the sizes lie in; None where the engine takes every size.
        """

    def vjp(
        self,
        wrt: Collection[str],
        cotangent: Tensor,
        cotangent_scale: Tensor | None = None,
        *,
        of: str = "noise_pred",
        **inputs: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The UNet's vector-Jacobian product: one forward and one backward pass.

        Args:
            wrt: the inputs that gradients are taken with respect to: "sample", "encoder_hidden_states" or both; of
                features, "sample".
            cotangent: shaped as what the gradients are of: [B, C, h, w]; of an early block the sides are smaller.
            cotangent_scale: [B], or [1] for the whole batch; None is 0. The gradients are those of the sum of
                `y * c`, where `y` is what they are of and `c = cotangent + cotangent_scale * y` is held constant. So
                that of |a * y + b|^2 takes one call: `cotangent = 2a * b`, `cotangent_scale = 2a^2`.
            of: "noise_pred", "features" or a block as of `features`; what comes after them is not computed.
            inputs: as of `infer`.

        Returns:
            What the gradients are of, by name, and the gradients by the input's name, each in that input's shape.

        Raises:
            InputError: `wrt` names none or no such input, `of` nothing that gradients are taken of, or a tensor
                contradicts the contract.
            EngineError: the engine has no such gradients, or as `infer` raises it.
        """
        import torch

        scale = torch.zeros(1, dtype=torch.float32) if cotangent_scale is None else cotangent_scale
        outputs = self.gradient(wrt, of).infer(**inputs, cotangent=cotangent, cotangent_scale=scale)
        grads = {name: outputs[f"grad_{name}"] for name in WRT["unet_vjp"] if name in wrt}
        return {of: outputs[self._ends_at(of)]}, grads

    def features(self, block: str = FEATURES, **inputs: Tensor) -> Tensor:
        """The output of one of the UNet's up blocks, [B, F, h / d, w / d]: the features that drag editing follows.

        What comes after them is not computed. `vjp` takes their gradient.

        Args:
            block: "up_blocks.1", as diffusers calls it; or "features", the last block but one, where d is 1 as at the
                last. At each block before that d is twice as much.
            inputs: as of `infer`.

        Raises:
            InputError: a tensor contradicts the contract, or the UNet has no such block.
            EngineError: the engine has no such features, or as `infer` raises it.
        """
        return self.up_to_features(block).infer(**inputs)[self._blocks()[block]]

    def lacks_gradient(self, wrt: Collection[str], of: str = "noise_pred") -> str | None:
        """None if `vjp` takes gradients of `of` with respect to `wrt`, else one line: why not, and what mends it.

        Raises:
            InputError: `wrt` names none or no such input, or `of` nothing that gradients are taken of.
        """
        end = self._ends_at(of)
        able = max((WRT[name] for name in WRT if OF[name] == end), key=len)
        if not set(wrt) or not set(wrt) <= set(able):
            choice = f"{' or '.join(able)}{', or both' if len(able) > 1 else f', the input of the gradient of {of}'}"
            raise InputError(f"wrt: {', '.join(sorted(set(wrt))) or 'nothing'}; name {choice}")
        asked = f"gradient of {of}" if of != "noise_pred" else "gradient"
        asked += f" with respect to {' and '.join(name for name in able if name in wrt)}"
        able_ones = (name for name in WRT if OF[name] == end and set(wrt) <= set(WRT[name]))
        least = min(able_ones, key=lambda name: len(WRT[name]))
        return self._lacks("gradients are those", asked, bool(self._enough(wrt, end)), least)

    def lacks_features(self, block: str = FEATURES) -> str | None:
        """None if `features` gives them, else one line: why not, and what mends it.

        Raises:
            InputError: the UNet has no such block.
        """
        name = self._up_to(block)
        return self._lacks("features are those", f"graph up to its {block}", name in self.gradients, name)

    def _lacks(self, what: str, asked: str, found: bool, least: NetworkName) -> str | None:
        if self.closed:
            return self._said_closed
        if self.network.name != "unet":
            return f"{self.network.name}: {what} of the UNet; open that"
        mend = self.without_gradient.get(least, "use the engine eager")
        return None if found else f"unet: the {self.backend} engine has no {asked}; {mend}"

    def gradient(self, wrt: Collection[str], of: str = "noise_pred") -> Engine:
        """The engine that `vjp` runs; it is opened once, and closed with this one.

        Raises:
            InputError: as `lacks_gradient`.
            EngineError: there is none, or it cannot be opened.
        """
        fault = self.lacks_gradient(wrt, of)
        if fault is not None:
            raise EngineError(fault)
        return self._derived(self._enough(wrt, self._ends_at(of))[0])

    def up_to_features(self, block: str = FEATURES) -> Engine:
        """The engine that `features` runs; as `gradient`."""
        fault = self.lacks_features(block)
        if fault is not None:
            raise EngineError(fault)
        return self._derived(self._up_to(block))

    def attentions(self) -> list[Any]:
        """The UNet's self-attention layers, from its input to its output: diffusers' `Attention` modules, whose
        processors may be replaced for a while.

        Raises:
            EngineError: what is inside this engine cannot be reached, or it is closed.
        """
        raise EngineError(
            f"{self.network.name}: the {self.backend} engine does not expose its attention; use the engine eager"
        )

    def _ends_at(self, of: str) -> str:
        """The tensor of the UNet that `of` names."""
        known = {"noise_pred": "noise_pred", **self._blocks()}
        if of not in known:
            raise InputError(f"of: {of}; name {', '.join(known)}")
        return known[of]

    def _up_to(self, block: str) -> NetworkName:
        """The network that ends at that block."""
        known = self._blocks()
        if block not in known:
            raise InputError(f"block: {block}; name {', '.join(known)}")
        return BLOCKS[known[block]][0]

    def _blocks(self) -> dict[str, str]:
        """The blocks that features can be taken of, by what they are called; a Stable Diffusion's where the UNet's are
        not known."""
        names = [spec.name for spec in self.network.within] or list(BLOCKS)
        return {FEATURES: names[-2:][0], **{name: name for name in names}}

    def _enough(self, wrt: Collection[str], end: str) -> list[NetworkName]:
        """The gradient networks at hand that cover `wrt`, of that tensor, the smallest first."""
        names = (name for name in self.gradients if name in WRT and OF[name] == end and set(wrt) <= set(WRT[name]))
        return sorted(names, key=lambda name: len(WRT[name]))

    def _derived(self, name: NetworkName) -> Engine:
        """The engine of a network of `gradients`; it is opened once."""
        with self._lock.read(), self._opening.write():
            self.check_open()
            if name not in self._gradient_engines:
                engine = self.gradients[name]()
                if self._replaced_weights:
                    engine.refit(self._replaced_weights)
                self._gradient_engines[name] = engine
            return self._gradient_engines[name]

    def _mended(self, error: EngineError) -> NoReturn:
        """Raise `error`, with the command that mends it where one does."""
        said = with_command(error, self.rebuild)
        if said is None:
            raise error
        raise EngineError(said) from error

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Put other values into the engine's weights, without a rebuild.

        Hand over every weight that may differ from before: then A, B and A again give A bit for bit. One that fails or
        is interrupted on its way may have replaced some of them: refit again before you run the engine.

        Args:
            weights: by the torch parameter's name, in its layout.

        Raises:
            EngineError: the engine is closed, or cannot be refitted, or fails at it.
            InputError: it has no such weight.
        """
        with self._lock.write():
            self.check_open()
            self._refit(weights)

    def _refit(self, weights: Mapping[str, Tensor]) -> None:
        unknown = sorted(set(weights) - set(self.places))
        if unknown:
            raise InputError(
                f"{self.network.name}: the {self.backend} engine has no weights {unknown[0]!r} that can be replaced; "
                "build it with --lora-mode refit"
            )
        placed = {}
        for name, weight in weights.items():
            place = self.places[name]
            placed[place.name] = (weight.detach().T if place.transposed else weight.detach()).contiguous()
        try:
            self.refit_impl(placed)
        except InputError:
            raise
        except EngineError as error:
            self._mended(error)
        except Exception as error:
            raise EngineError(f"{self.network.name}: {self.backend} cannot refit ({reason(error)})") from error
        if self.gradients:
            self._replaced_weights |= weights
            for engine in self._gradient_engines.values():
                engine.refit(weights)

    def refit_impl(self, weights: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Replace weights by their names in the graph, in its layout."""
        raise EngineError(f"{self.network.name}: {self.backend} cannot replace weights; use another engine")

    def check_names(self, inputs: Collection[str], outputs: Collection[str]) -> None:
        """Raise EngineError unless a graph's inputs and outputs are the contract's, in any order."""
        for kind, names, specs in (("inputs", inputs, self.network.inputs), ("outputs", outputs, self.network.outputs)):
            wanted = {spec.name for spec in specs}
            if set(names) != wanted:
                raise EngineError(
                    f"{self.network.name}: the {self.backend} graph's {kind} are {_few(names)}, not {_few(wanted)}; "
                    "rebuild the bundle"
                )

    def check_open(self) -> None:
        """Raise EngineError where the engine is closed, or cannot run in this process."""
        if self.closed:
            raise EngineError(self._said_closed)
        if self._unusable is not None:
            raise EngineError(f"{self.network.name}: {self._unusable}")

    @property
    def _said_closed(self) -> str:
        return f"{self.network.name}: the {self.backend} engine is closed; open it again"

    def close(self) -> None:
        """Free what the backend holds, once the calls that run have ended. Closing twice is fine."""
        with self._lock.write():
            for engine in self._gradient_engines.values():
                engine.close()
            self._gradient_engines.clear()
            if self._unusable is None:
                self.close_impl()
            self.closed = True

    def close_impl(self) -> None:  # noqa: B027 - a backend may hold nothing
        """Free what the backend holds; the engine runs no call then."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _few(names: Collection[str]) -> str:
    """Names in a message: a UNet's text part has one for each layer."""
    first, left = sorted(names)[:MOST_NAMES], len(names) - MOST_NAMES
    return ", ".join([*first, f"{left} more"] if left > 0 else first)


def _ordinary(tensor: Tensor) -> Tensor:
    """Detach a tensor; copy one that was made in inference mode, which autograd refuses outside of it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _filled(tensor: Tensor, rows: int) -> Tensor:
    return tensor[[*range(len(tensor)), *[len(tensor) - 1] * rows]].contiguous()
