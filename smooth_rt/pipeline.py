"""SmoothPipeline: text and images in, images out, over the engines of one model. It reads like a diffusers pipeline.

To the networks and how work is split into calls of them (`smooth_rt.networks`) the pipeline adds what lies around them:
prompts, images, noise. The loop through time (`smooth_rt.loop`) and the tasks (`smooth_rt.tasks`), which hand it what
differs, are its methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Generator, Tensor

from engines.base import Engine
from engines.bundle import Bundle
from engines.command import mend_lacking
from engines.contract import NETWORKS, Dims, NetworkName, gradients_named
from engines.locks import ReadWriteLock
from engines.lora import LORA_FILE, LoraWeights
from engines.providers import joined
from engines.recipes import NATIVE, RECIPES, check_gradients, check_kernels, check_lora_mode, check_precision
from engines.select import BACKENDS, BOUNDED, Choice, choose
from engines.torch_modes import default_modes
from smooth_rt.calls import one_call
from smooth_rt.errors import BundleError, EngineError, InputError
from smooth_rt.images import ImageLike, Images, OutputType, read, to_images
from smooth_rt.loop import denoise, walk
from smooth_rt.lora import digest_weights, fused_with
from smooth_rt.model import Model, PipelineConfig, load_model, read_config
from smooth_rt.networks import Networks, eager_engines
from smooth_rt.opening import check_strength, open_model, reopen_model
from smooth_rt.ranges import check, shown
from smooth_rt.schedule import Schedule
from smooth_rt.scheduler_config import read_scheduler
from smooth_rt.tasks import checks
from smooth_rt.tasks.edit import edit
from smooth_rt.tasks.generate import generate
from smooth_rt.tasks.interpolate import interpolate
from smooth_rt.tasks.inversion import invert
from smooth_rt.textual_inversion import with_all_vectors

if TYPE_CHECKING:
    from engines.variant import Convolution, Kernels, LoraMode, Precision
    from smooth_rt.scheduler_config import PredictionType

__all__ = ["SmoothPipeline"]

LOG = logging.getLogger("smooth_rt")


class SmoothPipeline(Networks):
    """A text-to-image model on engines. Made by `from_pretrained` or `from_engines`; a context manager.

    Args:
        engines: one for each network; `close` closes them.
        config: tokenizer, scheduler configuration and the VAE's scaling factor.
        dims: the model's sizes.
        source: the model as its user named it.
        choice: the backend that runs, and why.
        size: height and width in pixels of a request that names none; None is the size that the model was trained at.
        batch_size: see `Networks`.

    Attributes: `engine` is the backend that really runs ("eager", "onnxruntime-cuda"), `reason` why that one,
    `precision` that of its engines; `source` and `size` are as given, the rest is that of `Networks`.
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
        super().__init__(engines, dims, batch_size)
        self.tokenizer: Any = config.tokenizer
        self._tokenizing = ReadWriteLock()
        self.scheduler_config = config.sampling_config
        config.scheduler()  # refuses what cannot be sampled, before a request does
        self.scaling_factor = config.scaling_factor
        self._decoder_channels = config.decoder_channels
        self.source = source
        self.engine, self.reason = (choice.backend, choice.reason) if choice else (engines["unet"].backend, "given")
        self.size = size or dims.image_size
        self.precision = "fp32"

    # Each task takes the pipeline first, so it is a method as it stands; and so does the loop through time.
    denoise = denoise
    walk = walk
    __call__ = generate
    interpolate = interpolate
    invert = invert
    edit = edit

    @classmethod
    @default_modes()
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
        gradients: str | Sequence[str] = (),
        kernels: str = "backend",
    ) -> Self:
        """Load a model, fuse a Smooth-LoRA, and open it on an engine, which is built into the cache when needed.

        Args:
            model: "default" (shipped), a diffusers folder, a hub id or a single-file .safetensors checkpoint; or what
                `load_model` returned, into whose UNet the LoRA is then fused.
            lora: None, "default" (shipped, for the default model), a file, a folder or a hub id.
            lora_strength: the factor that the LoRA is fused at; 1 is as trained.
            engine: one of `engines.BACKENDS`, or "auto": the first of openvino, onnxruntime, eager that can run, on a
                GPU tensorrt, tensorrt-rtx and onnxruntime-cuda before them; logged.
            batch_size: see `Networks`.
            precision: of the engines: "fp32", or what else the backend is built in ("fp16", "bf16", "int8").
            lora_mode: "fused"; or "runtime" or "refit", with which `set_lora_strength` changes the LoRA's strength: at
                once and for a few more computations in each step, or by opening the engine anew.
            progress: called as `progress(stage, done, total)` while engines are built.
            config: for a single-file checkpoint, as in `load_model`.
            provider: of ONNX Runtime: "cpu", "cuda", "tensorrt" or "tensorrt-rtx"; the engine is then
                "onnxruntime-cuda" and so on, which may be named as well.
            gradients: that the engines shall have: "text" for null-text inversion, "sample" for SPDInv, as in
                `ensure_engines`; several in a list or with commas between. Each takes its time to build, once. What is
                not named here eager autograd takes, with a warning.
            kernels: "backend"; or "native", as in `ensure_engines`, which "auto" then takes OpenVINO for.

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
        gradients, kernels = check(gradients=gradients, kernels=kernels)
        networks = {*NETWORKS, *gradients_named(gradients)} if engine == "auto" else set()
        exact = cast("Precision", precision)
        able = NATIVE if (engine, kernels) == ("auto", "native") else BACKENDS
        choice = choose(engine, [name for name in able if networks <= set(RECIPES[name].get(exact, ()))])
        check_precision(choice.backend, precision)
        check_kernels(choice.backend, kernels)
        check_gradients(choice.backend, precision, lora_mode, gradients_named(gradients))
        if lora_mode != "fused":
            check_lora_mode(choice.backend, precision, lora_mode)
        if choice.backend != "eager":
            from smooth_rt.build import build_engines

            model = model if isinstance(model, Model) else load_model(model, config=config)
            bundle = build_engines(
                model, lora, lora_strength, [choice.backend], None, progress, precision, lora_mode=lora_mode,
                gradients=gradients, kernels=kernels,
            )  # fmt: skip
            return cls._open(bundle, choice, batch_size, precision, lora_strength, lora_mode, kernels=kernels)
        if lora is None and lora_mode != "fused":
            raise InputError(f"lora_mode={lora_mode}: there is no LoRA whose strength could be set; name one")
        opened = open_model(model, lora, lora_strength if lora_mode == "fused" else None, config)
        return cls._eager(opened, choice, batch_size, lora_strength)

    @classmethod
    @default_modes()
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
        convolution: str | None = None,
        kernels: str | None = None,
    ) -> Self:
        """Open a bundle that `smooth-rt build-engine` wrote.

        Args:
            bundle: its folder, which is verified first, or an open `Bundle`.
            engine: "auto", a backend of the bundle, or "eager": the torch weights that the bundle was made from.
            batch_size: see `Networks`.
            config: for "eager", where the bundle was made from a single-file checkpoint; as in `load_model`.
            precision: of the engines; None is the most exact that the bundle has for the backend.
            lora_strength: of a bundle whose LoRA is set at run time; see `set_lora_strength`.
            lora_mode: "refit" or "runtime", of a bundle that has both; None is the one that was built first.
            provider: as in `from_pretrained`.
            convolution: "direct" or "winograd", of a bundle that has both; None is "direct".
            kernels: "backend" or "native", of a bundle that has both; None is "backend".

        Raises:
            InputError: an option is out of its range, or a strength is named for a bundle whose LoRA is fused.
            BundleError: the bundle is missing, damaged or stale, or its torch weights are gone or have changed.
            EngineError: the named engine is not in the bundle or cannot run here.
        """
        engine, batch_size, config = check(engine=engine, batch_size=batch_size, config=config)
        (lora_strength,) = check(lora_strength=lora_strength)
        precision, lora_mode, convolution = check(precision=precision, lora_mode=lora_mode, convolution=convolution)
        (kernels,) = check(kernels=kernels)
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(*check(bundle=bundle)))
        check_strength(opened, lora_strength, f"lora_strength={lora_strength}")
        asked = {"precision": precision, "lora_mode": lora_mode, "convolution": convolution, "kernels": kernels}
        lacking = partial(mend_lacking, opened.path, opened.manifest, **cast("dict[str, Any]", asked))
        choice = choose(joined(engine, provider), opened.backends, opened.unfit, lacking)
        if choice.backend != "eager":
            return cls._open(opened, choice, batch_size, precision, lora_strength, lora_mode, convolution, kernels)
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
        convolution: str | None = "direct",
        kernels: str | None = None,
    ) -> Self:
        config = read_config(bundle.config)
        built = bundle.find(
            choice.backend,
            cast("Precision | None", precision),
            cast("LoraMode | None", lora_mode),
            cast("Convolution | None", convolution),
            cast("Kernels | None", kernels),
        )
        if choice.backend in BOUNDED:
            from smooth_rt.cache import compiled

            bundle.caches = compiled()
        engines = {name: bundle.open_network(name, built) for name in NETWORKS}
        first = built.profiles[0]
        # A profile without an end is of no size in particular: the model's own is the default then.
        size = (first.height.opt, first.width.opt) if first.height.max else None
        named: dict[str, Any] = {"source": bundle.source.model, "choice": choice, "batch_size": batch_size}
        pipe = cls(engines, config, bundle.dims, size=size, **named)
        pipe.bundle = bundle
        pipe.precision = built.variant.precision
        lora = bundle.source.lora
        strength = lora_strength if lora is None or lora.strength is None else lora.strength
        pipe.digests = _digests(bundle.source.digests, (lora.digest, strength) if lora is not None else None)
        if built.variant.lora_mode == "refit":
            path = (bundle.path / built.engine("unet").file).with_name(LORA_FILE)
            pipe.lora = LoraWeights.load(path)
            if lora is None or digest_weights(pipe.lora) != lora.digest:
                mend = f"rebuild it with `{bundle.command(built)}`"
                raise BundleError(f"{path}: not the LoRA that the manifest names; {mend}")
        if built.variant.lora_mode != "fused":
            pipe.set_lora_strength(strength)
        return pipe

    @classmethod
    def _eager(cls, model: Model, choice: Choice, batch_size: int | str, lora_strength: float) -> Self:
        engines, apart = eager_engines(model), model.lora
        pipe = cls(engines, model.config(), model.dims, source=model.source, choice=choice, batch_size=batch_size)
        pipe.digests = _digests(
            model.digests, fused_with(model.unet) if apart is None else (apart.digest, lora_strength)
        )
        if apart is not None:
            pipe.set_lora_strength(lora_strength)
        return pipe

    @one_call
    def schedule(self, num_inference_steps: int) -> Schedule:
        """The model's DDIM schedule in so many steps."""
        return Schedule.from_config(self.scheduler_config, num_inference_steps)

    @property
    def prediction_type(self) -> PredictionType:
        """The UNet's output: "epsilon", "v_prediction" or "sample"."""
        return cast("PredictionType", read_scheduler(self.scheduler_config).config["prediction_type"])

    @one_call
    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Text embeddings [N, L, D] of N prompts. What does not fit into L tokens is cut off, with a logged warning."""
        prompts = checks.as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        with self._tokenizing.write():  # a tokenizer keeps the padding and the cut of its last call as its state
            texts = with_all_vectors(distinct, self.tokenizer)
            tokens = self.tokenizer(
                texts, padding="max_length", max_length=self.dims.tokens, truncation=True, return_tensors="pt"
            )
            whole = self.tokenizer(texts, verbose=False).input_ids
        for ids, prompt in zip(whole, distinct, strict=True):
            if len(ids) > self.dims.tokens:
                cut = shown(self.tokenizer.decode(ids[self.dims.tokens - 1 : -1]))
                LOG.warning("prompt %s: longer than %d tokens; left out: %s", shown(prompt), self.dims.tokens, cut)
        parts = self.calls("text_encoder", len(distinct))
        embeds = torch.cat([self._run("text_encoder", input_ids=tokens.input_ids[part].int()) for part in parts])
        return embeds[[distinct.index(prompt) for prompt in prompts]]

    @one_call
    def encode_image(
        self, images: ImageLike | Sequence[ImageLike], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Latents [N, C, H/f, W/f] of images scaled and centre-cropped to `height` x `width`: the posterior's mean."""
        height, width = self.image_size(height, width)
        pixels = read(images, height, width) * 2 - 1
        parts = self.calls("vae_encoder", len(pixels), (height // self.dims.vae_factor, width // self.dims.vae_factor))
        return torch.cat([self._run("vae_encoder", sample=pixels[part]) for part in parts]) * self.scaling_factor

    @one_call
    def decode(self, latents: Tensor, output_type: OutputType = "pil") -> Images:
        """Images of latents [N, C, h, w]; "latent" hands these back.

        Raises:
            InputError: there is no such `output_type`, or the latents are of another shape.
            EngineError: the engine failed, or the images are not finite.
        """
        (output_type,) = check(output_type=output_type)
        checks.rows(self.dims, latents=latents)
        if output_type == "latent":
            return latents
        scaled = latents / self.scaling_factor
        parts = self.calls("vae_decoder", len(scaled), scaled.shape[2:])
        pixels = torch.cat([self._run("vae_decoder", latent_sample=scaled[part]) for part in parts])
        if not bool(torch.isfinite(pixels).all()):
            raise EngineError(f"decode: the VAE's images are not finite on {self.runs_on}; its weights may be damaged")
        return to_images((pixels / 2 + 0.5).clamp(0, 1), output_type)

    @one_call
    def draw_noise(
        self, count: int, height: int | None, width: int | None, generator: Generator | Sequence[Generator] | None
    ) -> Tensor:
        """N(0, I) of `count` images [count, C, H/f, W/f], each drawn alone, on the CPU."""
        height, width = self.image_size(height, width)
        shape = (1, self.dims.latent_channels, height // self.dims.vae_factor, width // self.dims.vae_factor)
        return torch.cat(
            [torch.randn(shape, generator=g, dtype=torch.float32) for g in checks.per_image(generator, count)]
        )

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; None is the pipeline's own `size`.

        Raises:
            InputError: a side is out of range, no engine was built for images of this size, or memory lacks for one.
        """
        height, width = checks.image_size(height, width, self.dims, self.size)
        factor = self.dims.vae_factor
        self._engines["unet"].most_rows(height=height // factor, width=width // factor)
        if self._engines["vae_decoder"].backend in ("eager", "onnxruntime", "openvino"):  # in the machine's own memory
            checks.memory(height, width, self._decoder_channels)
        return height, width


def _digests(model: Mapping[str, str], lora: tuple[str, float] | None) -> dict[str, str]:
    return {**model, **({"lora": lora[0], "lora_strength": repr(lora[1])} if lora is not None else {})}
