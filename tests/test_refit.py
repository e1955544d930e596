"""The LoRA's strength at run time: the same engine at any strength, and A, B and A again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.bundle import Bundle
from engines.errors import BundleError, EngineError, InputError
from engines.lora import LoraWeights
from smooth_rt import cli
from smooth_rt.build import ensure_engines
from smooth_rt.lora import Lora, LoraLayer, fuse, lora_weights, write_lora
from smooth_rt.model import load_model
from smooth_rt.pipeline import SmoothPipeline

BACKENDS = ("onnxruntime", "openvino")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a linear layer and of a convolution."""
    generator = torch.Generator().manual_seed(0)
    linear = LoraLayer(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator), 1.0)
    down, up = torch.randn(2, 32, 3, 3, generator=generator), torch.randn(32, 2, 1, 1, generator=generator)
    adapter = Lora({ATTENTION: linear, CONVOLUTION: LoraLayer(0.2 * down, up)}, "", "")
    return write_lora(adapter, tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ensure_engines(tiny_model, lora, backends=BACKENDS, lora_mode="refit").bundle


def images(pipe: SmoothPipeline) -> torch.Tensor:
    made = pipe("dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
    return torch.as_tensor(made.images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_then_b_then_a_again(bundle: Bundle, backend: str) -> None:
    with SmoothPipeline.from_engines(bundle, backend, lora_strength=0.7) as pipe:
        found = [images(pipe)]
        for strength in (-1.5, 0.7, 0.0, 0.7):
            pipe.set_lora_strength(strength)
            found.append(images(pipe))
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[0], found[4])
        assert (found[0] - found[1]).norm() / found[0].norm() > 1e-3
        assert pipe.digests["lora_strength"] == "0.7"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_it_is_what_fusing_gives(bundle: Bundle, tiny_model: Path, lora: Path, backend: str, strength: float) -> None:
    with (
        SmoothPipeline.from_engines(bundle, backend, lora_strength=strength) as pipe,
        SmoothPipeline.from_pretrained(tiny_model, lora, strength, engine="eager") as fused,
    ):
        torch.testing.assert_close(images(pipe), images(fused), rtol=1e-3, atol=1e-4)


def test_the_strength_is_no_part_of_the_bundle(bundle: Bundle, tiny_model: Path, lora: Path) -> None:
    assert bundle.source.lora is not None
    assert bundle.source.lora.strength is None
    for strength in (0.1, 1.0):
        again = ensure_engines(tiny_model, lora, strength, BACKENDS, lora_mode="refit")
        assert (again.reused, again.bundle.path) == (True, bundle.path)
    assert [built.variant.name for built in bundle.variants] == ["onnxruntime-fp32-refit", "openvino-fp32-refit"]
    for built in bundle.variants:
        record = built.engine("unet")
        assert set(record.places) == {f"unet.{path}.weight" for path in (ATTENTION, CONVOLUTION)}
        assert f"{built.variant.name}/unet/lora.safetensors" in record.weights
        assert not built.engine("vae_decoder").places


def test_a_pipeline_is_asked_for_it(bundle: Bundle, tiny_model: Path, lora: Path) -> None:
    options: Any = {"lora": lora, "lora_strength": 0.3, "lora_mode": "refit"}
    with SmoothPipeline.from_pretrained(tiny_model, engine="onnxruntime", **options) as pipe:
        assert pipe.bundle is not None
        assert pipe.bundle.path == bundle.path
        first = images(pipe)
        pipe.set_lora_strength(2.0)
        assert not torch.equal(first, images(pipe))
        pipe.set_lora_strength(0.3)
        assert torch.equal(first, images(pipe))
    with pytest.raises(InputError, match="lora_mode=refit: eager cannot replace weights"):
        SmoothPipeline.from_pretrained(tiny_model, engine="eager", **options)


def test_the_model_is_as_it_was_after_a_build(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    ensure_engines(model, lora, backends=["onnxruntime"], output=tmp_path / "bundle", lora_mode="refit")
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())


def test_weights_at_a_strength_are_those_of_fusing(tiny_model: Path, lora: Path) -> None:
    from smooth_rt.lora import read_lora

    model, adapter = load_model(tiny_model), read_lora(lora)
    weights = lora_weights(model.unet, adapter)
    fuse(model.unet, adapter, 0.3)
    for name, weight in weights.at(0.3).items():
        assert torch.equal(weight, model.unet.get_parameter(name.removeprefix("unet.")))


def test_what_cannot_be_set_is_said(
    bundle: Bundle, tiny_model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        SmoothPipeline.from_pretrained(tiny_model, lora, engine="eager") as fused,
        pytest.raises(InputError, match=r"lora_strength=0\.5: the engines hold their LoRA fused, or none"),
    ):
        fused.set_lora_strength(0.5)
    with SmoothPipeline.from_engines(bundle, "onnxruntime") as pipe:
        with pytest.raises(InputError, match="lora_strength=nan"):
            pipe.set_lora_strength(float("nan"))
        engine = pipe._engines["unet"]
        with pytest.raises(InputError, match=r"no weights 'unet\.nothing' that can be replaced"):
            engine.refit({"unet.nothing": torch.zeros(1)})
        with pytest.raises(EngineError, match="onnxruntime cannot"):
            engine.refit({f"unet.{ATTENTION}.weight": torch.zeros(3, 3)})
    for options, said in [
        (["--backend", "inductor"], "lora-mode=refit: inductor cannot replace weights; choose fused"),
        (["--backend", "openvino", "--precision", "int8"], "openvino can replace weights in fp32, bf16, not in int8"),
        (["--backend", "openvino", "--lora", "none"], "lora-mode=refit: there is no LoRA whose strength could be set"),
    ]:
        arguments = ["build-engine", "--model", str(tiny_model), "--lora", str(lora), "--lora-mode", "refit", *options]
        assert cli.main([*arguments, "--output", str(tmp_path / "b")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_command_line_sets_it(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, bytes] = {}
    for strength in ("0.2", "1.5"):
        arguments: list[Any] = ["generate", "--prompt", "dog", "--engines", str(bundle.path), "--engine", "onnxruntime"]
        arguments += ["--num-inference-steps", "2", "--lora-strength", strength, "--output", str(tmp_path / strength)]
        assert cli.main(arguments) == 0
        made[strength] = next((tmp_path / strength).glob("*.png")).read_bytes()
    assert made["0.2"] != made["1.5"]


def test_a_file_of_weights_that_is_damaged(tmp_path: Path, tiny_model: Path, lora: Path) -> None:
    from smooth_rt.lora import read_lora

    path = tmp_path / "lora.safetensors"
    weights = lora_weights(load_model(tiny_model).unet, read_lora(lora))
    weights.save(path)
    again = LoraWeights.load(path)
    assert all(torch.equal(a, b) for a, b in zip(again.at(2.0).values(), weights.at(2.0).values(), strict=False))
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if key.endswith(":up")))
    save_file(tensors, path)
    with pytest.raises(BundleError, match=r"lora\.safetensors: unreadable \(its parts do not belong together\)"):
        LoraWeights.load(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BundleError, match="unreadable"):
        LoraWeights.load(path)
