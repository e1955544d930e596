"""The gradients of Stable Diffusion 1.5 at its full size, with random weights: the graph in ONNX Runtime and OpenVINO
beside eager autograd, each in a process of its own.

`python -m pytest -m slow tests/export/test_full_size_gradients.py -k sd15 -s` prints seconds and the peak memory. It
wants about 19 GiB of memory and 12 GiB of disk. `-k shrunken` runs the same code on the architecture made small.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.subject import sd15
from engines.base import Engine
from engines.contract import Dims, NetworkName, contract
from engines.eager import EagerEngine, Unet, gradient_networks
from engines.ort import OrtEngine
from engines.ov import OvEngine
from export.graphs import Case, random_inputs
from export.to_onnx import to_onnx
from export.to_openvino import to_openvino
from export.verify import TOLERANCES

SIZES = ((1, 32), (2, 32), (1, 64))  # images, and latent cells a side: 256 and 512 pixels


def unet_of(size: str) -> tuple[nn.Module, Dims]:
    if size == "sd15":
        networks, dims = sd15()
        return networks["unet"], dims
    from diffusers import UNet2DConditionModel

    from bench.training import SD15

    torch.manual_seed(0)
    narrow = {**SD15, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "cross_attention_dim": 32}
    unet = UNet2DConditionModel(**narrow, sample_size=64).requires_grad_(False)
    dims = Dims(
        tokens=7, text_width=32, vocabulary=50, latent_channels=4, image_channels=3, vae_factor=8, latent_multiple=8,
        sample_size=64, up_channels=(64, 64, 32, 32),
    )  # fmt: skip
    return Unet(unet).eval(), dims


def opened(backend: str, size: str, name: NetworkName, folder: Path, images: int, side: int) -> tuple[Engine, Dims]:
    unet, dims = unet_of(size) if backend == "eager" or size == "shrunken" else (nn.Identity(), sd15_dims())
    network = contract(name, dims)
    if backend == "eager":
        return EagerEngine(network, gradient_networks(unet, [name])[name]), dims
    if backend == "openvino":
        # Of free sizes it would want 2 to 6 GiB more, and at 512 pixels more than there is.
        one_size = {symbol: (n, n, n) for symbol, n in {"batch": images, "height": side, "width": side}.items()}
        return OvEngine(network, folder / "model.xml", [one_size]), dims
    return OrtEngine(network, folder / "model.onnx"), dims


def sd15_dims() -> Dims:
    return Dims(
        tokens=77, text_width=768, vocabulary=49408, latent_channels=4, image_channels=3, vae_factor=8,
        latent_multiple=8, sample_size=64, up_channels=(1280, 1280, 640, 320),
    )  # fmt: skip


def memory(kind: str) -> float:
    """GiB of this process: VmRSS now, or VmHWM at its largest since `clear_refs`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**20


def measure(backend: str, size: str, name: NetworkName, folder: Path) -> None:
    """Run every size once; leaves the results and prints a row each as JSON."""
    for images, side in SIZES:
        engine, dims = opened(backend, size, name, folder, images, side)
        held = memory("VmRSS")
        case = Case({"batch": images, "height": side, "width": side}, 1.0)
        inputs = random_inputs(engine.network, dims, case, torch.Generator().manual_seed(images * side))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # begins VmHWM anew
        started = time.perf_counter()
        with engine:
            outputs = engine.infer(**inputs)
        row = {"seconds": time.perf_counter() - started, "held_gib": held, "peak_gib": memory("VmHWM")}
        save_file(outputs, folder / f"{backend}-{images}-{side}.safetensors")
        print(json.dumps({"engine": backend, "images": images, "pixels": 8 * side, **row}), flush=True)
        del engine


def results(backend: str, size: str, name: NetworkName, folder: Path) -> dict[tuple[int, int], dict[str, Tensor]]:
    command = [sys.executable, __file__, backend, size, name, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    return {(n, side): load_file(folder / f"{backend}-{n}-{side}.safetensors") for n, side in SIZES}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", ["unet_vjp", "unet_up_blocks_2_vjp"])
@pytest.mark.parametrize("size", ["shrunken", "sd15"])
def test_gradients_at_full_size(size: str, name: NetworkName, tmp_path: Path) -> None:
    unet: Any
    unet, dims = unet_of(size)
    network = contract(name, dims)
    started = time.perf_counter()
    to_onnx(gradient_networks(unet, [name])[name], network, dims, tmp_path / "model.onnx")
    print(json.dumps({"export_seconds": time.perf_counter() - started, "peak_gib": memory("VmHWM")}))
    del unet
    to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", compress=False)
    wanted = results("eager", size, name, tmp_path)
    for backend in ("onnxruntime", "openvino"):
        for sizes, outputs in results(backend, size, name, tmp_path).items():
            for output, got in outputs.items():
                exact = wanted[sizes][output]
                error = float((got - exact).norm() / exact.norm())
                print(json.dumps({"engine": backend, "sizes": sizes, "output": output, "error": error}))
                assert error < TOLERANCES["fp32"]


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))  # type: ignore[arg-type]
