"""SmoothPipeline: text and images in, images out, over the engines of one model. It reads like a diffusers pipeline.

The pipeline owns the networks, how work is split into calls of them, and the loop through time. The tasks
(`smooth_rt.tasks`) are its methods and hand the loop what differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import torch
from torch import Generator, Tensor

from engines.base import Engine
from engines.bundle import Bundle
from engines.contract import LORA_STRENGTH, NETWORKS, Dims, NetworkName, contract
from engines.eager import EagerEngine, torch_networks
from engines.lora import LORA_FILE, LoraWeights
from engines.providers import joined
from engines.recipes import RECIPES, check_precision
from engines.runtime_lora import RuntimeUnet
from engines.select import BACKENDS, BOUNDED, Choice, check_lora_mode, choose
from smooth_rt.errors import EngineError, InputError, SmoothRTError
from smooth_rt.images import ImageLike, Images, OutputType, read, to_images
from smooth_rt.lora import fused_with, lora_weights
from smooth_rt.model import Model, PipelineConfig, load_model, read_config
from smooth_rt.opening import open_model, reopen_model
from smooth_rt.ranges import check, shown
from smooth_rt.schedule import PredictionType, Schedule, Step, ddim_step
from smooth_rt.tasks import checks
from smooth_rt.tasks.edit import edit
from smooth_rt.tasks.generate import generate
from smooth_rt.tasks.interpolate import interpolate
from smooth_rt.tasks.inversion import invert

if TYPE_CHECKING:
    from engines.variant import LoraMode, Precision

__all__ = ["CELLS_PER_CALL", "Move", "Predict", "SmoothPipeline", "StepCallback"]

LOG = logging.getLogger("smooth_rt")

# (latents [N, C, h, w], index of the step, timestep) -> the model's output [N, C, h, w]
Predict: TypeAlias = Callable[[Tensor, int, int], Tensor]
# (latents, index of the step, the step) -> the latents after it
Move: TypeAlias = Callable[[Tensor, int, Step], Tensor]
# (pipe, index of the step, timestep, {"latents": ...}) -> None, or a dict with the latents to go on from
StepCallback: TypeAlias = Callable[["SmoothPipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]

# batch_size="auto": the latent cells (h * w a row; tokens for the text encoder) and the rows that one call may hold.
# Cells bound memory: at 64x64, four rows of the UNet (two guided images) and one image of the VAE go into a call. Rows
# stay below 64, where exported graphs end. One image always goes.
CELLS_PER_CALL: dict[NetworkName, int] = {
    "text_encoder": 16_384,
    "unet": 16_384,
    "vae_encoder": 4_096,
    "vae_decoder": 4_096,
}
ROWS_PER_CALL = 62


class SmoothPipeline:
    """A text-to-image model on engines. Made by `from_pretrained` or `from_engines`; a context manager.

    Args:
        engines: one for each network; `close` closes them.
        config: tokenizer, scheduler configuration and the VAE's scaling factor.
        dims: the model's sizes.
        source: the model as its user named it.
        choice: the backend that runs, and why.
        size: height and width in pixels of a request that names none; None is the size that the model was trained at.
        batch_size: images in one call of a network (both halves of guidance go along), or "auto": CELLS_PER_CALL.

    Attributes: `engine` is the backend that really runs ("eager", "onnxruntime-cuda"), `reason` why that one,
    `precision` that of its engines, `bundle` what they are from (None for eager), `digests` what tells the weights that
    run from others, the LoRA and its strength among them, `evaluations` those of the UNet so far, by kind, a row of a
    call each; `dims`, `source`, `size` and `batch_size` are as given.
    """

    def __init__(
        self,
        engines: Mapping[NetworkName, Engine],
        config: PipelineConfig,
        dims: Dims,
        *,
        source: str = "",
        choice: Choice | None = None,
        size: tuple[int, int] | None = None,
        batch_size: int | str = "auto",
    ) -> None:
        self._engines = dict(engines)
        self.tokenizer: Any = config.tokenizer
        self.scheduler_config = config.sampling_config
        self.scaling_factor = config.scaling_factor
        self.dims = dims
        self.source = source
        self.engine, self.reason = (choice.backend, choice.reason) if choice else (engines["unet"].backend, "given")
        self.size = size or (dims.sample_size * dims.vae_factor,) * 2
        self.bundle: Bundle | None = None
        self.precision = "fp32"
        self.lora: LoraWeights | None = None
        self._lora_strength = 1.0
        self._eager_unet: EagerEngine | None = None  # of gradients that no engine was built for
        self.digests: Mapping[str, str] = {}
        self.evaluations = {"forward": 0, "gradient": 0}
        self.batch_size = batch_size

    # Each task takes the pipeline first, so it is a method as it stands.
    __call__ = generate
    interpolate = interpolate
    invert = invert
    edit = edit

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Model = "default",
        lora: str | Path | None = None,
        lora_strength: float = 1.0,
        engine: str = "auto",
        batch_size: int | str = "auto",
        precision: str = "fp32",
        lora_mode: str = "fused",
        progress: Callable[[str, int, int], None] | None = None,
        config: str | Path | None = None,
        provider: str | None = None,
    ) -> Self:
        """Load a model, fuse a Smooth-LoRA, and open it on an engine, which is built into the cache when needed.

        Args:
            model: "default" (shipped), a diffusers folder, a hub id or a single-file .safetensors checkpoint; or what
                `load_model` returned, into whose UNet the LoRA is then fused.
            lora: None, "default" (shipped, for the default model), a file, a folder or a hub id.
            lora_strength: the factor that the LoRA is fused at; 1 is as trained.
            engine: one of `engines.BACKENDS`, or "auto": the first of openvino, onnxruntime, eager that can run, on a
                GPU tensorrt, tensorrt-rtx and onnxruntime-cuda before them; logged.
            batch_size: see the class.
            precision: of the engines: "fp32", or what else the backend is built in ("fp16", "bf16", "int8").
            lora_mode: "fused"; or "runtime" or "refit", with which `set_lora_strength` changes the LoRA's strength: at
                once and for a few more computations in each step, or by opening the engine anew.
            progress: called as `progress(stage, done, total)` while engines are built.
            config: for a single-file checkpoint, as in `load_model`.
            provider: of ONNX Runtime: "cpu", "cuda", "tensorrt" or "tensorrt-rtx"; the engine is then
                "onnxruntime-cuda" and so on, which may be named as well.

        Raises:
            InputError: an option is out of its range; said before the model is loaded.
            ModelError: the model or the LoRA cannot be read or does not fit.
            EngineError: the named engine cannot run here.
            ParityError: a built engine differs from the torch module.
        """
        (model,) = (model,) if isinstance(model, Model) else check(model=model)
        lora, lora_strength, config = check(lora=lora, lora_strength=lora_strength, config=config)
        engine, batch_size, precision = check(engine=engine, batch_size=batch_size, precision=precision)
        engine = joined(engine, provider)
        choice = choose(engine, [name for name in BACKENDS if precision in RECIPES[name]])
        check_precision(choice.backend, precision)
        if lora_mode != "fused":
            check_lora_mode(choice.backend, precision, lora_mode)
        if choice.backend != "eager":
            from smooth_rt.build import build_engines

            model = model if isinstance(model, Model) else load_model(model, config=config)
            bundle = build_engines(
                model, lora, lora_strength, [choice.backend], None, progress, precision, lora_mode=lora_mode
            )
            return cls._open(bundle, choice, batch_size, precision, lora_strength, lora_mode)
        if lora is None and lora_mode != "fused":
            raise InputError(f"lora_mode={lora_mode}: there is no LoRA whose strength could be set; name one")
        opened = open_model(model, lora, lora_strength if lora_mode == "fused" else None, config)
        return cls._eager(opened, choice, batch_size, lora_strength)

    @classmethod
    def from_engines(
        cls,
        bundle: str | Path | Bundle,
        engine: str = "auto",
        batch_size: int | str = "auto",
        config: str | Path | None = None,
        precision: str | None = None,
        lora_strength: float = 1.0,
        lora_mode: str | None = None,
        provider: str | None = None,
    ) -> Self:
        """Open a bundle that `smooth-rt build-engine` wrote.

        Args:
            bundle: its folder, which is verified first, or an open `Bundle`.
            engine: "auto", a backend of the bundle, or "eager": the torch weights that the bundle was made from.
            batch_size: see the class.
            config: for "eager", where the bundle was made from a single-file checkpoint; as in `load_model`.
            precision: of the engines; None is the most exact that the bundle has for the backend.
            lora_strength: of a bundle whose LoRA is set at run time; see `set_lora_strength`.
            lora_mode: "refit" or "runtime", of a bundle that has both; None is the one that was built first.
            provider: as in `from_pretrained`.

        Raises:
            InputError: an option is out of its range.
            BundleError: the bundle is missing, damaged or stale, or its torch weights are gone or have changed.
            EngineError: the named engine is not in the bundle or cannot run here.
        """
        engine, batch_size, config = check(engine=engine, batch_size=batch_size, config=config)
        (lora_strength,) = check(lora_strength=lora_strength)
        precision, lora_mode = check(precision=precision, lora_mode=lora_mode)
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(*check(bundle=bundle)))
        choice = choose(joined(engine, provider), opened.backends)
        if choice.backend != "eager":
            return cls._open(opened, choice, batch_size, precision, lora_strength, lora_mode)
        return cls._eager(reopen_model(opened, config), choice, batch_size, lora_strength)

    @classmethod
    def _open(
        cls,
        bundle: Bundle,
        choice: Choice,
        batch_size: int | str,
        precision: str | None,
        lora_strength: float,
        lora_mode: str | None,
    ) -> Self:
        config = read_config(bundle.config)
        built = bundle.find(choice.backend, cast("Precision | None", precision), cast("LoraMode | None", lora_mode))
        if choice.backend in BOUNDED:
            from smooth_rt.build import compiled

            bundle.caches = compiled()
        engines = {name: bundle.open_network(name, built) for name in NETWORKS}
        size = built.profiles[0].height.opt, built.profiles[0].width.opt
        named: dict[str, Any] = {"source": bundle.source.model, "choice": choice, "batch_size": batch_size}
        pipe = cls(engines, config, bundle.dims, size=size, **named)
        pipe.bundle = bundle
        pipe.precision = built.variant.precision
        lora = bundle.source.lora
        strength = lora_strength if lora is None or lora.strength is None else lora.strength
        pipe.digests = _digests(bundle.source.digests, (lora.digest, strength) if lora is not None else None)
        if built.variant.lora_mode == "refit":
            pipe.lora = LoraWeights.load((bundle.path / built.engine("unet").file).with_name(LORA_FILE))
        if built.variant.lora_mode != "fused":
            pipe.set_lora_strength(strength)
        return pipe

    @classmethod
    def _eager(cls, model: Model, choice: Choice, batch_size: int | str, lora_strength: float) -> Self:
        engines, apart = _eager_engines(model), model.lora
        pipe = cls(engines, model.config(), model.dims, source=model.source, choice=choice, batch_size=batch_size)
        pipe.digests = _digests(
            model.digests, fused_with(model.unet) if apart is None else (apart.digest, lora_strength)
        )
        if apart is not None:
            pipe.set_lora_strength(lora_strength)
        return pipe

    def set_lora_strength(self, strength: float) -> None:
        """Set the LoRA's strength: 1 is as trained, 0 is none. A, B and A again gives the same images bit for bit.

        Of engines that were built with `lora_mode="runtime"` it is an input, so that this takes no time; into those
        with "refit" the weights are put that the base model's become at that strength.

        Raises:
            InputError: the strength is out of its range, or the LoRA is fused into the engines, or there is none.
            EngineError: the engine cannot take the weights.
        """
        (strength,) = check(lora_strength=strength)
        unet = self._engines["unet"]
        if self.lora is not None:
            unet.refit(self.lora.at(strength))
        elif not _takes_strength(unet):
            raise InputError(
                f"lora_strength={strength:g}: the engines hold their LoRA fused, or none; build with --lora-mode "
                "runtime or refit to set it at run time"
            )
        self._lora_strength = strength
        self.digests = {**self.digests, "lora_strength": f"{strength:g}"}

    @property
    def batch_size(self) -> int | str:
        """Images in one call of a network, or "auto"."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | str) -> None:
        self._batch_size: int | str = check(batch_size=value)[0]

    def schedule(self, num_inference_steps: int) -> Schedule:
        """The model's DDIM schedule in so many steps."""
        return Schedule.from_config(self.scheduler_config, num_inference_steps)

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Text embeddings [N, L, D] of N prompts. What does not fit into L tokens is cut off, with a logged warning."""
        prompts = checks.as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct, padding="max_length", max_length=self.dims.tokens, truncation=True, return_tensors="pt"
        )
        for ids, prompt in zip(self.tokenizer(distinct, verbose=False).input_ids, distinct, strict=True):
            if len(ids) > self.dims.tokens:
                cut = shown(self.tokenizer.decode(ids[self.dims.tokens - 1 : -1]))
                LOG.warning("prompt %s: longer than %d tokens; left out: %s", shown(prompt), self.dims.tokens, cut)
        parts = self._calls("text_encoder", len(distinct))
        embeds = torch.cat([self._run("text_encoder", input_ids=tokens.input_ids[part].int()) for part in parts])
        return embeds[[distinct.index(prompt) for prompt in prompts]]

    def encode_image(
        self, images: ImageLike | Sequence[ImageLike], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Latents [N, C, H/f, W/f] of images scaled and centre-cropped to `height` x `width`: the posterior's mean."""
        height, width = self.image_size(height, width)
        pixels = read(images, height, width) * 2 - 1
        parts = self._calls("vae_encoder", len(pixels), (height // self.dims.vae_factor, width // self.dims.vae_factor))
        return torch.cat([self._run("vae_encoder", sample=pixels[part]) for part in parts]) * self.scaling_factor

    def decode(self, latents: Tensor, output_type: OutputType = "pil") -> Images:
        """Images of latents [N, C, h, w]; "latent" hands these back."""
        if output_type == "latent":
            return latents
        scaled = latents / self.scaling_factor
        parts = self._calls("vae_decoder", len(scaled), scaled.shape[2:])
        pixels = torch.cat([self._run("vae_decoder", latent_sample=scaled[part]) for part in parts])
        if not bool(torch.isfinite(pixels).all()):
            raise EngineError(f"decode: the VAE's images are not finite on {self.engine}; its weights may be damaged")
        return to_images((pixels / 2 + 0.5).clamp(0, 1), output_type)

    def draw_noise(
        self, count: int, height: int | None, width: int | None, generator: Generator | Sequence[Generator] | None
    ) -> Tensor:
        """N(0, I) of `count` images [count, C, H/f, W/f], each drawn alone, on the CPU."""
        height, width = self.image_size(height, width)
        shape = (1, self.dims.latent_channels, height // self.dims.vae_factor, width // self.dims.vae_factor)
        return torch.cat([torch.randn(shape, generator=g) for g in checks.per_image(generator, count)])

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
        """
        negative = negative_prompt_embeds
        if guidance_scale == 1 or (negative is not None and torch.equal(negative, prompt_embeds)):
            negative = None
        outputs, rows = [], 1 if negative is None else 2
        for part in self._calls("unet", len(latents), latents.shape[2:], rows):
            sample, text = latents[part], prompt_embeds[part]
            if negative is not None:
                sample, text = torch.cat([sample, sample]), torch.cat([negative[part], text])
            when = torch.full((len(sample),), timestep, dtype=torch.int64)
            output = self._run("unet", sample=sample, timestep=when, encoder_hidden_states=text)
            self.evaluations["forward"] += len(sample)
            if negative is not None:
                uncond, cond = output.chunk(2)
                output = uncond + guidance_scale * (cond - uncond)
            outputs.append(output)
        return torch.cat(outputs)

    def vjp(
        self,
        latents: Tensor,
        timestep: int,
        prompt_embeds: Tensor,
        wrt: Collection[str],
        cotangent: Tensor,
        cotangent_scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The UNet's output and gradients of N images; see `Engine.vjp`.

        An engine without gradients leaves them to eager autograd on the torch weights that it was made from; that is
        logged once, with the reason.

        Args:
            latents: [N, C, h, w], `prompt_embeds`: [N, L, D].
            timestep: of all of them.
            wrt: "sample" (the latents), "encoder_hidden_states" (the embeddings) or both.
            cotangent: [N, C, h, w], `cotangent_scale`: [N], [1] or None.

        Returns:
            The output [N, C, h, w], and the gradients by name.

        Raises:
            InputError: a tensor is of another shape, or `wrt` names no such input.
            EngineError: the engine has no gradients, and its torch weights are out of reach.
        """
        count = len(latents)
        for name, tensor in (("prompt_embeds", prompt_embeds), ("cotangent", cotangent)):
            if len(tensor) != count:
                raise InputError(f"{name}: {len(tensor)} rows for latents of {count}; give one for each image")
        scale = torch.zeros(1) if cotangent_scale is None else cotangent_scale
        if scale.shape not in ((1,), (count,)):
            raise InputError(
                f"cotangent_scale: shape {list(scale.shape)}, not [{count}] or [1]; give one for each image"
            )
        engine = self._differentiable(wrt)
        outputs, grads = [], []
        for part in self._calls("unet", count, latents.shape[2:]):
            sample = latents[part]
            output, grad = engine.vjp(
                wrt,
                cotangent[part],
                scale.expand(count)[part],
                sample=sample,
                timestep=torch.full((len(sample),), timestep, dtype=torch.int64),
                encoder_hidden_states=prompt_embeds[part],
                **self._strength(engine),
            )
            self.evaluations["gradient"] += len(sample)
            outputs.append(output["noise_pred"])
            grads.append(grad)
        return torch.cat(outputs), {name: torch.cat([grad[name] for grad in grads]) for name in grads[0]}

    def _differentiable(self, wrt: Collection[str]) -> Engine:
        """The engine that takes gradients: the UNet's own, or else eager on the weights that it was made from."""
        engine = self._engines["unet"]
        fault = engine.lacks_gradient(wrt)
        if fault is None:
            return engine
        if self._eager_unet is None:
            if self.bundle is None:
                raise EngineError(fault)
            try:
                model = reopen_model(self.bundle)
            except SmoothRTError as error:
                raise EngineError(f"{fault} (nor can eager autograd take it: {error})") from error
            LOG.warning("gradients: taken by eager autograd, not by the engine (%s)", fault)
            self._eager_unet = _eager_engines(model)["unet"]
        return self._eager_unet

    def denoise(
        self,
        latents: Tensor,
        steps: Sequence[Step],
        predict: Predict,
        callback_on_step_end: StepCallback | None = None,
        trajectory: list[Tensor] | None = None,
    ) -> Tensor:
        """DDIM along `steps`, whichever way they lead.

        Args:
            latents: [N, C, h, w] at the noise level of the first step; those of the last step are returned.
            steps: `Schedule.steps`, a part of them, or `Schedule.inverse_steps`.
            predict: gives the model's output; see `Predict`.
            callback_on_step_end: see `StepCallback`.
            trajectory: takes the latents after each step.

        Raises:
            InputError, EngineError: as `walk`.
        """
        kind = cast("PredictionType", self.scheduler_config.get("prediction_type", "epsilon"))

        def move(latents: Tensor, i: int, step: Step) -> Tensor:
            return ddim_step(latents, predict(latents, i, step.timestep), step.alpha_from, step.alpha_to, kind)

        return self.walk(latents, steps, move, callback_on_step_end, trajectory)

    def walk(
        self,
        latents: Tensor,
        steps: Sequence[Step],
        move: Move,
        callback_on_step_end: StepCallback | None = None,
        trajectory: list[Tensor] | None = None,
    ) -> Tensor:
        """The loop through time.

        Args:
            latents: what the first step starts from; what the last one leaves is returned. A method that walks with two
                latents an image stacks them, [2N, C, h, w].
            steps: one after the other.
            move: takes one step; see `Move`.
            callback_on_step_end: see `StepCallback`.
            trajectory: takes the latents after each step.

        Raises:
            InputError: the callback is no function, or returned what is no dict of latents [N, C, h, w].
            EngineError: the latents stopped being finite; the step is named.
        """
        check(callback_on_step_end=callback_on_step_end)
        for i, step in enumerate(steps):
            latents = move(latents, i, step)
            if not bool(torch.isfinite(latents).all()):
                raise EngineError(
                    f"step {i + 1} of {len(steps)} (timestep {step.timestep}): the latents are not finite on "
                    f"{self.engine}; lower guidance_scale, or check the model's weights"
                )
            if callback_on_step_end is not None:
                latents = checks.answer(callback_on_step_end(self, i, step.timestep, {"latents": latents}), latents)
            if trajectory is not None:
                trajectory.append(latents)
        return latents

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; None is the pipeline's own `size`.

        Raises:
            InputError: a side is out of range, or no engine was built for images of this size.
        """
        height, width = checks.image_size(height, width, self.dims, self.size)
        factor = self.dims.vae_factor
        self._engines["unet"].most_rows(height=height // factor, width=width // factor)
        return height, width

    def _calls(
        self, network: NetworkName, count: int, sides: Sequence[int] | None = None, rows: int = 1
    ) -> Iterator[slice]:
        """Which of `count` images each call takes, where an image is so many rows of latents of these sides."""
        cells = self.dims.tokens if sides is None else sides[0] * sides[1]
        most = self._engines[network].most_rows(**dict(zip(("height", "width"), sides or (), strict=False)))
        size = max(1, min(CELLS_PER_CALL[network] // cells, ROWS_PER_CALL) // rows)
        if isinstance(self._batch_size, int):
            size = self._batch_size
        if most is not None:
            size = max(1, min(size, most // rows))
        return (slice(first, first + size) for first in range(0, count, size))

    def _run(self, network: NetworkName, **inputs: Tensor) -> Tensor:
        """The network's first output."""
        engine = self._engines[network]
        return engine.infer(**inputs, **self._strength(engine))[engine.network.outputs[0].name]

    def _strength(self, engine: Engine) -> dict[str, Tensor]:
        """The LoRA's strength, for a network that takes it."""
        return {LORA_STRENGTH: torch.tensor([self._lora_strength])} if _takes_strength(engine) else {}

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


def _eager_engines(model: Model) -> dict[NetworkName, EagerEngine]:
    """On the model's own modules; a LoRA that is not fused takes its strength as an input of the UNet."""
    networks = torch_networks(model.text_encoder, model.unet, model.vae)
    if model.lora is not None:
        networks["unet"] = RuntimeUnet(networks["unet"], lora_weights(model.unet, model.lora))
    apart = model.lora is not None
    return {name: EagerEngine(contract(name, model.dims, lora_strength=apart), networks[name]) for name in NETWORKS}


def _takes_strength(engine: Engine) -> bool:
    return any(spec.name == LORA_STRENGTH for spec in engine.network.inputs)


def _digests(model: Mapping[str, str], lora: tuple[str, float] | None) -> dict[str, str]:
    return {**model, **({"lora": lora[0], "lora_strength": f"{lora[1]:g}"} if lora is not None else {})}
