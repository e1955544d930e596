"""Gradients are added to a bundle, compared and told of; refused where they are wrong or cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from engines.bundle import Bundle, digest_file
from engines.contract import NETWORKS, gradients_named, said_gradients
from engines.variant import Profile, Span
from smooth_rt import cli
from smooth_rt.build import ensure_engines
from smooth_rt.errors import ParityError
from smooth_rt.pipeline import SmoothPipeline

FOLDER = "onnxruntime-fp32"


def test_gradients_are_added_and_nothing_is_built_again(grown: Any) -> None:
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


def test_every_output_is_in_the_manifest(grown: Any) -> None:
    record = grown.built.bundle.variants[0].engine("unet_vjp_text")
    assert [parity.output for parity in record.parity] == ["noise_pred", "grad_encoder_hidden_states"]
    assert all(0 < parity.relative <= parity.tolerance == 1e-4 for parity in record.parity)
    assert record.bounds == [{"batch": (1, 1, None), "height": (2, 8, None), "width": (2, 8, None)}]


def test_a_bundle_with_gradients_serves_who_asks_for_none(grown: Any) -> None:
    assert ensure_engines(grown.model, backends=["onnxruntime"]).reused
    assert ensure_engines(grown.model, backends=["onnxruntime"], gradients=["text"]).reused


def test_profiles_of_gradients_are_images(grown: Any, pipe: SmoothPipeline) -> None:
    one = Profile(
        batch=Span(min=2, opt=2, max=2), height=Span(min=16, opt=16, max=16), width=Span(min=16, opt=16, max=16)
    )
    network = grown.built.bundle.variants[0].variant.network("unet_vjp_text", pipe.dims)
    assert one.bounds(network, pipe.dims) == [{"batch": (2, 2, 2), "height": (8, 8, 8), "width": (8, 8, 8)}]


def test_list_inspect_and_verify_tell_of_them(grown: Any, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_damaged_gradient_is_refused(grown: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_wrong_gradient_is_not_published(grown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_tensorrt_builds_the_graph_without_a_gpu(grown: Any, tmp_path: Path) -> None:
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
    assert names == ("unet_up_blocks_2", "unet_vjp_text", "unet_up_blocks_2_vjp")  # of a Stable Diffusion's four
    assert said_gradients(names) == ["text", "features:up_blocks.2"]
    assert gradients_named(said_gradients(names)) == names
    both = gradients_named(["features", "features:up_blocks.2"], blocks=3)
    assert both == ("unet_up_blocks_1", "unet_up_blocks_2", "unet_up_blocks_1_vjp", "unet_up_blocks_2_vjp")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gradients", "latents"], "gradients=latents: unknown; choose from text, sample, both"),
        (
            ["--gradients", "features:up_blocks.2"],
            "gradients=features:up_blocks.2: unknown; choose from text, sample, both, features:up_blocks.0, "
            "features:up_blocks.1, features",
        ),
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
