"""The LoRA's strength at run time, by replaced weights (refit) and as an input (runtime): the same engine at any
strength, what fusing gives, and A, B and A again bit for bit."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.bundle import Bundle
from engines.contract import LORA_STRENGTH
from engines.errors import BundleError, EngineError, InputError, ModelError
from engines.lora import LoraWeights
from engines.variant import Bounds
from export.graphs import Case, random_inputs
from smooth_rt import cli
from smooth_rt.build import ensure_engines
from smooth_rt.lora import Lora, LoraLayer, fuse, lora_weights, write_lora
from smooth_rt.model import Model, load_model
from smooth_rt.pipeline import SmoothPipeline

BACKENDS = ("onnxruntime", "openvino")
MODES = ("refit", "runtime")
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
def model(tiny_model: Path) -> Model:
    """What the bundle is built from."""
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def bundle(model: Model, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTH_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        refit = ensure_engines(model, lora, backends=BACKENDS, lora_mode="refit").bundle
        bundle = ensure_engines(model, lora, backends=BACKENDS, lora_mode="runtime").bundle
        assert bundle.path == refit.path
        yield bundle


def images(pipe: SmoothPipeline) -> torch.Tensor:
    made = pipe("dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
    return torch.as_tensor(made.images)


def test_weights_that_are_not_the_named_lora_are_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_) = bundle.path.glob("onnxruntime-*/unet/lora.safetensors")
    good = load_file(path)
    down = next(key for key in good if key.endswith(":down"))
    file = tmp_path / "lora.safetensors"
    base = down.replace(":down", ":base")
    for tensors, said in (
        ({}, "no layer"),
        ({**good, down: good[down][:, :-1]}, "shapes do not belong together"),
        ({**good, base: good[base].to(torch.int8)}, "its base is no finite floating-point weight"),
        ({**good, base: good[base] * math.nan}, "its base is no finite floating-point weight"),
    ):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        with pytest.raises(BundleError, match=said):
            LoraWeights.load(file)
    whole = LoraWeights.load(path)
    other = LoraWeights(whole.base, {name: 2 * one for name, one in whole.down.items()}, whole.up, whole.scale)
    monkeypatch.setattr(LoraWeights, "load", lambda _: other)
    with pytest.raises(BundleError, match="not the LoRA that the manifest names; rebuild it with `smooth-rt"):
        SmoothPipeline.from_engines(bundle, "onnxruntime", lora_strength=0.7, lora_mode="refit")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_then_b_then_a_again(bundle: Bundle, backend: str, mode: str) -> None:
    with SmoothPipeline.from_engines(bundle, backend, lora_strength=0.7, lora_mode=mode) as pipe:
        found = [images(pipe)]
        for strength in (-1.5, 0.7, 0.0, 0.7):
            pipe.set_lora_strength(strength)
            found.append(images(pipe))
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[0], found[4])
        assert (found[0] - found[1]).norm() / found[0].norm() > 1e-3
        assert (pipe.digests["lora_strength"], pipe.lora_strength) == ("0.7", 0.7)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no")], ids=["interrupted", "failed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_runs_between_two_strengths(
    bundle: Bundle, backend: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch that is broken off may have replaced weights: what ran then would be told, and kept, at another strength
    than its own."""
    with SmoothPipeline.from_engines(bundle, backend, lora_strength=0.7, lora_mode="refit") as pipe:
        first, embeds = images(pipe), pipe.encode_prompt("dog")
        engine, latents = pipe._engines["unet"], torch.zeros(1, 4, 8, 8)
        works = engine.refit_impl

        def broken_off(weights: Any) -> None:
            works(weights)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(engine, "refit_impl", broken_off)
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EngineError):
                pipe.set_lora_strength(0.1)
        calls = (
            lambda: images(pipe),
            lambda: pipe.predict(latents, 500, embeds),
            lambda: pipe.vjp(latents, 500, embeds, "sample", latents),
            lambda: pipe.features(latents, 500, embeds),
        )
        for call in calls:
            with pytest.raises(
                EngineError, match=r"lora_strength: setting it failed or was interrupted .* set it again"
            ):
                call()
        assert pipe.lora_strength is None
        assert pipe.digests["lora_strength"] not in ("0.7", "0.1")
        pipe.set_lora_strength(0.7)
        assert torch.equal(images(pipe), first)
        assert pipe.digests["lora_strength"] == "0.7"


