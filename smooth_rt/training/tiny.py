"""The recipe of the default model: text to emoji, in diffusers layout, trained from nothing on two CPU cores or a GPU.

Stages, each resumable and each skipped when its result is there:

1. `tokenizer`: byte-level BPE in CLIP's format over all captions;
2. `vae`: AutoencoderKL, f = 4, on composited pictures (L1, L1 of the image gradients, a little KL);
3. `latents`: posterior mean and deviation of many pictures, encoded once;
4. `unet`: UNet2DConditionModel and CLIPTextModel together, epsilon-prediction with min-SNR-5 weights
   (Hang et al. 2023, arXiv 2303.09556), 10 % empty prompts for classifier-free guidance;
5. `attributes`, `reference`: what judges pictures in evaluation: a classifier of objects and colours, and statistics of
   real pictures;
6. `assets`: the averaged weights as fp16 safetensors in one folder that `StableDiffusionPipeline` loads, with what
   judges them, example images and evaluation prompts.

Every random draw is made on the CPU and keyed by seed and step, so a run sees the same data on any device; its sums are
rounded differently there, so the weights agree in kind and not in bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from engines.paths import absolute
from engines.torch_modes import default_modes
from smooth_rt.errors import InputError, SmoothRTError, reason
from smooth_rt.training.assets import need, write_assets
from smooth_rt.training.attributes import train_attributes, write_reference
from smooth_rt.training.data import EmojiScenes, as_tensor, fetch
from smooth_rt.training.draws import keyed_generator
from smooth_rt.training.run import Part, Run
from smooth_rt.training.settings import check_steps
from smooth_rt.training.showcase import held_out, write_scenes
from smooth_rt.training.tiny_networks import TinyConfig, new_text_encoder, new_unet, new_vae, pipeline, scheduler
from smooth_rt.training.tokenizer import train_tokenizer
from smooth_rt.training.world import World, training_device

STAGES = ("tokenizer", "vae", "latents", "unet", "attributes", "reference", "scenes", "assets")
GRID_PROMPTS = (
    "red apple on blue background", "dog face on yellow background", "rocket on purple background",
    "slice of pizza on green background", "octopus on white background", "sunflower on pink background",
    "castle on grey background", "penguin on red background", "red heart", "guitar on yellow background",
    "taxi on blue background", "cactus on white background", "panda face on green background",
    "cup of coffee on pink background", "airplane on red background", "mushroom on purple background",
)  # fmt: skip


@default_modes()
@torch.enable_grad()
def train_tiny(
    output: Path,
    data: Path,
    stages: tuple[str, ...] = STAGES,
    vae_steps: int = 3000,
    unet_steps: int = 20000,
    resume: bool = False,
    config: TinyConfig | None = None,
    device: str = "auto",
    attribute_steps: int = 3000,
) -> Path:
    """Train the default model under `output`; pictures are fetched into `data`.

    Args:
        device: "cpu", "cuda", "cuda:1", …; "auto" takes a GPU where there is one.

    Returns:
        The folder of the assets if that stage is among `stages`, else `output`.

    Raises:
        InputError: no stage or an unknown one, a stage whose predecessor is missing, steps out of range, a folder in
            use without `resume`, or a device that is not there.
        SmoothRTError, KeyboardInterrupt: a run ended early, see `Run.fit`; or something cannot be written.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        what = f"{unknown[0]!r} is unknown" if unknown else "none is named"
        raise InputError(f"stages: {what}; choose from {', '.join(STAGES)}")
    check_steps("vae_steps", vae_steps)
    check_steps("unet_steps", unet_steps)
    check_steps("attribute_steps", attribute_steps)
    config = config or TinyConfig()
    place = training_device(device)
    output, data = absolute(output), absolute(data)
    try:
        _train(output, data, stages, (vae_steps, unet_steps, attribute_steps), resume, config, place)
    except (OSError, SafetensorError) as error:
        where = getattr(error, "filename", None) or output
        raise SmoothRTError(f"{where}: {reason(error)}; mend that, and run it again with --resume") from error
    return output / "assets" if "assets" in stages else output


def _train(
    output: Path,
    data: Path,
    stages: tuple[str, ...],
    steps: tuple[int, int, int],
    resume: bool,
    config: TinyConfig,
    place: torch.device,
) -> None:
    fetch(data)
    scenes = EmojiScenes(data, config.size, config.seed)
    model = output / "model"
    for stage in STAGES:
        if stage not in stages:
            continue
        if stage == "tokenizer":
            train_tokenizer(scenes.all_captions(), config.tokens, model / "tokenizer")
        elif stage == "vae":
            _train_vae(output, model, scenes, config, steps[0], resume, place)
        elif stage == "latents":
            _cache_latents(output, model, scenes, config, place)
        elif stage == "unet":
            _train_unet(output, model, scenes, config, steps[1], resume, place)
        elif stage in ("attributes", "reference"):
            vae = AutoencoderKL.from_pretrained(need(model / "vae", "vae")).float().to(place)
            if stage == "attributes":
                train_attributes(output, vae, scenes, config.seed, steps[2], resume, place)
            else:
                write_reference(output, vae, scenes)
        elif stage == "scenes":
            write_scenes(scenes, output / "scenes", held_out(scenes), "held out")
        else:
            write_assets(output, model, scenes)


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The kernels that train fastest: on the CPU the fused attention's backward is slow at these sizes, and the math
    form trains 1.2 times as fast."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    return context


def _pictures(scenes: EmojiScenes, stream: str, first: int, count: int) -> Tensor:
    """[count, 3, H, W] in -1..1, channels last."""
    return as_tensor([scenes.draw(stream, first + i).image for i in range(count)])


