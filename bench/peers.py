"""The peers of the same run, on the same weights: diffusers' own StableDiffusionPipeline, eager, and OpenVINO GenAI."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smooth_rt.checkpoint import quiet
from smooth_rt.errors import EngineError, reason
from smooth_rt.model import Model
from smooth_rt.scheduler_config import read_scheduler

__all__ = ["diffusers_images", "diffusers_pipeline", "genai_images", "genai_pipeline", "worst_psnr"]


def diffusers_pipeline(model: Model) -> Any:
    """diffusers' pipeline with DDIM on `model`'s modules; a LoRA that is fused into them is fused here too, which is
    the faster of diffusers' two ways."""
    with quiet():  # what importing it says of torchvision concerns other models
        from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=read_scheduler(model.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_images(pipe: Any, prompt: str, latents: Tensor, steps: int, guidance_scale: float) -> np.ndarray:
    """Images [N, H, W, 3] in 0..1 of one prompt from N latents [N, C, h, w].

    Raises:
        EngineError: diffusers or torch failed, such as for want of memory.
    """
    factor = pipe.vae_scale_factor
    try:
        with torch.inference_mode():
            images = pipe(
                prompt=prompt,
                height=latents.shape[2] * factor,
                width=latents.shape[3] * factor,
                num_images_per_prompt=len(latents),
                latents=latents,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="np",
            ).images
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip().splitlines()
        raise EngineError(
            f"diffusers: failed at {len(latents)} images ({said[0] if said else error!r}); try a smaller --batch-sizes"
        ) from error
    return np.asarray(images)


def genai_pipeline(folder: Path) -> Any | None:
    """OpenVINO GenAI's pipeline on a variant's folder, in fp32; None where it is not installed, or was not when the
    folder was built: its tokenizer is a graph of its own then missing.

    Raises:
        EngineError: GenAI cannot open the folder.
    """
    if importlib.util.find_spec("openvino_genai") is None or not (folder / "tokenizer/openvino_tokenizer.xml").exists():
        return None
    import openvino_genai

    try:
        pipe = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
        # The folder names the model's own scheduler, and the other engines sample with DDIM.
        config, ddim = folder / "scheduler" / "scheduler_config.json", openvino_genai.Scheduler.Type.DDIM
        pipe.set_scheduler(openvino_genai.Scheduler.from_config(config, ddim))
        return pipe
    except RuntimeError as error:
        raise EngineError(f"openvino-genai: {folder}: cannot open it ({reason(error, -1)}); rebuild") from error


def genai_images(
    pipe: Any, vae_factor: int, prompt: str, latents: Tensor, steps: int, guidance_scale: float
) -> np.ndarray:
    """As `diffusers_images`, by OpenVINO GenAI; its images have 8 bits a channel.

    Raises:
        EngineError: GenAI failed.
    """
    import openvino
    import openvino_genai

    class Given(openvino_genai.Generator):  # type: ignore[misc]
        """Draws the given latents."""

        def randn_tensor(self, _: Any) -> openvino.Tensor:
            return openvino.Tensor(latents.numpy())

    generator = Given()  # which GenAI does not keep alive
    try:
        images = pipe.generate(
            prompt,
            height=latents.shape[2] * vae_factor,
            width=latents.shape[3] * vae_factor,
            num_images_per_prompt=len(latents),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
    except RuntimeError as error:
        raise EngineError(f"openvino-genai: failed at {len(latents)} images ({reason(error, -1)})") from error
    return np.array(images.data, dtype=np.float32) / 255


def worst_psnr(images: np.ndarray, reference: np.ndarray) -> float | None:
    """The lowest peak signal-to-noise ratio of an image pair, in dB; None where every pair is identical.

        PSNR = 10 * log10(1 / MSE)

    Args:
        images: [N, H, W, 3] in 0..1.
        reference: of the same shape.

    Raises:
        EngineError: a value is not finite, so that nothing can be said about the pair.
    """
    for array, name in ((images, "the engine's"), (reference, "diffusers'")):
        if not np.isfinite(array).all():
            raise EngineError(f"generate: {name} images are not finite; lower --guidance-scale or try another engine")
    squares = (images.astype(np.float64) - reference.astype(np.float64)) ** 2
    worst = float(squares.reshape(len(squares), -1).mean(axis=1).max())
    return None if worst == 0 else float(-10 * np.log10(worst))
