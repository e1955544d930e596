"""Engines with gradients: opened and differentiated through; eager takes what they lack."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.bundle import Bundle
from smooth_rt.build import ensure_engines
from smooth_rt.errors import EngineError, InputError
from smooth_rt.lora import LoraLayer
from smooth_rt.lora.read import parse
from smooth_rt.pipeline import SmoothPipeline

TEXT = ["encoder_hidden_states"]
FOLDER = "onnxruntime-fp32"


def drawn(pipe: SmoothPipeline, rows: int, height: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows * height + width)
    latent = (rows, pipe.dims.latent_channels, height, width)
    return {
        "latents": torch.randn(latent, generator=generator),
        "timestep": int(torch.randint(0, 1000, (), generator=generator)),
        "prompt_embeds": torch.randn(rows, pipe.dims.tokens, pipe.dims.text_width, generator=generator),
        "wrt": TEXT,
        "cotangent": torch.randn(latent, generator=generator),
        "cotangent_scale": torch.rand(rows, generator=generator),
    }


def test_its_gradients_are_those_of_autograd(pipe: SmoothPipeline, eager: SmoothPipeline) -> None:
    for sizes in ((1, 8, 8), (3, 12, 4)):
        given = drawn(pipe, *sizes)
        (found, grads), (wanted, reference) = (one.vjp(**given) for one in (pipe, eager))
        assert list(grads) == TEXT
        for got, exact in ((found, wanted), (grads[TEXT[0]], reference[TEXT[0]])):
            assert float((got - exact).norm() / exact.norm()) < 1e-4
    assert pipe._eager_unet is None


def test_from_pretrained_asks_for_them(grown: Any) -> None:
    for named in ("text", ["text"]):
        with SmoothPipeline.from_pretrained(grown.model, engine="onnxruntime", gradients=named) as pipe:
            assert pipe._engines["unet"].lacks_gradient(TEXT) is None
            assert pipe.bundle is not None
            assert pipe.bundle.path == grown.built.bundle.path
    with SmoothPipeline.from_pretrained(grown.model, engine="eager", gradients="text,sample") as pipe:
        assert pipe._engines["unet"].lacks_gradient(["sample"]) is None
    for engine, gradients, said in (
        ("onnxruntime", "latents", "gradients=latents: unknown; choose from text, sample"),
        ("onnxruntime", 3, "gradients=3: name them, as 'text'"),
        ("inductor", ["text", "sample"], "gradients=text,sample: inductor is not built with gradients"),
    ):
        with pytest.raises(InputError, match=said):
            SmoothPipeline.from_pretrained(grown.model, engine=engine, gradients=gradients)  # type: ignore[arg-type]


def test_auto_takes_an_engine_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16 on a processor that is ONNX Runtime, while OpenVINO goes first without gradients."""
    monkeypatch.setattr("engines.select.gpu", lambda: None)
    found: list[Any] = []

    def build(*arguments: Any, **named: Any) -> None:
        found.append((arguments[3], named["gradients"]))
        raise EngineError("far enough")

    monkeypatch.setattr("smooth_rt.build.build_engines", build)
    monkeypatch.setattr("smooth_rt.pipeline.load_model", lambda *_, **__: None)
    for gradients in ((), "text, sample"):
        with pytest.raises(EngineError, match="far enough"):
            SmoothPipeline.from_pretrained("any", precision="fp16", gradients=gradients)
    assert found == [(["openvino"], []), (["onnxruntime"], ["text", "sample"])]