def _grid(images: np.ndarray, columns: int, path: Path) -> None:
    """Write images [N, H, W, 3] in 0..1 as one PNG."""
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


def _image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def _train_vae(
    out: Path, model: Path, scenes: EmojiScenes, config: TinyConfig, steps: int, resume: bool, device: torch.device
) -> None:
    torch.manual_seed(config.seed)
    vae = new_vae(config).to(device)
    run = Run(
        out / "vae", {"vae": vae}, steps, config.vae_lr, config.identity,
        weight_decay=0.0, resume=resume, rate_option="--vae-lr", world=World(device),
    )  # fmt: skip

    def step_fn(step: int) -> Iterator[Part]:
        images = _pictures(scenes, "vae", step * config.vae_batch, config.vae_batch)
        images = images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(
                posterior.mean.shape, generator=keyed_generator(config.seed, "vae-noise", step), dtype=torch.float32
            )
            decoded = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        l1 = (decoded - images).abs().mean()
        edges = sum(
            (a - b).abs().mean() for a, b in zip(_image_gradients(decoded), _image_gradients(images), strict=True)
        )
        psnr = 10 * torch.log10(4 / F.mse_loss(decoded.detach(), images))
        yield l1 + 0.5 * edges + config.kl * kl, {"l1": l1.item(), "kl": kl.item(), "psnr": psnr.item()}

    def look(step: int) -> None:
        images = _pictures(scenes, "vae-look", 0, 16)
        with run.averaged(), torch.no_grad():
            decoded = vae(images.to(device)).sample.cpu()
        both = torch.cat([images[:8], decoded[:8], images[8:], decoded[8:]]).clamp(-1, 1)
        _grid(both.permute(0, 2, 3, 1).numpy() / 2 + 0.5, 8, out / "vae" / "grids" / f"{step:06d}.png")

    run.fit(step_fn, [(1000, look)])
    with run.averaged():
        with torch.no_grad():
            latents = vae.encode(_pictures(scenes, "vae-scale", 0, 256).to(device)).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        vae.save_pretrained(model / "vae")


def _cache_latents(out: Path, model: Path, scenes: EmojiScenes, config: TinyConfig, device: torch.device) -> None:
    if (out / "latents.safetensors").exists():
        return
    vae = AutoencoderKL.from_pretrained(need(model / "vae", "vae")).to(device, memory_format=torch.channels_last)
    captions = {caption: i for i, caption in enumerate(scenes.all_captions())}
    means, deviations, ids = [], [], []
    for first in range(0, config.pictures, 64):
        samples = [scenes.draw("unet", first + i) for i in range(min(64, config.pictures - first))]
        images = as_tensor([sample.image for sample in samples])
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(images.to(device, memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
        ids += [captions[s.caption] for s in samples]
    tensors = {"mean": torch.cat(means), "std": torch.cat(deviations), "caption": torch.tensor(ids)}
    partial = out / "latents.partial"
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    partial.replace(out / "latents.safetensors")


def _train_unet(
    out: Path, model: Path, scenes: EmojiScenes, config: TinyConfig, steps: int, resume: bool, device: torch.device
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(need(model / "tokenizer", "tokenizer"))
    cache = load_file(need(out / "latents.safetensors", "latents"))
    vae = AutoencoderKL.from_pretrained(model / "vae").to(device)
    torch.manual_seed(config.seed)
    unet, text_encoder = new_unet(config).to(device), new_text_encoder(config, tokenizer).to(device)
    modules = {"unet": unet, "text_encoder": text_encoder}
    run = Run(
        out / "unet", modules, steps, config.unet_lr, config.identity,
        ema_decay=0.9995, save_every=1000, resume=resume, rate_option="--unet-lr", world=World(device),
    )  # fmt: skip

    ddim = scheduler()
    empty = len(scenes.all_captions())
    tokens = tokenizer([*scenes.all_captions(), ""], padding="max_length", truncation=True, return_tensors="pt")
    snr = ddim.alphas_cumprod / (1 - ddim.alphas_cumprod)
    weights = snr.clamp(max=5) / snr

    def step_fn(step: int) -> Iterator[Part]:
        generator = keyed_generator(config.seed, "unet", step)
        batch = config.unet_batch
        picked = torch.randint(0, len(cache["caption"]), (batch,), generator=generator)
        mean, std = cache["mean"][picked].float(), cache["std"][picked].float()
        latents = (
            mean + std * torch.randn(mean.shape, generator=generator, dtype=torch.float32)
        ) * vae.config.scaling_factor
        caption = cache["caption"][picked]
        caption = torch.where(torch.rand(batch, generator=generator, dtype=torch.float32) < 0.1, empty, caption)
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
        noisy = ddim.add_noise(latents, noise, timesteps).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16), _attention(device):
            context = text_encoder(tokens.input_ids[caption].to(device)).last_hidden_state
            predicted = unet(noisy, timesteps.to(device), context).sample.float()
        error = (predicted - noise.to(device)).square().mean(dim=(1, 2, 3))
        yield (weights[timesteps].to(device) * error).mean(), {"mse": error.mean().item()}

    def look(step: int) -> None:
        with run.averaged():
            pipe = pipeline(vae, unet, text_encoder, tokenizer)
            generators = [torch.Generator().manual_seed(i) for i in range(len(GRID_PROMPTS))]
            images = pipe(
                list(GRID_PROMPTS), num_inference_steps=25, guidance_scale=5.0, generator=generators, output_type="np"
            ).images
        _grid(images, 8, out / "unet" / "grids" / f"{step:06d}.png")

    run.fit(step_fn, [(1000, look)])
    with run.averaged():
        unet.save_pretrained(model / "unet")
        text_encoder.save_pretrained(model / "text_encoder")
