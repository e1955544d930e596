"""A network that is one convolution, as ONNX and as torch, and a bundle around it: no export needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from engines.contract import NETWORKS, Dims, Network, contract
from engines.manifest import (
    EngineRecord,
    FileRecord,
    LoraSource,
    Manifest,
    Parity,
    Source,
    VariantRecord,
    digest_file,
)
from engines.select import architecture, backend_version
from engines.variant import Variant, every_size

DIMS = Dims(
    tokens=5,
    text_width=6,
    vocabulary=11,
    latent_channels=3,
    image_channels=2,
    vae_factor=4,
    latent_multiple=2,
    sample_size=4,
)


class OneConvolution(nn.Module):
    """The contract of a VAE encoder: a strided convolution as the mean, its negative as the log-variance."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        factor = DIMS.vae_factor
        weight = torch.randn(DIMS.latent_channels, DIMS.image_channels, factor, factor, generator=generator)
        self.weight = nn.Parameter(weight)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        mean = nn.functional.conv2d(sample, self.weight, stride=DIMS.vae_factor)
        return mean, -mean


@pytest.fixture
def dims() -> Dims:
    return DIMS


@pytest.fixture
def network() -> Network:
    return contract("vae_encoder", DIMS)


@pytest.fixture
def module() -> OneConvolution:
    return OneConvolution()


@pytest.fixture
def write_graph(module: OneConvolution) -> Callable[..., Path]:
    """Writes the convolution as ONNX to a path, its outputs renamed on request."""

    def write(path: Path, outputs: tuple[str, str] = ("latent_mean", "latent_logvar")) -> Path:
        side = ["batch", DIMS.image_channels, "h", "w"]
        latent = ["batch", DIMS.latent_channels, "lh", "lw"]
        strides = [DIMS.vae_factor] * 2
        nodes = [
            helper.make_node("Conv", ["sample", "weight"], [outputs[0]], strides=strides),
            helper.make_node("Neg", [outputs[0]], [outputs[1]]),
        ]
        graph = helper.make_graph(
            nodes,
            "one_convolution",
            [helper.make_tensor_value_info("sample", TensorProto.FLOAT, side)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, latent) for name in outputs],
            [numpy_helper.from_array(module.weight.detach().numpy(), "weight")],
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save_model(model, str(path))
        return path

    return write


@pytest.fixture
def bundle_folder(tmp_path: Path, write_graph: Callable[..., Path]) -> Path:
    """A valid bundle for onnxruntime whose networks all hold the convolution's graph."""
    folder = tmp_path / "bundle"
    source = Source(
        model="some/model",
        revision="main",
        digests={"unet": "0" * 64, "vae": "1" * 64},
        lora=LoraSource(source="some/lora", digest="2" * 64, strength=0.5),
    )
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "model.json").write_text("{}")
    variant = Variant(backend="onnxruntime", precision="fp32", lora_mode="fused", architecture=architecture())
    profile = every_size(DIMS)
    records = []
    for name in NETWORKS:
        graph = write_graph(folder / variant.name / name / "model.onnx")
        weights = graph.with_name(f"{graph.name}.data")
        weights.write_bytes(np.arange(64, dtype=np.float32).tobytes())
        records.append(
            EngineRecord(
                network=name,
                precision="fp32",
                hint=None,
                file=f"{variant.name}/{name}/{graph.name}",
                graph=digest_file(graph),
                weights={f"{variant.name}/{name}/{weights.name}": digest_file(weights)},
                bounds=profile.bounds(contract(name, DIMS), DIMS),
                key="",
                parity=[
                    Parity(output=one.name, relative=0.0, max_abs=0.0, tolerance=1e-4, cases=1, worst={"batch": 1})
                    for one in contract(name, DIMS).outputs
                ],
            )
        )
    built = VariantRecord(
        variant=variant,
        profiles=[profile],
        backend_version=backend_version("onnxruntime"),
        engines=records,
    )
    keyed = [r.model_copy(update={"key": built.expected_key(r, source, DIMS)}) for r in records]
    built = built.model_copy(update={"engines": keyed})
    files = [
        FileRecord(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=digest_file(p))
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    manifest = Manifest(dims=DIMS, source=source, variants=[built], files=files)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def edit_manifest(bundle_folder: Path) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Applies a change to the manifest of `bundle_folder`, then makes each record's key fit again."""

    def edit(change: Callable[[dict[str, Any]], None]) -> None:
        path = bundle_folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        source = Source.model_validate(content["source"])
        dims = Dims(**content["dims"])
        for variant in content["variants"]:
            built = VariantRecord.model_construct(**{**variant, "variant": Variant(**variant["variant"])})
            for record in variant["engines"]:
                record["key"] = built.expected_key(EngineRecord.model_construct(**record), source, dims)
        path.write_text(json.dumps(content))

    return edit
