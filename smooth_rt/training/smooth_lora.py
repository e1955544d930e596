"""Train a Smooth-LoRA: the diffusion loss plus penalties on uneven variation, on LoRA weights alone.

The variation is that of one timestep (`svr`, the paper's Step-wise Variation Regularization) and, where `path_weight`
asks for it, that of whole sampled paths too (`paths`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smooth_rt.errors import InputError
from smooth_rt.lora import Lora, LoraFormat, LoraLayer, write_lora
from smooth_rt.model import Model
from smooth_rt.schedule import Schedule
from smooth_rt.training.captioned import Pictures
from smooth_rt.training.paths import draw_paths, draw_schedule, guided, measure, sample, unevenness, window
from smooth_rt.training.run import Run, keyed_generator
from smooth_rt.training.settings import check_steps
from smooth_rt.training.smooth_lora_config import SmoothLoraConfig
from smooth_rt.training.svr import Target, snr_bins, variation


def train_smooth_lora(
    model: Model,
    pictures: Pictures,
    output: Path,
    steps: int = 30000,
    resume: bool = False,
    config: SmoothLoraConfig | None = None,
    every: dict[int, Callable[[int], None]] | None = None,
    format: LoraFormat = "diffusers",
    save_every: int = 200,
    keep: int = 2,
) -> Path:
    """Train on `pictures` and write `output/smooth_lora.safetensors` in `format` (see `write_lora`); returns its path.

    The model's UNet receives a PEFT adapter named "smooth" and keeps it; its own weights do not change.

    A checkpoint is written every `save_every` steps, and the newest `keep` stay. It must agree with the settings but
    the rate, with the model's digests and with the pictures' identity.

    Raises:
        InputError: settings out of range, or a folder that holds a run already, of `resume`, another one.
        SmoothRTError, KeyboardInterrupt: the run ended early; see `Run.fit`.
    """
    config = config or SmoothLoraConfig()
    check_steps("steps", steps)
    unet, vae = model.unet, model.vae
    _check_layers(unet, config)
    torch.manual_seed(config.seed)
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.target_modules),
            init_lora_weights="gaussian",
        ),
        "smooth",
    )
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    alphas = scheduler.alphas_cumprod
    prediction_type = scheduler.config.prediction_type
    target = Target(config.svr_target, snr_bins(alphas), config.svr_share)
    encode = _TextCache(model)

    def batch(stream: str, step: int) -> dict[str, Tensor]:
        generator = keyed_generator(config.seed, stream, step)
        size = config.batch_size
        drawn = [pictures.draw(stream, step * size + i) for i in range(size)]
        images = torch.stack([torch.from_numpy(picture.image.copy()) for picture in drawn])
        with torch.no_grad():
            posterior = vae.encode(images.permute(0, 3, 1, 2).float().div(127.5).sub(1)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        latents = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
        dropped = torch.rand(size, generator=generator) < config.drop_prompt
        captions = ["" if drop else picture.caption for drop, picture in zip(dropped, drawn, strict=True)]
        return {
            "latents": latents,
            "context": encode(captions),
            "empty": encode([""] * size),
            "timesteps": torch.randint(0, len(alphas), (size,), generator=generator),
            "noise": torch.randn(latents.shape, generator=generator),
            "direction": torch.randn(latents.shape, generator=generator) / latents[0].numel() ** 0.5,
        }

    def network(latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        output: Tensor = unet(latents, timesteps, context).sample.float()
        return output

    def stepwise(drawn: dict[str, Tensor], regularise: bool) -> tuple[Tensor | None, Tensor]:
        """The variation [B] at one timestep a sample, where it is asked for, and the base loss from the same forward
        pass."""
        timesteps = drawn["timesteps"]
        alpha_bar = alphas[timesteps].view(-1, 1, 1, 1)
        goal = _goal(drawn["latents"], drawn["noise"], alpha_bar, prediction_type)
        if not regularise:
            noisy = alpha_bar.sqrt() * drawn["latents"] + (1 - alpha_bar).sqrt() * drawn["noise"]
            return None, (network(noisy, timesteps, drawn["context"]) - goal).square().mean()
        predict = guided(network, drawn["context"], drawn["empty"], config.reg_guidance)
        conditional: list[Tensor] = []

        def regularised(noisy: Tensor) -> Tensor:
            found = predict(noisy, timesteps)
            conditional.append(found.conditional)
            return found.output

        # Fused attention has no double backward; the math form has.
        with sdpa_kernel(SDPBackend.MATH):
            norms, _ = variation(
                regularised, drawn["latents"], drawn["noise"], drawn["direction"], alpha_bar, prediction_type
            )
        return norms, (conditional[0] - goal).square().mean()

    def of_paths(drawn: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The unevenness of paths under the batch's first captions."""
        noise = draw_paths(config.paths_per_step, config.path_points, drawn["noise"].shape[1:], generator)
        schedule = draw_schedule(alphas, config.path_steps, prediction_type, generator)
        before, within = window(schedule, config.path_window, generator)
        rows = torch.arange(len(noise)) // config.path_points % config.batch_size
        predict = guided(network, drawn["context"][rows], drawn["empty"][rows], config.path_guidance)

        def walk(latents: Tensor, schedule: Schedule) -> Tensor:
            # bf16 is 1.4 times as fast and moves the distances by less than 1 %; the math form of attention has the
            # faster backward at the sizes that are trained on a CPU.
            with torch.autocast(noise.device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                return sample(predict, latents, schedule)

        with torch.no_grad():
            start = walk(noise, before)
            unet.disable_adapters()
            try:
                without_lora = measure(walk(start, within), config.path_points)
            finally:
                unet.enable_adapters()
        found = measure(walk(start, within), config.path_points)
        share = config.path_share ** (config.path_window / config.path_steps)
        return unevenness(found, without_lora, share, config.path_end_weight)

    def step_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        drawn = batch("smooth-lora", step)
        norms, loss = stepwise(drawn, config.reg_weight > 0 and step % config.reg_every == 0)
        numbers = {"base": loss.item()}
        if norms is not None:
            if config.svr_target != "anchored":
                target.update(norms, drawn["timesteps"])
            penalty = target.penalty(norms, drawn["timesteps"])
            loss = loss + config.reg_weight * config.reg_every * penalty
            numbers |= {"reg": penalty.item(), "norm": norms.mean().item()}
        if config.path_weight:
            uneven = of_paths(drawn, keyed_generator(config.seed, "paths", step))
            loss = loss + config.path_weight * uneven
            numbers["path"] = uneven.item()
        return loss, numbers

    settings = {name: value for name, value in asdict(config).items() if name != "lr"}
    run = Run(
        output,
        {"unet": unet},
        steps,
        config.lr,
        {**settings, "model": model.digests, "data": pictures.identity},
        warmup=50,
        ema_decay=0.99,
        save_every=save_every,
        keep=keep,
        resume=resume,
        extra=target.state,
    )
    if config.svr_target == "anchored" and config.reg_weight and run.step == 0:
        # PEFT starts a LoRA at exactly zero effect, so this measures the model without it.
        for step in range(config.calibration_steps):
            drawn = batch("calibration", step)
            norms, _ = stepwise(drawn, regularise=True)
            assert norms is not None
            target.update(norms, drawn["timesteps"])
        target.fill()

    path = output / "smooth_lora.safetensors"

    def write(_: int) -> None:
        with run.averaged():
            write_lora(_lora_of(unet, config, str(path)), path, format)

    run.fit(step_fn, {save_every: write, **(every or {})})
    write(run.step)
    return path


def _check_layers(unet: torch.nn.Module, config: SmoothLoraConfig) -> None:
    """A rank above a layer's width buys nothing, and a slip of the keyboard fills the memory."""
    linear = {name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise InputError(f"target_modules={target!r}: no linear layer of the UNet ends so; name some, as to_q")
    sides = [min(m.in_features, m.out_features) for name, m in linear.items() if name.endswith(config.target_modules)]
    if config.rank > max(sides):
        raise InputError(f"rank={config.rank}: give at most {max(sides)}, the width of the model's widest layer")


def _goal(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    return latents


def _lora_of(unet: torch.nn.Module, config: SmoothLoraConfig, source: str) -> Lora:
    state = get_peft_model_state_dict(unet, adapter_name="smooth")
    layers = {
        key.removesuffix(".lora_A.weight"): LoraLayer(
            down=state[key].detach().clone(),
            up=state[key.replace("lora_A", "lora_B")].detach().clone(),
            alpha=config.alpha,
        )
        for key in state
        if key.endswith(".lora_A.weight")
    }
    return Lora(layers=layers, source=source, digest="")


class _TextCache:
    """Prompt to embedding [L, D], each prompt encoded once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[str, Tensor] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        for caption in dict.fromkeys(captions):
            if caption not in self.known:
                tokens = self.model.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
                with torch.no_grad():
                    self.known[caption] = self.model.text_encoder(tokens.input_ids).last_hidden_state[0]
        return torch.stack([self.known[caption] for caption in captions])
