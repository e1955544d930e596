"""Stable Diffusion 1.5 at its full size, with random weights: exported, converted, verified and run.

`python -m pytest -m slow tests/export/test_full_size.py -k sd15 -s` prints seconds and the peak memory. It wants
about 20 GiB of memory and 10 GiB of disk. `-k shrunken` runs the same code on the same architecture made small;
`-k runs` is for the CPU's backends, `-k rtx` for TensorRT for RTX, which is built without a GPU.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.bundle import Bundle
from engines.contract import NETWORKS, Dims, NetworkName, contract
from engines.eager import torch_networks
from engines.manifest import Source
from engines.select import PORTABLE, architecture
from engines.variant import Order, Profile, Span, Variant, every_size
from export.build import build_bundle
from export.graphs import Case, random_inputs
from export.verify import verify

MEMORY_LIMIT = 24 * 2**30
BACKENDS = ("onnxruntime", "openvino")
SOURCE = Source(model="random", digests={"unet": "random", "vae": "random", "text_encoder": "random"})

# The public configuration of stable-diffusion-v1-5, as far as it is not diffusers' own default.
SD15: dict[str, Any] = {
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    },
    "vae": {
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
}
SHRUNKEN: dict[str, Any] = {
    "unet": {
        **SD15["unet"],
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    },
    "vae": {**SD15["vae"], "sample_size": 128, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    "text_encoder": {
        **SD15["text_encoder"],
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


def new_networks(config: dict[str, Any]) -> dict[NetworkName, nn.Module]:
    """The architecture with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text_encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
    modules = (text_encoder, UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"]))
    for module in modules:
        module.requires_grad_(False)
    return torch_networks(*modules)


def dims_of(config: dict[str, Any]) -> Dims:
    return Dims(
        tokens=config["text_encoder"]["max_position_embeddings"],
        text_width=config["text_encoder"]["hidden_size"],
        vocabulary=config["text_encoder"]["vocab_size"],
        latent_channels=config["vae"]["latent_channels"],
        image_channels=config["vae"]["in_channels"],
        vae_factor=2 ** (len(config["vae"]["block_out_channels"]) - 1),
        latent_multiple=2 ** (len(config["unet"]["block_out_channels"]) - 1),
        sample_size=config["unet"]["sample_size"],
        up_channels=tuple(reversed(config["unet"]["block_out_channels"])),
    )


def order(backend: str, architecture: str, profile: Profile) -> Order:
    variant = Variant(backend=backend, precision="fp32", lora_mode="fused", architecture=architecture)
    return Order(variant=variant, profiles=(profile,))


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints at once, with the seconds since the start and the peak memory so far."""
    began = time.perf_counter()

    def print_line(line: str) -> None:
        with capsys.disabled():
            print(f"{time.perf_counter() - began:7.1f} s {peak_memory() / 2**30:6.2f} GiB  {line}", flush=True)

    return print_line


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(SD15, id="sd15"), pytest.param(SHRUNKEN, id="shrunken")])
def test_exports_verifies_and_runs(config: dict[str, Any], tmp_path: Path, say: Callable[[str], None]) -> None:
    dims = dims_of(config)
    side, unit = dims.sample_size, dims.latent_multiple
    say(f"before; images of {side * dims.vae_factor} pixels")
    networks = new_networks(config)
    parameters = sum(p.numel() for p in networks["unet"].parameters())
    if config is SD15:
        assert parameters == 859_520_964  # the published size
    say(f"model made, UNet of {parameters / 1e6:.1f} M parameters")

    def write_config(folder: Path) -> None:
        (folder / "model.json").write_text(json.dumps({"scaling_factor": config["vae"]["scaling_factor"]}))

    target = tmp_path / "bundle"
    orders = [order(backend, architecture(), every_size(dims)) for backend in BACKENDS]
    try:
        build_bundle(networks, dims, SOURCE, orders, target, write_config, progress=lambda what, *_: say(what))
        bundle = Bundle.open(target)
        say(f"opened, {sum(file.size for file in bundle.manifest.files) / 2**30:.2f} GiB on disk")
        for built in bundle.variants:
            for record in built.engines:
                for parity in record.parity:
                    say(f"{record.network} {built.backend} {parity.output}: {parity.relative:.1e} at {parity.worst}")

        sizes = (
            Case({"batch": 2, "height": side, "width": side}, 1 / config["vae"]["scaling_factor"]),
            Case({"batch": 1, "height": side + 2 * unit, "width": side - unit}, 1 / config["vae"]["scaling_factor"]),
        )
        for name in NETWORKS:
            network = contract(name, dims)
            with bundle.engine(name, "openvino") as engine:
                for parity in verify(engine, networks[name], network, dims, "fp32", seed=1, tried=sizes):
                    say(f"{name} again, {parity.output}: {parity.relative:.1e} at {parity.worst}")
                inputs = random_inputs(network, dims, sizes[0], torch.Generator().manual_seed(2))
                began = time.perf_counter()
                outputs = engine.infer(**inputs)
                say(f"{name} run at batch 2 in {time.perf_counter() - began:.2f} s")
                assert all(output.isfinite().all() for output in outputs.values())
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert peak_memory() < MEMORY_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(SD15, id="sd15"), pytest.param(SHRUNKEN, id="shrunken")])
def test_rtx_builds_it_without_a_gpu(config: dict[str, Any], tmp_path: Path, say: Callable[[str], None]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds the engines; pip install 'smooth-rt[tensorrt-rtx]'")
    dims = dims_of(config)
    side = dims.sample_size * dims.vae_factor
    sides = Span(min=side, opt=side, max=side + side // 2)
    profile = Profile(batch=Span(min=1, opt=1, max=4), height=sides, width=sides)
    say(f"before; {profile}")
    target = tmp_path / "bundle"
    said = ""

    def progress(what: str, *_: int) -> None:
        nonlocal said
        step = " ".join(word for word in what.split() if "/" not in word)
        if step != said:
            said = step
            say(step)

    try:
        orders = [order("tensorrt-rtx", PORTABLE, profile)]
        build_bundle(new_networks(config), dims, SOURCE, orders, target, lambda _: None, progress=progress)
        (built,) = Bundle.open(target).variants
        say(f"{built.variant.name}: {built.seconds:.0f} s, peak {built.peak_memory_bytes / 2**30:.2f} GiB")
        sizes = {file.path: file.size for file in Bundle.open(target).manifest.files}
        for record in built.engines:
            layers, size = record.notes["layers"], sizes[record.file]
            say(f"{record.network}: {layers} layers, {size / 1e9:.2f} GB, {record.bounds[0]}")
            assert record.notes["capabilities"] == [PORTABLE]
            assert int(str(layers)) > 50
        unet = built.engine("unet")
        latent = dims.sample_size
        assert unet.bounds[0]["batch"] == (1, 2, 8)  # both halves of guidance
        assert unet.bounds[0]["height"] == (latent, latent, latent + latent // 2)
        assert not built.proved  # it did not run here
        if config is SD15:
            assert sizes[unet.file] > 3.4e9  # the weights in fp32
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert peak_memory() < MEMORY_LIMIT
