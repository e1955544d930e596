"""Checkpoints of Stable Diffusion 1.5's and 2.1's size, in the original layout, without configs, without the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smooth_rt.model import load_model

# What published checkpoints hold beside the networks.
BESIDE = {
    "model_ema.decay": torch.zeros(()),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    "alphas_cumprod": torch.zeros(1000),
    "betas": torch.zeros(1000),
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
    without_weights: Callable[[str], Any],
    tmp_path: Path,
    name: str,
    metadata: dict[str, str] | None,
    taken: str,
    side: int,
) -> None:
    configs, empty = without_weights(name)
    random = torch.Generator().manual_seed(0)
    weights = {
        part: {key: (0.1 * (torch.rand(one.shape, generator=random) - 0.5)).half() for key, one in tensors.items()}
        for part, tensors in empty.items()
    }
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
