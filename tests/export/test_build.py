"""Building a bundle: what it holds, and that a build that fails leaves nothing and keeps what was there."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openvino
import pytest
import torch
from torch import nn

from engines.base import Engine
from engines.bundle import Bundle
from engines.contract import NETWORKS, Dims, NetworkName, contract
from engines.errors import BundleError, EngineError, InputError, ParityError, SmoothRTError
from engines.manifest import Source, digest_file
from engines.ort import OrtEngine
from engines.select import architecture, backend_version, open_engine
from engines.variant import Order
from export import build, reference
from export.build import build_bundle

Networks = dict[NetworkName, nn.Module]
Build = Callable[..., Bundle]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def no_config(folder: Path) -> None:
    assert folder.is_dir()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type, str]]:
    """Passes verification over, where a test is about something else; lists the engines it was given."""
    given: list[tuple[type, str]] = []

    def note(engine: Engine, *_: Any) -> list[Any]:
        assert not engine.closed
        given.append((type(engine), engine.network.name))
        return []

    monkeypatch.setattr(reference, "verify", note)
    return given


@pytest.fixture
def run(networks: Networks, dims: Dims, built: Any, target: Path, order: Callable[..., Order]) -> Build:
    """Builds the tiny model at `target`, for onnxruntime unless told otherwise."""

    def build_here(
        networks: Networks = networks,
        backends: Sequence[str] = ("onnxruntime",),
        precision: str = "fp32",
        write_config: Callable[[Path], None] = no_config,
        **options: Any,
    ) -> Bundle:
        source: Source = built.bundle.source
        orders = [order(backend, precision) for backend in backends]
        return build_bundle(networks, dims, source, orders, target, write_config, **options)

    return build_here


@pytest.fixture
def previous(built: Any, target: Path) -> dict[str, str]:
    """A bundle that stands at the target already, by file and digest."""
    shutil.copytree(built.bundle.path, target)
    return content(target)


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in folder.rglob("*") if p.is_file()}


def test_the_manifest_proves_every_output_of_every_network(built: Any, dims: Dims) -> None:
    bundle = Bundle.open(built.bundle.path)
    assert bundle.backends == ("onnxruntime", "openvino")
    assert bundle.dims == dims
    for name in NETWORKS:
        for backend in bundle.backends:
            variant = bundle.find(backend)
            record = variant.engine(name)
            assert [p.output for p in record.parity] == [spec.name for spec in contract(name, dims).outputs]
            assert all(0 < p.relative <= p.tolerance == 1e-4 and p.max_abs > 0 for p in record.parity)
            assert {p.cases for p in record.parity} == {4 if name == "unet" else 3}
            assert record.key == variant.expected_key(record, bundle.source, dims)
            assert variant.backend_version == backend_version(backend)
            assert variant.variant.architecture == architecture()
            assert record.hint == ("f32" if backend == "openvino" else None)
            assert record.weights


def test_the_bundle_holds_what_it_lists_and_nothing_else(built: Any) -> None:
    listed = {file.path: file.sha256 for file in built.bundle.manifest.files}
    found = content(built.bundle.path)
    del found["manifest.json"]
    assert found == listed
    assert "config/model.json" in listed
    parts = ("onnxruntime-fp32/unet/model.onnx", "openvino-fp32/unet/openvino_model")
    assert {parts[0], f"{parts[0]}.data", f"{parts[1]}.xml", f"{parts[1]}.bin"} <= set(listed)


def test_weights_are_whole_fp32_on_both_backends(built: Any, networks: Networks) -> None:
    weights = sum(p.numel() * 4 for p in networks["unet"].parameters())
    # The ONNX graph keeps its smallest tensors to itself; in fp16 the files would be half as large.
    onnx = "onnxruntime-fp32/unet/model.onnx"
    for paths in ((onnx, f"{onnx}.data"), ("openvino-fp32/unet/openvino_model.bin",)):
        assert sum((built.bundle.path / path).stat().st_size for path in paths) >= weights


def test_progress_counts_to_the_end(built: Any) -> None:
    names, done, totals = zip(*built.steps, strict=True)
    assert len(set(totals)) == 1
    assert all(before < after for before, after in itertools.pairwise(done))
    assert (done[0], done[-1]) == (0, totals[0])
    assert names[0] == "configuration"
    assert names[-1] == "done"
    assert {"unet: export", "unet: verify openvino-fp32"} <= set(names)
    # The layers tell what is a long step.
    (convert,) = (name for name in names if name.startswith("unet: convert to openvino-fp32"))
    assert re.fullmatch(r".* \([0-9]{3} layers\)", convert)


def test_the_plain_graph_that_others_open_is_compared_too(built: Any) -> None:
    records = built.bundle.find("onnxruntime").engines
    rewritten = [record for record in records if not record.file.endswith("/model.onnx")]
    assert "unet" in [record.network for record in rewritten]
    for record in records:
        noted = record.notes.get("plain_graph", [])
        assert isinstance(noted, list)
        outputs = [said.split() for said in noted]
        assert [name for name, _ in outputs] == ([p.output for p in record.parity] if record in rewritten else [])
        assert all(0 < float(error) <= 1e-4 for _, error in outputs)


def test_a_plain_graph_that_is_wrong_is_not_published(
    ready_made: list[str], run: Build, monkeypatch: pytest.MonkeyPatch, target: Path
) -> None:
    opened: list[str] = []

    def open_altered(backend: str, network: Any, path: Path, *rest: Any) -> Engine:
        engine = open_engine(backend, network, path, *rest)
        opened.append(f"{network.name}/{path.name}")
        if opened[-1] == "unet/model.onnx":
            infer = engine.infer_impl
            monkeypatch.setattr(
                engine, "infer_impl", lambda *given: {name: 1.01 * one for name, one in infer(*given).items()}
            )
        return engine

    for opens in (build, reference):
        monkeypatch.setattr(opens, "open_engine", open_altered)
    with pytest.raises(ParityError, match="unet: onnxruntime's noise_pred differs"):
        run()
    assert opened[-2:] == ["unet/onnxruntime.onnx", "unet/model.onnx"]
    assert ready_made == ["text_encoder", "unet"]
    assert list(target.parent.iterdir()) == []


@pytest.mark.usefixtures("unverified")
def test_openvino_alone_leaves_no_onnx(ready_made: list[str], run: Build, target: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    bundle = run(backends=["openvino"], progress=lambda *step: steps.append(step))
    assert ready_made == list(NETWORKS)
    assert bundle.backends == ("openvino",)
    assert sorted(p.name for p in target.iterdir()) == ["config", "manifest.json", "openvino-fp32"]
    assert steps[-1] == ("done", steps[-1][2], steps[-1][2])
    Bundle.open(target)


def test_a_graph_over_its_tolerance_is_not_published(
    ready_made: list[str], run: Build, networks: Networks, target: Path, previous: dict[str, str]
) -> None:
    other = copy.deepcopy(networks["text_encoder"])
    with torch.no_grad():
        next(p for key, p in other.named_parameters() if "final_layer_norm.weight" in key).mul_(1.01)
    with pytest.raises(ParityError, match="text_encoder: onnxruntime's last_hidden_state differs"):
        run(networks={**networks, "text_encoder": other})
    assert ready_made == ["text_encoder"]
    assert content(target) == previous
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("ready_made", "unverified")
@pytest.mark.parametrize("at", ["configuration", "unet: export", "vae_decoder: verify onnxruntime-fp32", "manifest"])
def test_ctrl_c_leaves_nothing_and_keeps_the_previous_bundle(
    run: Build, target: Path, previous: dict[str, str], at: str
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == at:
            assert len(list(target.parent.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert content(target) == previous
    assert list(target.parent.iterdir()) == [target]


def test_ctrl_c_without_a_previous_bundle(run: Build, target: Path) -> None:
    def interrupt(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(write_config=interrupt)
    assert list(target.parent.iterdir()) == []


def full(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.usefixtures("every_export")
def test_a_disk_that_fills_while_the_weights_are_written(
    monkeypatch: pytest.MonkeyPatch, run: Build, target: Path, previous: dict[str, str]
) -> None:
    def save(program: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise full(path)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    with pytest.raises(BundleError, match=r"bundle: the disk is full \(.* free\); this needs .* in all") as caught:
        run()
    assert "\n" not in str(caught.value)
    assert content(target) == previous
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("ready_made")
def test_a_disk_that_fills_under_openvino(monkeypatch: pytest.MonkeyPatch, run: Build, target: Path) -> None:
    def save(model: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30, 0))
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", save)
    with pytest.raises(BundleError, match=r"bundle: the disk is full \(0\.0 MiB free\)"):
        run(backends=["openvino"])
    assert list(target.parent.iterdir()) == []


@pytest.mark.usefixtures("ready_made", "unverified")
def test_a_disk_that_fills_at_the_manifest(monkeypatch: pytest.MonkeyPatch, run: Build, target: Path) -> None:
    write_text: Callable[..., int] = Path.write_text

    def write(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[: len(text) // 2], **options)
        raise full(path)

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(BundleError, match="the disk is full"):
        run()
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_is_too_small_from_the_start(
    monkeypatch: pytest.MonkeyPatch, ready_made: list[str], run: Build, networks: Networks, target: Path
) -> None:
    weights = sum(p.numel() * 4 for name in ("text_encoder", "unet") for p in networks[name].parameters())  # type: ignore[index]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 0, 2 * weights - 1))
    with pytest.raises(BundleError, match=r"needs .* of disk and .* are free"):
        run(backends=["openvino"])
    assert ready_made == []
    assert list(target.parent.iterdir()) == []


class Branching(nn.Module):
    """Cannot be traced: its path depends on its numbers."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (input_ids.float() if input_ids.sum() > 3 else -input_ids.float(),)


