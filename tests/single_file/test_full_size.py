"""Checkpoints of Stable Diffusion 1.5's and 2.1's size, in the original layout, without configs, without the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt.architecture import CONFIGS
from smooth_rt.model import load_model

PARTS = ("text_encoder", "unet", "vae")
# What published checkpoints hold beside the networks.
BESIDE = {
    "model_ema.decay": torch.zeros(()),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    "alphas_cumprod": torch.zeros(1000),
    "betas": torch.zeros(1000),
}


def random_weights(name: str) -> dict[str, dict[str, Tensor]]:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def read(part: str) -> dict[str, object]:
        config: dict[str, object] = json.loads((CONFIGS / name / part / "config.json").read_text())
        return config

    with init_empty_weights():
        networks = (
            CLIPTextModel(CLIPTextConfig(**read("text_encoder"))),
            UNet2DConditionModel.from_config(read("unet")),
            AutoencoderKL.from_config(read("vae")),
        )
    random = torch.Generator().manual_seed(0)
    return {
        part: {
            key: (0.1 * (torch.rand(value.shape, generator=random) - 0.5)).half()
            for key, value in network.state_dict().items()
        }
        for part, network in zip(PARTS, networks, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metadata", "taken", "side"),
    [
        ("sd15", None, "epsilon", 64),
        ("sd21-base", {"modelspec.prediction_type": "epsilon"}, "epsilon", 64),
        # Random weights give no noise back, so they are taken for what predicts the velocity.
        ("sd21", None, "v_prediction", 96),
    ],
)
def test_every_tensor_is_the_files(
    renamed: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
    name: str,
    metadata: dict[str, str] | None,
    taken: str,
    side: int,
) -> None:
    weights = random_weights(name)
    configs = {part: json.loads((CONFIGS / name / part / "config.json").read_text()) for part in PARTS}
    path = tmp_path / "model.safetensors"
    tensors = renamed(configs, weights, name != "sd15")
    if name == "sd15":
        positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
        tensors |= BESIDE | positions
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    del tensors
    model = load_model(path)
    path.unlink()
    assert model.scheduler_config["prediction_type"] == taken
    assert (model.dims.sample_size, model.dims.tokens, model.dims.vocabulary) == (side, 77, 49408)
    for part, source in weights.items():
        found = getattr(model, part).state_dict()
        assert found.keys() == source.keys()
        assert all(torch.equal(found[key], value.float()) for key, value in source.items())
