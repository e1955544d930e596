"""What is measured: one model, with its LoRA fused, as torch modules and on every engine asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engines.base import Engine
from engines.bundle import Bundle
from engines.contract import NETWORKS, Dims, NetworkName, contract
from engines.eager import EagerEngine, Unet, VaeDecoder, torch_networks
from engines.recipes import RECIPES
from engines.select import BACKENDS, ON_GPU, Choice, availability, check_backend, choose, gpu
from smooth_rt.build import build_engines
from smooth_rt.errors import EngineError
from smooth_rt.lora import fuse, fused_with, read_lora
from smooth_rt.model import Model, load_model
from smooth_rt.pipeline import SmoothPipeline
from smooth_rt.schedule import Schedule

__all__ = ["Subject", "check_steps", "open_subject", "resolve_engines", "sd15"]


@dataclass(frozen=True)
class Subject:
    """Args:
    model: fp32 torch modules with the LoRA fused.
    modules: the torch form of each network: what parity compares with, what FLOPs are counted on, what eager runs.
    bundle: the graphs of the other backends; None where eager alone is measured.
    choices: the backends that run, in order, and why each.
    """

    model: Model
    modules: dict[NetworkName, nn.Module]
    bundle: Bundle | None
    choices: tuple[Choice, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that run."""
        return tuple(choice.backend for choice in self.choices)

    def engine(self, network: NetworkName, backend: str) -> Engine:
        """`network` on `backend`; the caller closes it."""
        if backend == "eager":
            return EagerEngine(contract(network, self.model.dims), self.modules[network])
        if self.bundle is None:
            raise EngineError(f"engine {backend!r}: nothing was built for it; name it with --engine")
        return self.bundle.engine(network, backend)

    def pipeline(self, choice: Choice) -> SmoothPipeline:
        """The pipeline on one backend; eager shares the modules of `model`. The caller closes it."""
        if choice.backend != "eager" and self.bundle is not None:
            return SmoothPipeline.from_engines(self.bundle, engine=choice.backend)
        engines = {name: self.engine(name, choice.backend) for name in NETWORKS}
        return SmoothPipeline(
            engines, self.model.config(), self.model.dims, source=self.model.source, choice=choice, batch_size="auto"
        )


def resolve_engines(asked: Sequence[str] | None) -> tuple[dict[str, Choice], list[str]]:
    """The backend behind each engine asked for, by the name asked, and warnings.

    Args:
        asked: backends or "auto"; None: every backend that can run here, but inductor, which compiles for minutes.

    Raises:
        EngineError: an engine is unknown, or named and cannot run here.
    """
    if asked is not None:
        return {name: choose(name, BACKENDS) for name in dict.fromkeys(asked)}, []
    choices: dict[str, Choice] = {}
    warnings = []
    for name in BACKENDS:
        if name == "inductor" or "fp32" not in RECIPES[name] or (name in ON_GPU and gpu() is None):
            continue
        reason = availability(name)
        if reason is None:
            choices[name] = Choice(name, "can run here")
        else:
            warnings.append(f"engine {name!r} is left out: {reason}")
    return choices, warnings


def check_steps(model: str, steps: int) -> None:
    """Whether the model's schedule has so many steps.

    Raises:
        InputError: it has not. ModelError: the model cannot be read.
    """
    Schedule.from_scheduler(load_model(model).config().scheduler(), steps)


def open_subject(
    model: Model,
    lora: str | None,
    lora_strength: float,
    choices: Sequence[Choice],
    progress: Callable[[str, int, int], None] | None = None,
) -> Subject:
    """Fuse the LoRA into the model, and build or reuse the graphs of all backends among `choices`.

    Raises:
        ModelError: the LoRA cannot be read or does not fit.
        ParityError: a graph built now differs from its torch module.
    """
    distinct = {choice.backend: choice for choice in choices}
    for backend in distinct:
        check_backend(backend)
    adapter = None if lora is None else read_lora(lora)
    built = [backend for backend in distinct if backend != "eager"]
    bundle = build_engines(model, adapter, lora_strength, built, None, progress) if built else None
    # Building fuses; a bundle that was there already leaves the model as it was loaded.
    if adapter is not None and fused_with(model.unet) is None:
        fuse(model.unet, adapter, lora_strength)
    modules = torch_networks(model.text_encoder, model.unet, model.vae)
    return Subject(model, modules, bundle, tuple(distinct.values()))


def sd15() -> tuple[dict[NetworkName, nn.Module], Dims]:
    """Stable Diffusion 1.5's UNet and VAE decoder at full size with random weights, and its sizes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from bench.training import SD15

    torch.manual_seed(0)
    dims = Dims(
        tokens=77, text_width=768, vocabulary=49408, latent_channels=4, image_channels=3, vae_factor=8,
        latent_multiple=8, sample_size=64, up_channels=(1280, 1280, 640, 320),
    )  # fmt: skip
    unet = UNet2DConditionModel(**SD15, sample_size=64).requires_grad_(False)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512, **blocks
    ).requires_grad_(False)
    return {"unet": Unet(unet).eval(), "vae_decoder": VaeDecoder(vae).eval()}, dims
