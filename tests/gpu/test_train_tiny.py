"""The default model's recipe on a GPU: the same draws as on the CPU, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smooth_rt.training.tiny import train_tiny
from smooth_rt.training.tiny_networks import TinyConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use (CUDA)"),
]

CONFIG = TinyConfig(
    size=16, tokens=12, width=32, vae_channels=(16, 32), unet_channels=(16, 32, 32), vae_batch=2, unet_batch=2,
    pictures=8,
)  # fmt: skip


def test_resumes_and_agrees_with_the_cpu(tmp_path: Path, emoji: Path) -> None:
    train_tiny(tmp_path / "gpu", emoji, vae_steps=2, unet_steps=2, attribute_steps=2, config=CONFIG, device="cuda")
    train_tiny(
        tmp_path / "gpu", emoji, vae_steps=3, unet_steps=4, attribute_steps=2, resume=True, config=CONFIG, device="cuda"
    )
    train_tiny(tmp_path / "cpu", emoji, vae_steps=3, unet_steps=4, attribute_steps=2, config=CONFIG, device="cpu")
    for name in ("vae", "unet"):
        weights = Path("assets") / "model" / name / "diffusion_pytorch_model.safetensors"
        gpu, cpu = load_file(tmp_path / "gpu" / weights), load_file(tmp_path / "cpu" / weights)
        for key, value in cpu.items():
            # A few warm-up steps of bf16 from the same weights: what differs is rounding, far below a weight's size.
            assert (gpu[key].float() - value.float()).norm() <= 0.05 * value.float().norm() + 1e-3, f"{name}.{key}"