def test_a_module_that_cannot_be_exported(run: Build, networks: Networks, target: Path) -> None:
    with pytest.raises(EngineError, match="text_encoder: export to ONNX failed: ") as caught:
        run(networks={**networks, "text_encoder": Branching()})
    assert "\n" not in str(caught.value)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"backends": []}, InputError, "backends: none given"),
        ({"backends": ["eager"]}, InputError, "eager runs the torch modules"),
        ({"backends": ["onnxruntime", "onnxruntime"]}, InputError, "a variant is named twice"),
        ({"backends": ["onnxruntime", "cuda"]}, EngineError, "'cuda': unknown"),
        ({"precision": "bf16"}, InputError, "onnxruntime is built in fp32, fp16, int8; that is what openvino"),
        ({"precision": "int8"}, InputError, "needs real runs of the model"),
        ({"networks": {}}, InputError, "a bundle holds text_encoder, unet"),
    ],
)
def test_what_cannot_be_asked_for(
    ready_made: list[str], run: Build, target: Path, options: Any, error: type[SmoothRTError], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(**options)
    assert ready_made == []
    assert not target.exists()


def test_without_nncf_nothing_is_begun(
    ready_made: list[str], run: Build, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EngineError, match="NNCF is not installed"):
        run(precision="int8")
    assert ready_made == []


def test_weights_in_another_dtype(run: Build, networks: Networks, target: Path) -> None:
    halved = copy.deepcopy(networks["unet"]).half()
    with pytest.raises(InputError, match=r"unet: .* is torch\.float16 on cpu; load it in float32 on the CPU"):
        run(networks={**networks, "unet": halved})
    assert not target.exists()


@pytest.mark.usefixtures("ready_made")
def test_verification_is_given_the_engines_that_users_run(
    unverified: list[tuple[type, str]], run: Build, target: Path
) -> None:
    run()
    # Of what is rewritten, the plain graph follows.
    assert list(dict.fromkeys(unverified)) == [(OrtEngine, name) for name in NETWORKS]
    bundle = Bundle.open(target)
    assert bundle.backends == ("onnxruntime",)
    with bundle.open_network("text_encoder", bundle.variants[0], proved=False) as engine:
        assert type(engine) is OrtEngine
