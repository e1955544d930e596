"""Fixtures: a model small enough to export in seconds, whose sizes differ from every usual default; its pictures; the
graphs that were exported in this run."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import nn

    from engines.contract import Dims, Network

    Exporter = Callable[[nn.Module, Network, Dims, Path], None]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "SMOOTH_RT_CACHE" not in os.environ:
    # The user's own cache is none of the tests' business. All processes of a run share this one, and its kernels.
    os.environ["SMOOTH_RT_CACHE"] = tempfile.mkdtemp(prefix="smooth-rt-tests-")
    atexit.register(shutil.rmtree, os.environ["SMOOTH_RT_CACHE"], ignore_errors=True)
# Networks this small run faster on one thread, and on busy cores many times faster: idle threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights: f = 2, latents of 8x8, 12 tokens of width 32."""
    import torch
    from diffusers import StableDiffusionPipeline

    from smooth_rt.training.tiny_networks import TinyConfig, new_text_encoder, new_unet, new_vae, scheduler
    from smooth_rt.training.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    config = TinyConfig(size=16, tokens=12, width=32, vae_channels=(16, 32), unet_channels=(16, 32, 32))
    torch.manual_seed(0)
    captions = [f"{thing} on {colour} background" for thing in ("red apple", "dog") for colour in ("blue", "white")]
    tokenizer = train_tokenizer(captions, config.tokens, folder / "tokenizer")
    vae, unet = new_vae(config), new_unet(config)
    # A fresh UNet's last layer makes a prediction that hardly depends on its inputs; spread it.
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=new_text_encoder(config, tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def small_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a UNet of half the blocks: a gradient graph takes its time to trace."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("small") / "model")
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def attentive_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another VAE, which attends in its middle as the published ones do."""
    import torch
    from diffusers import AutoencoderKL

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("attentive") / "model")
    config = {**AutoencoderKL.load_config(folder / "vae"), "mid_block_add_attention": True}
    torch.manual_seed(1)
    AutoencoderKL.from_config(config).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny model: of one layer, with random numbers."""
    import torch

    from smooth_rt.lora import Lora, LoraLayer, write_lora

    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    place = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return write_lora(Lora({place: layer}, "", ""), tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture(scope="session")
def own_kernels() -> Path:
    """The compiled kernels for OpenVINO; a test without a C++ compiler is left out."""
    from engines.errors import EngineError
    from engines.kernels import library

    try:
        return library()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the npm packages that `smooth_rt.training.data.fetch` takes for complete: each listed object as a
    coloured disc, in the packages' own layout."""
    folder = tmp_path_factory.mktemp("emoji")
    pictures = folder / "fluent" / "package" / "assets"
    names = folder / "names" / "package"
    pictures.mkdir(parents=True)
    names.mkdir(parents=True)
    listed = (resources.files("smooth_rt.training") / "objects.txt").read_text(encoding="utf-8")
    records = []
    for index, line in enumerate(line for line in listed.splitlines() if line and not line.startswith("#")):
        short_name = line.split("=")[0].strip()
        code = f"{0x1F000 + index:x}"
        picture = Image.new("RGBA", (32, 32))
        colour = (37 * index % 256, 91 * index % 256, 53 * index % 256, 255)
        ImageDraw.Draw(picture).ellipse((2, 2, 29, 29), fill=colour)
        picture.save(pictures / f"{code}.webp", lossless=True)
        records.append({"short_name": short_name, "unified": code.upper(), "non_qualified": None})
    (names / "emoji.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture
def as_stranger() -> Iterator[tuple[Path, int, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A folder that every user may write to, an unknown user id, and what runs `smooth-rt` under it in that folder, in
    the place of the temporary one and without HOME; left out where the tests may not change the user."""
    uid = 12345
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("takes root and setpriv")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SMOOTH_RT_", "HOME", "XDG_"))}
    with tempfile.TemporaryDirectory() as name:  # those of pytest are closed to others
        folder = Path(name)
        folder.chmod(0o777)
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = {**kept, "TMPDIR": name, "PYTHONPATH": paths}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
            return subprocess.run(
                [*user, sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                timeout=300, check=False,
            )  # fmt: skip

        if run("-c", "import typer").returncode != 0:
            pytest.skip("the interpreter is closed to other users")
        yield folder, uid, lambda *arguments: run("-m", "smooth_rt", *arguments)


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Exporter]:
    """`to_onnx`, which exports each module once in a run of the tests: builds take its graph again, in every process.
    So the first to ask is the one that exports; a test that is about exporting takes `every_export`."""
    from export.to_onnx import to_onnx

    own = tmp_path_factory.getbasetemp()
    kept = (own if worker_id == "master" else own.parent) / "exported"
    kept.mkdir(exist_ok=True)

    def export(module: nn.Module, network: Network, dims: Dims, path: Path) -> None:
        try:
            graph = kept / asked_for(module, network, dims, path.name)
        except (pickle.PicklingError, AttributeError, TypeError):  # a module that a test made for itself
            graph = None
        if graph is not None and graph.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for part in graph.iterdir():
                shutil.copyfile(part, path.parent / part.name)
            return
        to_onnx(module, network, dims, path)
        if graph is None:
            return
        folder = Path(tempfile.mkdtemp(dir=kept))
        for suffix in ("", ".data"):
            shutil.copyfile(f"{path}{suffix}", folder / f"{path.name}{suffix}")
        try:
            folder.rename(graph)  # whole or not at all
        except OSError:  # another process was first
            shutil.rmtree(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.stages.to_onnx", export)
        yield export


@pytest.fixture
def every_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds export what they are given, whatever was exported before."""
    from export.to_onnx import to_onnx

    monkeypatch.setattr("export.stages.to_onnx", to_onnx)


class _Told(pickle.Pickler):
    """Tells a module by all that it is made of: tensors by their bytes, and nothing by where it was loaded from nor by
    an order that changes from process to process. What it writes is never read back."""

    def persistent_id(self, one: Any) -> str | None:
        import torch

        if isinstance(one, torch.Tensor):
            content = one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            return f"{one.dtype} {tuple(one.shape)} {hashlib.sha256(content).hexdigest()}"
        if isinstance(one, (str, PurePath)):
            return "a place" if os.path.isabs(one) else f"text {one}"
        # Among a diffusers model's settings is a list made of a set; what it computes is in its parts, in their order.
        unordered = isinstance(one, (set, frozenset)) or (isinstance(one, list) and {type(it) for it in one} == {str})
        return f"set {sorted(map(repr, one))}" if unordered else None


def asked_for(module: nn.Module, network: Network, dims: Dims, name: str) -> str:
    """A digest of all that an exported graph comes from; it names the file of its weights by its own `name`."""
    told = io.BytesIO()
    _Told(told).dump(module)
    return hashlib.sha256(repr((network, dims, name)).encode() + told.getvalue()).hexdigest()