def test_what_it_lacks_eager_takes_and_the_command_is_said(
    grown: Any, eager: SmoothPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with SmoothPipeline.from_engines(grown.built.bundle, engine="onnxruntime") as pipe:
        given = drawn(pipe, 2, 8, 8) | {"wrt": ["sample"]}
        with caplog.at_level(logging.WARNING, "smooth_rt"):
            _, grads = pipe.vjp(**given)
        torch.testing.assert_close(grads, eager.vjp(**given)[1], atol=1e-5, rtol=1e-4)
        assert "taken by eager autograd" in caplog.text
        said = rf"no gradient with respect to sample; build it with `smooth-rt build-engine .*--model {grown.model} "
        with pytest.raises(EngineError, match=said + r".*--gradients text,sample --output"):
            pipe._engines["unet"].vjp(["sample"], given["cotangent"])
    with Bundle.open(grown.built.bundle.path).engine("vae_decoder", "onnxruntime") as engine:
        assert "gradients are those of the UNet" in str(engine.lacks_gradient(["sample"]))


@pytest.mark.slow
def test_features_of_a_block_are_built_and_taken(
    grown: Any, eager: SmoothPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a bundle that has others, of the block that the word alone does not name."""
    folder = shutil.copytree(grown.built.bundle.path, tmp_path / "bundle")
    asked = ["features:up_blocks.1"]
    bundle = ensure_engines(grown.model, backends=["onnxruntime"], output=folder, gradients=asked).bundle
    assert bundle.variants[0].gradients == ("unet_up_blocks_1", "unet_vjp_text", "unet_up_blocks_1_vjp")
    assert ensure_engines(grown.model, backends=["onnxruntime"], output=folder, gradients=asked).reused
    given: dict[str, Any] = drawn(eager, 2, 8, 12) | {"wrt": ["sample"]}
    where = given["latents"], given["timestep"], given["prompt_embeds"]
    given["cotangent"] = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    with SmoothPipeline.from_engines(bundle, engine="onnxruntime") as pipe:
        wanted, reference = eager.vjp(**given, of="up_blocks.1")
        found, grads = pipe.vjp(**given, of="up_blocks.1")
        for got, exact in (
            (found, wanted), (grads["sample"], reference["sample"]), (pipe.features(*where, "up_blocks.1"), wanted)
        ):  # fmt: skip
            assert float((got - exact).norm() / exact.norm()) < 1e-4
        assert pipe._eager_unet is None
        # The block that the word alone names is another, and left to eager.
        with caplog.at_level(logging.WARNING, "smooth_rt"):
            assert torch.equal(pipe.features(*where), eager.features(*where, "up_blocks.0"))
        assert "has no graph up to its features" in caplog.text
        assert "--gradients text,features:up_blocks.0,features:up_blocks.1 --output" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cotangent": torch.zeros(2, 4, 8, 4)}, r"unet_vjp_text: cotangent has shape \[2, 4, 8, 4\], not .* width=8"),
        ({"cotangent_scale": torch.zeros(3)}, r"cotangent_scale: shape \[3\], not \[2\] or \[1\]"),
    ],
)
def test_tensors_that_do_not_fit(pipe: SmoothPipeline, change: dict[str, Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pipe.vjp(**drawn(pipe, 2, 8, 8) | change)
    assert "\n" not in str(caught.value)


def test_null_text_inversion_runs_on_them(pipe: SmoothPipeline, eager: SmoothPipeline) -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        one.invert(image, "dog", method="null-text", num_inference_steps=2, keep=False, early_stop=False)
        for one in (pipe, eager)
    )
    torch.testing.assert_close(found.negative_prompt_embeds, wanted.negative_prompt_embeds, atol=1e-3, rtol=0)
    assert pipe._eager_unet is None


@pytest.mark.slow
def test_spdinv_runs_on_them(
    grown: Any, eager: SmoothPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On gradients that are added to a bundle that has others."""
    folder = shutil.copytree(grown.built.bundle.path, tmp_path / "bundle")
    bundle = ensure_engines(grown.model, backends=["onnxruntime"], output=folder, gradients=["sample"]).bundle
    assert bundle.variants[0].gradients == ("unet_vjp_text", "unet_vjp_sample")
    before = eager.evaluations["gradient"]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with SmoothPipeline.from_engines(bundle, engine="onnxruntime") as pipe:
        found, wanted = (
            one.invert(images, "dog", method="spdinv", num_inference_steps=2, keep=False, early_stop=False)
            for one in (pipe, eager)
        )
        torch.testing.assert_close(found.latents, wanted.latents, atol=1e-3, rtol=0)
        assert found.final_latents is not None
        torch.testing.assert_close(found.final_latents, wanted.final_latents, atol=1e-3, rtol=0)
        assert pipe.evaluations["gradient"] == eager.evaluations["gradient"] - before == 2 * 2 * 25
        assert pipe._eager_unet is None
    assert "eager autograd" not in caplog.text


def test_another_strength_is_that_of_the_gradients(grown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refit: the same graphs take the LoRA's weights."""

    def copy(module: object, network: Any, dims: object, path: Path) -> None:
        path.parent.mkdir(parents=True)
        for part in (grown.built.bundle.path / FOLDER / network.name).glob("model.onnx*"):
            shutil.copyfile(part, path.parent / part.name)

    monkeypatch.setattr("export.stages.to_onnx", copy)
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = parse({f"{path}.lora_A.weight": layer.down, f"{path}.lora_B.weight": layer.up}, "", "a LoRA")
    bundle = ensure_engines(
        grown.model, lora, backends=["onnxruntime"], output=tmp_path / "bundle", lora_mode="refit", gradients=["text"]
    ).bundle
    (record,) = (one for one in bundle.variants[0].engines if one.network == "unet_vjp_text")
    assert [place.transposed for place in record.places.values()] == [False]
    with SmoothPipeline.from_engines(bundle, engine="onnxruntime") as pipe:
        given = drawn(pipe, 2, 8, 8)
        grads = []
        for strength in (0.0, 1.0, 0.0):
            pipe.set_lora_strength(strength)
            grads.append(pipe.vjp(**given)[1][TEXT[0]])
        assert torch.equal(grads[0], grads[2])
        assert float((grads[1] - grads[0]).norm() / grads[0].norm()) > 1e-3
