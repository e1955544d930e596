"""From a bundle back to torch weights, and the pipeline on real engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from engines.bundle import LoraSource, Source
from smooth_rt.build import ensure_engines
from smooth_rt.commands.options import RunOptions
from smooth_rt.commands.running import described, open_pipeline
from smooth_rt.errors import BundleError, InputError, ModelError
from smooth_rt.lora import read_lora
from smooth_rt.model import load_model
from smooth_rt.opening import open_model, reopen_model

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def remembered(model: Path, lora: Path, changed: str = "") -> Any:
    """What of a bundle `reopen_model` looks at; of the part that is named it remembers another digest."""
    digests = {**load_model(model).digests, "lora": read_lora(lora).digest}
    if changed:
        digests[changed] = "0"
    fused = LoraSource(source=str(lora), digest=digests.pop("lora"), strength=0.5)
    return SimpleNamespace(path=Path("bundle"), source=Source(model=str(model), digests=digests, lora=fused))


def test_a_bundle_finds_its_torch_weights_again(tiny_model: Path, lora: Path) -> None:
    weights = [
        model.unet.get_submodule(LAYER).weight
        for model in (reopen_model(remembered(tiny_model, lora)), open_model(tiny_model, lora, 0.5))
    ]
    assert torch.equal(*weights)
    plain = open_model(tiny_model, None, 0.5).unet.get_submodule(LAYER).weight
    layer = read_lora(lora).layers[LAYER]
    torch.testing.assert_close(weights[0], plain + 0.5 * layer.up @ layer.down)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("unet", r"bundle: .* is not what the bundle was made from \(unet changed\)"),
        ("lora", r"bundle: the LoRA .* is not what the bundle was made from"),
    ],
)
def test_weights_that_have_changed_are_refused(tiny_model: Path, lora: Path, changed: str, said: str) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        reopen_model(remembered(tiny_model, lora, changed))
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_lora_is_said_before_a_model_is_loaded(
    tiny_model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = remembered(tiny_model, lora)
    gone = bundle.source.lora.model_copy(update={"source": str(tmp_path / "gone.safetensors")})
    bundle.source = bundle.source.model_copy(update={"lora": gone})

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("smooth_rt.opening.load_model", load)
    monkeypatch.setattr("smooth_rt.model.load_model", load)
    for act in (
        lambda: open_model(tiny_model, bundle.source.lora.source, 1.0),
        lambda: reopen_model(bundle),
        lambda: ensure_engines(tiny_model, bundle.source.lora.source, backends=["onnxruntime"], output=tmp_path / "b"),
    ):
        with pytest.raises(ModelError, match=r"gone\.safetensors: no such file or folder; name a"):
            act()
    assert not (tmp_path / "b").exists()


def test_weights_that_are_gone(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    bundle = remembered(tiny_model, lora)
    bundle.source = bundle.source.model_copy(update={"model": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match="gone"):
        reopen_model(bundle)


def test_every_engine_makes_the_images_of_diffusers(
    tiny_model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    from smooth_rt.build import build_engines
    from smooth_rt.lora import fuse
    from smooth_rt.pipeline import SmoothPipeline

    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    peer = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    fuse(peer.unet, read_lora(lora), 0.6)
    arguments: dict[str, Any] = {"prompt": ["dog", "red apple"], "num_inference_steps": 50, "output_type": "np"}
    latents = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(0))
    expected = peer(**arguments, latents=latents).images
    bundle = build_engines(tiny_model, lora, 0.6, ["onnxruntime", "openvino"], tmp_path / "bundle")
    for engine in ("eager", "onnxruntime", "openvino"):
        with pytest.raises(
            InputError, match=r"^lora_strength=0\.5: the bundle holds its LoRA fused, or none; leave it"
        ):
            SmoothPipeline.from_engines(bundle, engine, lora_strength=0.5)
        with SmoothPipeline.from_engines(bundle, engine) as pipe:
            made = pipe(**arguments, latents=latents).images
            assert pipe.engine == engine
            together = pipe.invert(made, ["dog", "red apple"], num_inference_steps=10, output_type="np").images
            alone = pipe.invert(made[1], "red apple", num_inference_steps=10, output_type="np").images
        assert -10 * np.log10(np.mean((made - expected) ** 2) + 1e-20) >= 40
        assert np.abs(together[1:] - alone).max() <= 1e-3
        # The command tells the LoRA that the bundle was made with, on its torch weights too.
        options = RunOptions(engines=bundle.path, engine=engine)
        with open_pipeline(options) as pipe:
            assert described(pipe, options)["lora"] == str(lora)
