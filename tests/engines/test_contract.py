"""What the contract refuses, and what it reads from inputs that it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.contract import BLOCKS, NETWORKS, Dims, NetworkName, contract
from engines.errors import InputError


def unet_inputs(dims: Dims, batch: int = 2, height: int = 4, width: int = 6) -> dict[str, Tensor]:
    return {
        "sample": torch.zeros(batch, dims.latent_channels, height, width),
        "timestep": torch.zeros(batch, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(batch, dims.tokens, dims.text_width),
    }


def test_sizes_are_read_from_the_inputs(dims: Dims) -> None:
    assert contract("unet", dims).bind(unet_inputs(dims)) == {"batch": 2, "height": 4, "width": 6}
    image = torch.zeros(1, dims.image_channels, 3 * dims.vae_factor, 5 * dims.vae_factor)
    assert contract("vae_encoder", dims).bind({"sample": image}) == {"batch": 1, "height": 3, "width": 5}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_output_axis_follows_from_the_inputs(dims: Dims, name: str) -> None:
    network = contract(name, dims)  # type: ignore[arg-type]
    sizes = dict.fromkeys(network.symbols, 2)
    for spec in network.outputs:
        assert all(size > 0 for size in spec.shape(sizes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample": None}, "'sample' is missing"),
        ({"latents": torch.zeros(1)}, "unknown input 'latents'"),
        ({"sample": torch.zeros(2, 3, 4, 6, dtype=torch.float64)}, "float64, not float32"),
        ({"timestep": torch.zeros(2)}, "float32, not int64"),
        ({"sample": torch.zeros(3, 4, 6)}, "give 4 axes"),
        ({"sample": torch.zeros(2, 4, 4, 6)}, "4 should be 3"),
        ({"sample": torch.zeros(2, 3, 5, 6)}, "5 is not a positive multiple of 2"),
        ({"sample": torch.zeros(2, 3, 0, 6)}, "0 is not a positive multiple"),
        ({"timestep": torch.zeros(3, dtype=torch.int64)}, "another input has batch=2"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 6)}, "7 should be 5"),
    ],
)
def test_inputs_that_contradict_the_contract(dims: Dims, change: dict[str, Tensor | None], said: str) -> None:
    inputs = {k: v for k, v in {**unet_inputs(dims), **change}.items() if v is not None}
    with pytest.raises(InputError, match=said) as caught:
        contract("unet", dims).bind(inputs)
    assert "unet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stray", [-1, 11])
def test_token_ids_outside_the_vocabulary(dims: Dims, stray: int) -> None:
    ids = torch.zeros(2, dims.tokens, dtype=torch.int32)
    ids[1, 3] = stray
    with pytest.raises(InputError, match=f"holds {stray}, outside 0..10"):
        contract("text_encoder", dims).bind({"input_ids": ids})


def test_networks_that_end_at_the_features(dims: Dims) -> None:
    known = replace(dims, latent_multiple=4, up_channels=(7, 6, 5))
    sizes = {"batch": 3, "height": 8, "width": 16}
    for (name, gradient), shape in zip(BLOCKS.values(), ((3, 7, 4, 8), (3, 6, 8, 16), (3, 5, 8, 16)), strict=False):
        (features,) = contract(name, known).outputs
        gradients = contract(gradient, known)
        assert features.shape(sizes) == shape
        assert [spec.name for spec in gradients.outputs] == [features.name, "grad_sample"]
        assert gradients.inputs[-2].shape(sizes) == shape
    early = contract("unet_up_blocks_0_vjp", known)
    assert early.inputs[-2].axis_names == ("batch", 7, "height/2", "width/2")
    inputs = {spec.name: torch.zeros(spec.shape(sizes), dtype=getattr(torch, spec.dtype)) for spec in early.inputs}
    assert early.bind(inputs) == sizes
    with pytest.raises(InputError, match=r"cotangent has shape \[3, 7, 8, 16\], not .*height/2.*another input has"):
        early.bind({**inputs, "cotangent": torch.zeros(3, 7, 8, 16)})
    names: tuple[NetworkName, ...] = ("unet_up_blocks_3", "unet_up_blocks_3_vjp")
    for name in names:
        with pytest.raises(InputError, match=f"{name}: the UNet has no up_blocks.3; its blocks are up_blocks.0, up_b"):
            contract(name, known)
        with pytest.raises(InputError, match=rf"{name}: the sizes of the UNet's features are not known; load the"):
            contract(name, dims)
