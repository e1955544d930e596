"""The networks of one model on engines: into which calls work is split, the UNet's output and its gradients.

Work is given in images. How many of them go into one call, what a LoRA's strength adds to it, and which engine takes
gradients is decided here alone.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from engines.base import Engine
from engines.bundle import Bundle
from engines.contract import DERIVED, FEATURES, LORA_STRENGTH, NETWORKS, WRT, Dims, NetworkName, contract
from engines.eager import EagerEngine, torch_networks
from engines.locks import ReadWriteLock
from engines.lora import LoraWeights
from engines.runtime_lora import RuntimeUnet
from smooth_rt.calls import Call, Calls, Weights, one_call
from smooth_rt.errors import EngineError, InputError, SmoothRTError
from smooth_rt.lora import lora_weights
from smooth_rt.model import Model
from smooth_rt.opening import reopen_model
from smooth_rt.ranges import as_whole, check, shown
from smooth_rt.tasks import checks

__all__ = ["CELLS_PER_CALL", "Networks", "eager_engines"]

LOG = logging.getLogger("smooth_rt")

# batch_size="auto": the latent cells (h * w a row; tokens for the text encoder) and the rows that one call may hold.
# Cells bound memory: at 64x64, four rows of the UNet (two guided images), one of its gradients and one image of the VAE
# go into a call. Gradients keep every layer's results: a row of SD1.5's takes 14 GiB in ONNX Runtime there, four of the
# forward pass less than 2. Rows stay below 64, where exported graphs end. One image always goes.
CELLS_PER_CALL: dict[NetworkName, int] = {
    "text_encoder": 16_384,
    "unet": 16_384,
    "vae_encoder": 4_096,
    "vae_decoder": 4_096,
    **{name: 4_096 if name in WRT else 16_384 for name in DERIVED},
}
ROWS_PER_CALL = 62


class Networks:
    """The networks of one model; a context manager that closes their engines.

    It may be called from several threads; see `call`.

    Args:
        engines: one for each network.
        dims: the model's sizes.
        batch_size: images in one call of a network (both halves of guidance go along), or "auto": CELLS_PER_CALL.

    Attributes: `bundle` is what the engines are from (None for eager), `lora` the LoRA of engines that are refitted;
    `dims` and `batch_size` are as given.
    """

    def __init__(self, engines: Mapping[NetworkName, Engine], dims: Dims, batch_size: int | str = "auto") -> None:
        self._engines = dict(engines)
        self._eager_unet: EagerEngine | None = None  # of gradients that no engine was built for
        self._opening = ReadWriteLock()  # of `_eager_unet`
        self._calls = Calls()
        self.dims = dims
        self.batch_size = batch_size
        self.bundle: Bundle | None = None
        self.lora: LoraWeights | None = None

    def call(self) -> AbstractContextManager[Call]:
        """Run what this thread does with the pipeline in the body as one call.

        Each method that computes is a call of its own outside of one. A call runs on one set of weights: a strength
        that another thread sets meanwhile holds for later calls. It runs in torch's default modes
        (`engines.torch_modes`).
        """
        return self._calls.one(exclusive=self.lora is not None)

    @property
    def evaluations(self) -> Mapping[str, int]:
        """Rows that went through the UNet so far, in all calls, by kind."""
        return self._calls.evaluations

    @property
    def digests(self) -> Mapping[str, str]:
        """Digests by component of the weights that run, the LoRA and its strength included."""
        return self._calls.weights.digests

    @digests.setter
    def digests(self, value: Mapping[str, str]) -> None:
        self._calls.weights = replace(self._calls.weights, digests=value)

    @property
    def runs_on(self) -> str:
        """The engine and its bundle, for messages."""
        backend = self._engines["unet"].backend
        return backend if self.bundle is None else f"{backend}, {self.bundle.path}"

    @property
    def lora_strength(self) -> float | None:
        """The strength that the LoRA runs at, fused or set; None without one, and where setting it was broken off."""
        try:
            return float(self.digests[LORA_STRENGTH])
        except (KeyError, ValueError):  # a name that is no number stands for one that is being set
            return None

    def set_lora_strength(self, strength: float) -> None:
        """Set the LoRA's strength: 1 is as trained, 0 is none. A, B and A again gives the same images bit for bit.

        It holds for later calls, and for the rest of the call whose callback sets it. A call that runs in another
        thread goes on at the strength that it began with.

        If the engines were built with `lora_mode="runtime"`, the strength is an input and this takes no time. If they
        were built with "refit", this waits until no other call runs, and replaces their weights; calls that begin
        meanwhile wait for it, so a callback must not wait for another thread's call. If it fails or is interrupted,
        nothing runs until a strength is set again.

        Raises:
            InputError: the strength is out of its range, or the LoRA is fused into the engines, or there is none.
            EngineError: the engine is closed, or cannot take the weights.
        """
        (strength,) = check(lora_strength=strength)
        unet = self._engines["unet"]
        unet.check_open()
        if self.lora is None and not _takes_strength(unet):
            raise InputError(
                f"lora_strength={strength:g}: the engines hold their LoRA fused, or none; build with --lora-mode "
                "runtime or refit to set it at run time"
            )
        with self._calls.setting(exclusive=self.lora is not None):
            digests = {**self.digests, LORA_STRENGTH: repr(strength)}
            if self.lora is not None:
                weights = self.lora.at(strength)
                # Until all weights are replaced they are of neither strength: a digest that nothing is found by.
                self._calls.weights = Weights(None, {**digests, LORA_STRENGTH: f"being set {uuid.uuid4()}"})
                unet.refit(weights)
            self._calls.weights = Weights(strength, digests)

    @property
    def batch_size(self) -> int | str:
        """Images in one call of a network, or "auto"."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | str) -> None:
        self._batch_size: int | str = check(batch_size=value)[0]

    @one_call
    def predict(
        self,
        latents: Tensor,
        timestep: int,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The UNet's output [N, C, h, w], guided: `uncond + guidance_scale * (cond - uncond)`.

        Both halves go into one call. The unconditional one is left out where it cannot matter: at a scale of 1, or
        where its embeddings are those of the prompt. Embeddings are [N, L, D].

        Raises:
            InputError: a tensor is of another shape, or a number is out of its range.
            EngineError: the engine failed.
        """
        negative = negative_prompt_embeds
        given = {"latents": latents, "prompt_embeds": prompt_embeds}
        checks.rows(self.dims, **given, **({} if negative is None else {"negative_prompt_embeds": negative}))
        timestep, (guidance_scale,) = _whole(timestep), check(guidance_scale=guidance_scale)
        if guidance_scale == 1 or (negative is not None and torch.equal(negative, prompt_embeds)):
            negative = None
        outputs, rows = [], 1 if negative is None else 2
        for part in self.calls("unet", len(latents), latents.shape[2:], rows):
            sample, text = latents[part], prompt_embeds[part]
            if negative is not None:
                sample, text = torch.cat([sample, sample]), torch.cat([negative[part], text])
            when = torch.full((len(sample),), timestep, dtype=torch.int64)
            output = self._run("unet", sample=sample, timestep=when, encoder_hidden_states=text)
            self._calls.count("forward", len(sample))
            if negative is not None:
                uncond, cond = output.chunk(2)
                output = uncond + guidance_scale * (cond - uncond)
            outputs.append(output)
        return torch.cat(outputs)

    @one_call
    def vjp(
        self,
        latents: Tensor,
        timestep: int,
        prompt_embeds: Tensor,
        wrt: Collection[str],
        cotangent: Tensor,
        cotangent_scale: Tensor | None = None,
        *,
        of: str = "noise_pred",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The UNet's output, or its features, and gradients of N images; see `Engine.vjp`.

        An engine without gradients leaves them to eager autograd on the torch weights that it was made from; that is
        logged once, with the reason.

        Args:
            latents: [N, C, h, w], `prompt_embeds`: [N, L, D].
            timestep: of all of them.
            wrt: "sample" (the latents), "encoder_hidden_states" (the embeddings) or both.
            cotangent: shaped as the result, `cotangent_scale`: [N], [1] or None.
            of: what the gradients are of: "noise_pred", or a block of `features`.

        Returns:
            The output [N, C, h, w], or the features as of `features`, and the gradients by name.

        Raises:
            InputError: a tensor is of another shape, or `wrt` or `of` names no such thing.
            EngineError: the engine has no gradients, and its torch weights are out of reach.
        """
        count = checks.rows(self.dims, latents=latents, prompt_embeds=prompt_embeds, cotangent=cotangent)
        timestep, wrt = _whole(timestep), _names(wrt)
        scale = torch.zeros(1, dtype=torch.float32) if cotangent_scale is None else cotangent_scale
        checks.rows(self.dims, cotangent_scale=scale)
        if scale.shape not in ((1,), (count,)):
            raise InputError(
                f"cotangent_scale: shape {list(scale.shape)}, not [{count}] or [1]; give one for each image"
            )
        engine = self._differentiable(self._engines["unet"].lacks_gradient(wrt, of))
        outputs, grads = [], []
        for part in self.calls("unet", count, latents.shape[2:], runs=engine.gradient(wrt, of)):
            sample = latents[part]
            output, grad = engine.vjp(
                wrt,
                cotangent[part],
                scale.expand(count)[part],
                of=of,
                sample=sample,
                timestep=torch.full((len(sample),), timestep, dtype=torch.int64),
                encoder_hidden_states=prompt_embeds[part],
                **self._strength(engine),
            )
            self._calls.count("gradient", len(sample))
            outputs.append(output[of])
            grads.append(grad)
        return torch.cat(outputs), {name: torch.cat([grad[name] for grad in grads]) for name in grads[0]}

    @one_call
    def features(self, latents: Tensor, timestep: int, prompt_embeds: Tensor, block: str = FEATURES) -> Tensor:
        """The UNet's features of N images that drag editing follows, [N, F, h / d, w / d]; see `Engine.features`.

        An engine without them leaves them to eager, as `vjp` does.

        Args:
            latents: [N, C, h, w], `prompt_embeds`: [N, L, D].
            timestep: of all of them.
            block: "up_blocks.1" and so on, or "features": the last block but one, where d is 1.

        Raises:
            InputError: a tensor is of another shape, or there is no such block.
            EngineError: the engine has no features, and its torch weights are out of reach.
        """
        count, timestep = checks.rows(self.dims, latents=latents, prompt_embeds=prompt_embeds), _whole(timestep)
        engine = self._differentiable(self._engines["unet"].lacks_features(block))
        found = []
        for part in self.calls("unet", count, latents.shape[2:], runs=engine.up_to_features(block)):
            sample, text = latents[part], prompt_embeds[part]
            when = torch.full((len(sample),), timestep, dtype=torch.int64)
            inputs = {"sample": sample, "timestep": when, "encoder_hidden_states": text}
            found.append(engine.features(block, **inputs, **self._strength(engine)))
            self._calls.count("forward", len(sample))
        return torch.cat(found)

    def has_gradient(self, wrt: Collection[str], of: str = "noise_pred") -> bool:
        """Check that the engine itself takes a gradient, which `vjp` else leaves to eager.

        Raises:
            InputError: as `vjp`.
        """
        return self._engines["unet"].lacks_gradient(_names(wrt), of) is None

    def _differentiable(self, fault: str | None) -> Engine:
        """The engine that takes gradients: the UNet's own unless it has that fault, or else eager on the weights that
        it was made from."""
        if fault is None:
            return self._engines["unet"]
        with self._opening.write():
            if self._eager_unet is None:
                if self.bundle is None:
                    raise EngineError(fault)
                try:
                    model = reopen_model(self.bundle)
                except SmoothRTError as error:
                    raise EngineError(f"{fault} (nor can eager autograd take it: {error})") from error
                LOG.warning("gradients: taken by eager autograd, not by the engine (%s)", fault)
                self._eager_unet = eager_engines(model)["unet"]
            return self._eager_unet

    def attentions(self) -> list[Any]:
        """The UNet's self-attention layers; see `Engine.attentions`."""
        return self._engines["unet"].attentions()

    def calls(
        self,
        network: NetworkName,
        count: int,
        sides: Sequence[int] | None = None,
        rows: int = 1,
        runs: Engine | None = None,
    ) -> Iterator[slice]:
        """Which of `count` images each call takes, where an image is so many rows of latents of these sides. `runs` is
        the engine where it is not the network's own: of gradients fewer go into a call. Neither gets more than it
        takes."""
        cells = self.dims.tokens if sides is None else sides[0] * sides[1]
        named = dict(zip(("height", "width"), sides or (), strict=False))
        each = [engine.most_rows(**named) for engine in (self._engines[network], runs) if engine is not None]
        bound = CELLS_PER_CALL[network if runs is None else runs.network.name]
        size = max(1, min(bound // cells, ROWS_PER_CALL) // rows)
        if isinstance(self._batch_size, int):
            size = self._batch_size
        for most in each:
            size = size if most is None else max(1, min(size, most // rows))
        return (slice(first, first + size) for first in range(0, count, size))

    def _run(self, network: NetworkName, **inputs: Tensor) -> Tensor:
        """The network's first output."""
        engine = self._engines[network]
        return engine.infer(**inputs, **self._strength(engine))[engine.network.outputs[0].name]

    def _strength(self, engine: Engine) -> dict[str, Tensor]:
        """The LoRA's strength, for a network that takes it.

        Raises:
            EngineError: nobody knows the weights that would run.
        """
        strength = self._calls.weights.lora_strength
        if strength is None:
            raise EngineError(
                "lora_strength: setting it failed or was interrupted as weights were replaced, and some may be; set it "
                "again"
            )
        return {LORA_STRENGTH: torch.tensor([strength], dtype=torch.float32)} if _takes_strength(engine) else {}

    def close(self) -> None:
        """Free the engines. Closing twice is fine."""
        for engine in self._engines.values():
            engine.close()
        if self._eager_unet is not None:
            self._eager_unet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eager_engines(model: Model) -> dict[NetworkName, EagerEngine]:
    """On the model's own modules; a LoRA that is not fused takes its strength as an input of the UNet."""
    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    if model.lora is not None:
        networks["unet"] = RuntimeUnet(networks["unet"], lora_weights(model.unet, model.lora))
    apart = model.lora is not None
    return {name: EagerEngine(contract(name, model.dims, lora_strength=apart), networks[name]) for name in NETWORKS}


def _takes_strength(engine: Engine) -> bool:
    return any(spec.name == LORA_STRENGTH for spec in engine.network.inputs)


def _whole(timestep: int) -> int:
    found = as_whole(timestep)
    if found is None or not 0 <= found < 2**31:
        raise InputError(f"timestep={shown(timestep)}: give a whole number from 0 on")
    return found


def _names(wrt: Collection[str]) -> Collection[str]:
    """Of one input a caller may give the name alone."""
    names = [wrt] if isinstance(wrt, str) else wrt
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise InputError(f"wrt={shown(wrt)}: name sample or encoder_hidden_states, or both in a list")
    return names