def test_of_strengths_that_are_set_at_once_the_one_that_is_told_runs(bundle: Bundle) -> None:
    strengths = (0.3, 0.8, 3.0)
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode="refit") as pipe:
        alone = {}
        for strength in strengths:
            pipe.set_lora_strength(strength)
            alone[repr(strength)] = images(pipe)
        for _ in range(10):
            threads = [threading.Thread(target=pipe.set_lora_strength, args=(strength,)) for strength in strengths]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.equal(images(pipe), alone[pipe.digests["lora_strength"]])


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_pipeline_takes_no_strength(bundle: Bundle, mode: str) -> None:
    pipe = SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode=mode)
    pipe.close()
    with pytest.raises(EngineError, match="unet: the onnxruntime engine is closed; open it again"):
        pipe.set_lora_strength(0.5)


def test_what_the_bundle_lacks_is_added_by_the_command_that_is_told(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands: before, the command for another precision replaced the whole bundle."""
    shutil.copytree(bundle.path, tmp_path / "b")
    copied = Bundle.open(tmp_path / "b")
    with pytest.raises(BundleError) as caught:
        SmoothPipeline.from_engines(copied, "openvino", precision="bf16")
    monkeypatch.setattr("export.reference.Reference.verify", lambda *_: [])  # what is compared is tested elsewhere
    command = shlex.split(str(caught.value).split("`")[1])
    assert cli.main(command[1:]) == 0
    names = {built.variant.name for built in Bundle.open(copied.path).variants}
    assert names > {built.variant.name for built in bundle.variants}
    assert len(names) == len(bundle.variants) + 1
    with pytest.raises(EngineError, match=rf"'inductor': not in the bundle.* run `.*--lora-mode .*{copied.path}`"):
        SmoothPipeline.from_engines(copied, "inductor")


@pytest.mark.parametrize(("backend", "mode"), [*itertools.product(BACKENDS, MODES), ("eager", None)])
def test_it_is_what_fusing_gives(bundle: Bundle, tiny_model: Path, lora: Path, backend: str, mode: str | None) -> None:
    with SmoothPipeline.from_engines(bundle, backend, lora_mode=mode) as pipe:
        for strength in (0.0, 0.6, -1.5):
            pipe.set_lora_strength(strength)
            with SmoothPipeline.from_pretrained(tiny_model, lora, strength, engine="eager") as fused:
                torch.testing.assert_close(images(pipe), images(fused), rtol=1e-3, atol=1e-4)
                assert pipe.digests == fused.digests


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_each_row_has_a_strength_of_its_own(bundle: Bundle, tiny_model: Path, lora: Path, backend: str) -> None:
    strengths = torch.tensor([0.0, 1.0, -0.4])
    with SmoothPipeline.from_engines(bundle, backend, lora_mode="runtime") as pipe:
        engine = pipe._engines["unet"]
        case = Case({"batch": 3, "height": 8, "width": 12}, 1.0)
        inputs = random_inputs(engine.network, pipe.dims, case, torch.Generator().manual_seed(3))
        together = engine.infer(**{**inputs, LORA_STRENGTH: strengths})["noise_pred"]
    inputs.pop(LORA_STRENGTH)
    for row, strength in enumerate(strengths.tolist()):
        with SmoothPipeline.from_pretrained(tiny_model, lora, strength, engine="eager") as fused:
            wanted = fused._engines["unet"].infer(**{name: one[row : row + 1] for name, one in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], wanted["noise_pred"], rtol=1e-3, atol=1e-4)


def test_a_strength_that_is_an_input_is_switched_at_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode="runtime") as pipe:
        engine = pipe._engines["unet"]
        monkeypatch.setattr(type(engine), "refit", None)
        monkeypatch.setattr(type(engine), "_open", None)
        first = images(pipe)
        pipe.set_lora_strength(0.2)
        assert not torch.equal(first, images(pipe))


def test_the_strength_is_no_part_of_the_bundle(bundle: Bundle, tiny_model: Path, lora: Path) -> None:
    assert bundle.source.lora is not None
    assert bundle.source.lora.strength is None
    for mode, strength in itertools.product(MODES, (0.1, 1.0)):
        again = ensure_engines(tiny_model, lora, strength, BACKENDS, lora_mode=mode)
        assert (again.reused, again.bundle.path) == (True, bundle.path)
    assert {built.variant.name for built in bundle.variants} == {f"{b}-fp32-{m}" for b in BACKENDS for m in MODES}
    for built in bundle.variants:
        record, replaced = built.engine("unet"), built.variant.lora_mode == "refit"
        assert set(record.places) == {f"unet.{path}.weight" for path in (ATTENTION, CONVOLUTION) if replaced}
        assert (f"{built.variant.name}/unet/lora.safetensors" in record.weights) == replaced
        assert not built.engine("vae_decoder").places
        # Other programs open the folder by this file, and feed no strength.
        assert (bundle.path / built.variant.name / "model_index.json").exists() == replaced


@pytest.mark.parametrize(
    ("engine", "mode"), [("onnxruntime", "refit"), ("onnxruntime", "runtime"), ("eager", "runtime")]
)
def test_a_pipeline_is_asked_for_it(bundle: Bundle, tiny_model: Path, lora: Path, engine: str, mode: str) -> None:
    options: Any = {"lora": lora, "lora_strength": 0.3, "lora_mode": mode}
    with SmoothPipeline.from_pretrained(tiny_model, engine=engine, **options) as pipe:
        assert engine == "eager" or (pipe.bundle is not None and pipe.bundle.path == bundle.path)
        assert (pipe.lora is not None) == (mode == "refit")
        first = images(pipe)
        pipe.set_lora_strength(2.0)
        assert not torch.equal(first, images(pipe))
        pipe.set_lora_strength(0.3)
        assert torch.equal(first, images(pipe))
    with pytest.raises(InputError, match="lora_mode=refit: eager cannot replace weights"):
        SmoothPipeline.from_pretrained(tiny_model, engine="eager", lora=lora, lora_mode="refit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; tests/gpu builds and refits such an engine")
def test_tensorrt_wants_the_gpu_before_anything_is_built(
    tiny_model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds the engines; pip install 'smooth-rt[tensorrt-rtx]'")
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    asked = ["build-engine", "--backend", "tensorrt-rtx", "--gpu-arch", "sm89", "--lora-mode", "refit"]
    assert cli.main([*asked, "--model", str(tiny_model), "--lora", str(lora)]) == 2
    said = capsys.readouterr().err
    assert "weights are made replaceable on the GPU alone" in said
    assert said.strip().count("\n") == 0


@pytest.mark.usefixtures("bundle")
def test_the_model_is_as_it_was(model: Model, tiny_model: Path, lora: Path) -> None:
    with SmoothPipeline.from_pretrained(model, lora, engine="eager", lora_mode="runtime") as pipe:
        images(pipe)
    before, after = load_model(tiny_model).unet.state_dict(), model.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_engines_are_proved_again(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engines", "verify", "--parity", "--json", str(bundle.path)]) == 0
    rows = json.loads(capsys.readouterr().out)["parity"]
    assert {row["engine"] for row in rows} == {built.variant.name for built in bundle.variants}
    assert all(row["relative error"] < 1e-4 for row in rows)
    # Of a graph that is rewritten, the plain one that others open, too.
    plain = [(row["network"], row["output"]) for row in rows if row["note"] is not None]
    assert plain
    assert set(plain) == {("unet", "noise_pred")}
    assert cli.main(["engines", "inspect", "--json", str(bundle.path)]) == 0
    assert json.loads(capsys.readouterr().out)["lora"].endswith("at any strength")


def test_gradients_at_a_strength(bundle: Bundle, tiny_model: Path, lora: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    latents, cotangent = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    found = []
    with (
        SmoothPipeline.from_engines(bundle, "onnxruntime", lora_strength=-0.5, lora_mode="runtime") as pipe,
        SmoothPipeline.from_pretrained(tiny_model, lora, -0.5, engine="eager") as fused,
    ):
        for one in (pipe, fused):
            embeds = one.encode_prompt("dog")
            found.append(one.vjp(latents, 500, embeds, ["sample"], cotangent)[1]["sample"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


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
    with pytest.raises(InputError, match="lora_mode='both' is unknown; it is one of fused, refit, runtime"):
        SmoothPipeline.from_engines(bundle, lora_mode="both")
    with pytest.raises(BundleError, match=r"not built for openvino in bf16 .*--precision bf16 --lora-mode runtime"):
        SmoothPipeline.from_engines(bundle, "openvino", precision="bf16", lora_mode="runtime")
    with pytest.raises(InputError, match="lora_mode=runtime: there is no LoRA"):
        SmoothPipeline.from_pretrained(tiny_model, engine="eager", lora_mode="runtime")
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode="refit") as pipe:
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
        (
            ["--backend", "onnxruntime", "--precision", "int8", "--lora-mode", "runtime"],
            "lora-mode=runtime: onnxruntime can take the strength as an input in fp32, fp16, not in int8; choose fused",
        ),
        (["--lora-mode", "merged"], "--lora-mode='merged' is unknown; it is one of fused, refit, runtime"),
    ]:
        arguments = ["build-engine", "--model", str(tiny_model), "--lora", str(lora), "--lora-mode", "refit", *options]
        assert cli.main([*arguments, "--output", str(tmp_path / "b")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("strength", "said"),
    [
        (
            torch.tensor([1e3]),
            r"unet: lora_strength holds 1000\.0, outside -100\.0\.\.100\.0; 1 is the LoRA as trained",
        ),
        (torch.tensor([float("nan")]), "unet: lora_strength holds nan, outside"),
        (torch.ones(1, dtype=torch.float64), "unet: lora_strength is float64, not float32"),
        (torch.ones(3), r"unet: lora_strength has shape \[3\], not \[batch\]; another input has batch=2"),
        (None, "unet: input 'lora_strength' is missing"),
    ],
)
def test_a_strength_that_is_none_for_the_network(bundle: Bundle, strength: torch.Tensor | None, said: str) -> None:
    with SmoothPipeline.from_engines(bundle, "onnxruntime", lora_mode="runtime") as pipe:
        engine = pipe._engines["unet"]
        case = Case({"batch": 2, "height": 8, "width": 8}, 1.0)
        inputs = random_inputs(engine.network, pipe.dims, case, torch.Generator().manual_seed(3))
        inputs.pop(LORA_STRENGTH)
        with pytest.raises(InputError, match=said):
            engine.infer(**inputs, **({} if strength is None else {LORA_STRENGTH: strength}))


def test_a_grouped_convolution_is_refused() -> None:
    from engines.runtime_lora import RuntimeUnet

    unet = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 4, 3, groups=2)})
    base, down, up = torch.ones(4, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(4, 1, 1, 1)
    lora = LoraWeights(*({"conv.weight": tensor} for tensor in (base, down, up)), {"conv.weight": 1.0})
    with pytest.raises(ModelError, match="conv: a convolution in 2 groups; build with --lora-mode fused"):
        RuntimeUnet(unet, lora)


def test_tensorrt_builds_it_without_a_gpu(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds the engine; pip install 'smooth-rt[tensorrt-rtx]'")
    from export.to_tensorrt import to_tensorrt

    network = bundle.find("onnxruntime", lora_mode="runtime").variant.network("unet", bundle.dims)
    bounds: Bounds = {"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16)}
    path = tmp_path / "model.engine"
    graph = bundle.path / "onnxruntime-fp32-runtime" / "unet" / "model.onnx"
    facts = to_tensorrt(graph, path, network, [bounds], backend="tensorrt-rtx", architecture="rtx")
    assert facts.bytes == path.stat().st_size


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
