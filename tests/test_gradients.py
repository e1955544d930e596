"""Engines with gradients: built, opened and differentiated through, refused where they are wrong or cannot be had."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from engines.bundle import Bundle, digest_file
from engines.contract import NETWORKS, gradients_named, said_gradients
from engines.variant import Profile, Span
from smooth_rt import cli
from smooth_rt.build import Built, ensure_engines
from smooth_rt.errors import EngineError, InputError, ParityError
from smooth_rt.lora import Lora, LoraLayer
from smooth_rt.pipeline import SmoothPipeline

TEXT = ["encoder_hidden_states"]
FOLDER = "onnxruntime-fp32"


@dataclass
class Grown:
    """A bundle without gradients, the same with those of the text, and what the second build said."""

    model: Path
    before: Bundle
    nodes: dict[str, int]
    built: Built
    steps: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def small_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a UNet of half the blocks: a gradient graph takes its time to trace."""
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


@pytest.fixture(scope="module")
def grown(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    """Built for real, twice: the gradients are added to what is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = ensure_engines(small_model, backends=["onnxruntime"]).bundle
        nodes = {file.path: (before.path / file.path).stat().st_ino for file in before.manifest.files}
        steps: list[tuple[str, int, int]] = []
        built = ensure_engines(
            small_model, backends=["onnxruntime"], gradients=["text"], progress=lambda *step: steps.append(step)
        )
        yield Grown(small_model, before, nodes, built, steps)


@pytest.fixture(scope="module")
def pipe(grown: Grown) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_engines(grown.built.bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def eager(grown: Grown) -> Iterator[SmoothPipeline]:
    with SmoothPipeline.from_pretrained(grown.model, engine="eager") as pipe:
        yield pipe


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


def test_gradients_are_added_and_nothing_is_built_again(grown: Grown) -> None:
    bundle = grown.built.bundle
    assert "is not built with gradients text" in grown.built.reason
    (built,) = bundle.variants
    assert built.gradients == ("unet_vjp_text",)
    assert built.engines[:-1] == grown.before.variants[0].engines
    same = [path for path in grown.nodes if path.startswith(FOLDER) and "model.onnx" in path]
    assert len(same) >= 2 * len(NETWORKS)
    assert all((bundle.path / path).stat().st_ino == grown.nodes[path] for path in same)
    assert [what for what, _, _ in grown.steps if ": " in what] == [
        "unet_vjp_text: export",
        f"unet_vjp_text: verify {FOLDER}",
    ]
    assert (grown.steps[-1][0], *{total for _, _, total in grown.steps}) == ("done", grown.steps[-1][1])


def test_every_output_is_in_the_manifest(grown: Grown) -> None:
    record = grown.built.bundle.variants[0].engine("unet_vjp_text")
    assert [parity.output for parity in record.parity] == ["noise_pred", "grad_encoder_hidden_states"]
    assert all(0 < parity.relative <= parity.tolerance == 1e-4 for parity in record.parity)
    assert record.bounds == [{"batch": (1, 1, None), "height": (2, 8, None), "width": (2, 8, None)}]


def test_a_bundle_with_gradients_serves_who_asks_for_none(grown: Grown) -> None:
    assert ensure_engines(grown.model, backends=["onnxruntime"]).reused
    assert ensure_engines(grown.model, backends=["onnxruntime"], gradients=["text"]).reused


def test_its_gradients_are_those_of_autograd(pipe: SmoothPipeline, eager: SmoothPipeline) -> None:
    for sizes in ((1, 8, 8), (3, 12, 4)):
        given = drawn(pipe, *sizes)
        (found, grads), (wanted, reference) = (one.vjp(**given) for one in (pipe, eager))
        assert list(grads) == TEXT
        for got, exact in ((found, wanted), (grads[TEXT[0]], reference[TEXT[0]])):
            assert float((got - exact).norm() / exact.norm()) < 1e-4
    assert pipe._eager_unet is None


def test_from_pretrained_asks_for_them(grown: Grown) -> None:
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
    grown: Grown, eager: SmoothPipeline, caplog: pytest.LogCaptureFixture
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
    grown: Grown, eager: SmoothPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


def test_profiles_of_gradients_are_images(grown: Grown, pipe: SmoothPipeline) -> None:
    one = Profile(
        batch=Span(min=2, opt=2, max=2), height=Span(min=16, opt=16, max=16), width=Span(min=16, opt=16, max=16)
    )
    network = grown.built.bundle.variants[0].variant.network("unet_vjp_text", pipe.dims)
    assert one.bounds(network, pipe.dims) == [{"batch": (2, 2, 2), "height": (8, 8, 8), "width": (8, 8, 8)}]


def test_list_inspect_and_verify_tell_of_them(grown: Grown, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(grown.built.bundle.path)

    def told(*arguments: str) -> dict[str, Any]:
        assert cli.main(["engines", *arguments, "--json"]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    (row,) = told("list")["bundles"]
    assert (row["engines"], row["gradients"]) == ([FOLDER], {FOLDER: ["text"]})
    rows = told("inspect", path)["engines"]
    assert [row["network"] for row in rows] == [*NETWORKS, "unet_vjp_text"]
    assert 0 < rows[-1]["worst_error"] <= rows[-1]["tolerance"] == 1e-4
    errors = told("verify", path, "--parity")["parity"]
    assert [row["output"] for row in errors if row["network"] == "unet_vjp_text"] == [
        "noise_pred",
        "grad_encoder_hidden_states",
    ]


def scaled(model: Any) -> None:
    """One gradient too large by a hundredth: the output is right, and the graph runs."""
    (node,) = (node for node in model.graph.node if "grad_encoder_hidden_states" in node.output)
    names = list(node.output)
    names[names.index("grad_encoder_hidden_states")] = "before"
    del node.output[:]
    node.output.extend(names)
    model.graph.initializer.append(numpy_helper.from_array(torch.tensor(1.01).numpy(), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "factor"], ["grad_encoder_hidden_states"]))


def test_a_damaged_gradient_is_refused(grown: Grown, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(shutil.copytree(grown.built.bundle.path, tmp_path / "bundle"))
    (built,) = bundle.variants
    record = built.engine("unet_vjp_text")
    graph = bundle.path / record.file
    model = onnx.load(str(graph), load_external_data=False)
    scaled(model)
    graph.write_bytes(model.SerializeToString())
    assert cli.main(["engines", "verify", str(bundle.path)]) == 2
    assert "unet_vjp_text/model.onnx: " in capsys.readouterr().err
    # And where the manifest was made to fit, by the numbers.
    digest = digest_file(graph)
    damaged = record.model_copy(update={"graph": digest})
    damaged = damaged.model_copy(update={"key": built.expected_key(damaged, bundle.source, bundle.dims)})
    files = [
        file.model_copy(update={"sha256": digest, "size": graph.stat().st_size}) if file.path == record.file else file
        for file in bundle.manifest.files
    ]
    variant = built.model_copy(update={"engines": [*built.engines[:-1], damaged]})
    bundle.rewrite(bundle.manifest.model_copy(update={"variants": [variant], "files": files}))
    assert cli.main(["engines", "verify", str(bundle.path)]) == 0
    assert cli.main(["engines", "verify", "--parity", str(bundle.path)]) == 2
    said = "unet_vjp_text: onnxruntime's grad_encoder_hidden_states differs from torch's by 1.0e-02"
    assert said in capsys.readouterr().err


def test_a_wrong_gradient_is_not_published(grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(module: object, network: Any, dims: object, path: Path) -> None:
        path.parent.mkdir(parents=True)
        for part in (grown.built.bundle.path / FOLDER / network.name).glob("model.onnx*"):
            shutil.copy(part, path.parent / part.name)
        if network.name == "unet_vjp_text":
            model = onnx.load(str(path), load_external_data=False)
            scaled(model)
            path.write_bytes(model.SerializeToString())

    monkeypatch.setattr("export.stages.to_onnx", copy)
    target = tmp_path / "bundle"
    said = (
        r"unet_vjp_text: onnxruntime's grad_encoder_hidden_states differs from torch's by 1\.0e-02 .* --gradients out"
    )
    with pytest.raises(ParityError, match=said) as caught:
        ensure_engines(grown.model, backends=["onnxruntime"], output=target, gradients=["text"])
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_another_strength_is_that_of_the_gradients(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refit: the same graphs take the LoRA's weights."""

    def copy(module: object, network: Any, dims: object, path: Path) -> None:
        path.parent.mkdir(parents=True)
        for part in (grown.built.bundle.path / FOLDER / network.name).glob("model.onnx*"):
            shutil.copyfile(part, path.parent / part.name)

    monkeypatch.setattr("export.stages.to_onnx", copy)
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    lora = Lora({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": layer}, "", "some digest")
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


def test_tensorrt_builds_the_graph_without_a_gpu(grown: Grown, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds the engine; pip install 'smooth-rt[tensorrt-rtx]'")
    from export.to_tensorrt import to_tensorrt

    bundle = grown.built.bundle
    (built,) = bundle.variants
    record, network = built.engine("unet_vjp_text"), built.variant.network("unet_vjp_text", bundle.dims)
    bounds: dict[str, Any] = {name: (1, 2, 4) if name == "batch" else (8, 8, 8) for name in network.symbols}
    engine = tmp_path / "model.engine"
    facts = to_tensorrt(
        bundle.path / record.file, engine, network, [bounds], backend="tensorrt-rtx", architecture="rtx"
    )
    assert facts.bytes == engine.stat().st_size > 0


def test_features_come_with_their_gradient() -> None:
    names = gradients_named(["features", "text"])
    assert names == ("unet_features", "unet_vjp_text", "unet_features_vjp")
    assert said_gradients(names) == ["text", "features"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gradients", "latents"], "gradients=latents: unknown; choose from text, sample, both"),
        (
            ["--gradients", "text", "--precision", "int8"],
            "gradients=text: onnxruntime has them in fp32, fp16, not in int8",
        ),
        (["--gradients", "both", "--backend", "inductor"], "gradients=both: inductor is not built with gradients; "),
        (
            ["--gradients", "text", "--backend", "openvino", "--lora-mode", "refit"],
            "gradients=text: openvino cannot replace the weights of their graphs; choose --lora-mode fused",
        ),
    ],
)
def test_gradients_that_cannot_be_built(
    small_model: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    backend = [] if "--backend" in given else ["--backend", "onnxruntime"]
    assert cli.main(["build-engine", "--model", str(small_model), *backend, *given]) == 2
    heard = capsys.readouterr().err.strip()
    assert heard.startswith(f"error: --{said}")
    assert "\n" not in heard
