"""What a bundle refuses to open or run, each in one line that names the file and the command that mends it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import kernels, select
from engines.bundle import Bundle, key_parts
from engines.command import build_command
from engines.contract import NETWORKS, Dims
from engines.errors import BundleError, EngineError
from engines.manifest import LoraSource, Source, digest_json
from engines.recipes import build_revision
from engines.variant import Profile, Span, Variant

Edit = Callable[[Callable[[dict[str, Any]], None]], None]


def refusal(folder: Path, said: str, verify: bool = True) -> str:
    """The message with which opening fails; it holds `said`, is one line, and names the command that mends it."""
    with pytest.raises(BundleError, match=re.escape(said)) as caught:
        Bundle.open(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert "`smooth-rt build-engine" in message
    assert str(folder) in message
    return message


def test_a_whole_bundle_opens_and_runs(bundle_folder: Path, module: Any, dims: Dims) -> None:
    bundle = Bundle.open(bundle_folder)
    assert bundle.dims == dims
    assert bundle.backends == ("onnxruntime",)
    assert bundle.stale(bundle.find("onnxruntime")) is None
    sample = torch.randn(2, dims.image_channels, 8, 12)
    with bundle.engine("vae_encoder", "onnxruntime") as engine:
        torch.testing.assert_close(engine.infer(sample=sample)["latent_mean"], module(sample)[0].detach())


def test_every_byte_of_every_file_counts(bundle_folder: Path) -> None:
    files = [p for p in sorted(bundle_folder.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    assert len(files) == 9
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        message = refusal(bundle_folder, f"{file}: its sha256 is not the manifest's")
        assert "--model some/model --lora some/lora --lora-strength 0.5 --backend onnxruntime" in message
        Bundle.open(bundle_folder, verify=False)
        file.write_bytes(whole)
    Bundle.open(bundle_folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_of_another_length_or_none(bundle_folder: Path, verify: bool) -> None:
    file = bundle_folder / "onnxruntime-fp32" / "unet" / "model.onnx.data"
    with file.open("ab") as stream:
        stream.write(b"x")
    refusal(bundle_folder, f"{file}: 257 bytes instead of 256", verify)
    file.unlink()
    refusal(bundle_folder, f"{file}: missing", verify)
    file.mkdir()
    refusal(bundle_folder, f"{file}: missing", verify)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "no such bundle folder")
    refusal(tmp_path, "manifest.json: missing")
    (tmp_path / "manifest.json").mkdir()
    refusal(tmp_path, "manifest.json: not a file")
    (tmp_path / "manifest.json").rmdir()
    os.mkfifo(tmp_path / "manifest.json")  # reading it would never end
    refusal(tmp_path, "manifest.json: not a file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe garbage", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a bundle's manifest"),
        (b'{"name": "a web extension"}', "not a bundle's manifest"),
        (b'{"format": true}', "not a bundle's manifest"),
        (b'{"format": 999}', "bundle format 999, this version reads format 4"),
        (b'{"format": 4}', "Field required"),
    ],
)
def test_a_manifest_that_is_none(bundle_folder: Path, content: bytes, said: str) -> None:
    (bundle_folder / "manifest.json").write_bytes(content)
    refusal(bundle_folder, said)


@pytest.mark.parametrize("missing", ["dims", "source", "variants", "files"])
def test_a_manifest_without_one_of_its_parts(bundle_folder: Path, missing: str) -> None:
    path = bundle_folder / "manifest.json"
    content = json.loads(path.read_text())
    del content[missing]
    path.write_text(json.dumps(content))
    refusal(bundle_folder, f"{missing}: Field required")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "onnxruntime-fp32/../../secret", "C:\\x", "a\\..\\b", "", ".", "a//b"]
)
def test_file_names_that_lead_out(bundle_folder: Path, edit_manifest: Edit, name: str) -> None:
    (bundle_folder.parent / "secret").write_bytes(b"secret")
    edit_manifest(lambda content: content["files"][0].update(path=name))
    refusal(bundle_folder, "is not a plain path inside the bundle")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_graph_that_leads_out(bundle_folder: Path, edit_manifest: Edit, name: str) -> None:
    edit_manifest(lambda content: content["variants"][0]["engines"][0].update(file=name))
    refusal(bundle_folder, "is not a plain path inside the bundle")


def test_a_link_that_leads_out(bundle_folder: Path) -> None:
    file = bundle_folder / "config" / "model.json"
    elsewhere = bundle_folder.parent / "model.json"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)
    refusal(bundle_folder, f"{file}: leads out of the bundle")


def test_a_graph_that_is_not_among_the_files(bundle_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda content: content["variants"][0]["engines"][1].update(file="x/other.onnx"))
    refusal(bundle_folder, "x/other.onnx is not among the files with the same digest")


@pytest.mark.parametrize(
    "change",
    [
        {"engines": {"hint": "bf16"}},
        {"engines": {"precision": "fp16"}},
        {"engines": {"key": "0"}},
        {"backend_version": "0"},
        {"build_revision": 1},
        {"variant": {"architecture": "cpu-z80"}},
        {"variant": {"precision": "fp16"}},
    ],
    ids=str,
)
def test_a_record_whose_key_does_not_follow(bundle_folder: Path, change: dict[str, Any]) -> None:
    path = bundle_folder / "manifest.json"
    content = json.loads(path.read_text())
    built = content["variants"][0]
    for name, value in change.items():
        if isinstance(value, dict):
            (built[name][2] if name == "engines" else built[name]).update(value)
        else:
            built[name] = value
    path.write_text(json.dumps(content))
    refusal(bundle_folder, "the key does not follow from the record")


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_numbers_that_are_none(bundle_folder: Path, value: str) -> None:
    path = bundle_folder / "manifest.json"
    path.write_text(path.read_text().replace('"strength":0.5', f'"strength":{value}'))
    refusal(bundle_folder, "strength")


def test_another_version_of_the_backend(bundle_folder: Path, edit_manifest: Edit) -> None:
    def older(content: dict[str, Any]) -> None:
        content["variants"][0]["backend_version"] = "1.0.0"

    edit_manifest(older)
    bundle = Bundle.open(bundle_folder)
    installed = select.backend_version("onnxruntime")
    with pytest.raises(
        BundleError, match=rf"built by onnxruntime 1\.0\.0, installed is {installed}; rebuild"
    ) as caught:
        bundle.engine("unet", "onnxruntime")
    assert "`smooth-rt build-engine --model some/model" in str(caught.value)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "inductor"])
def test_engines_that_were_built_with_tf32_are_stale(
    backend: str, bundle_folder: Path, edit_manifest: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of before the count of revisions, whose fp32 may be TF32."""
    monkeypatch.setattr("engines.bundle.backend_version", lambda _: select.backend_version("onnxruntime"))

    def built(revision: int) -> Bundle:
        def change(content: dict[str, Any]) -> None:
            content["variants"][0]["variant"] |= {"backend": backend}
            content["variants"][0]["build_revision"] = revision

        edit_manifest(change)
        return Bundle.open(bundle_folder)

    old = built(0)
    said = old.stale(old.variants[0], elsewhere=True)
    assert "was built with other settings" in str(said)
    assert f"--backend {backend} " in str(said)
    fresh = built(build_revision(old.variants[0].variant))
    assert fresh.stale(fresh.variants[0], elsewhere=True) is None
    keys = {bundle.variants[0].engine("unet").key for bundle in (old, fresh)}
    assert len(keys) == 2


def test_engines_with_an_earlier_revision_of_the_native_kernels_are_stale(
    bundle_folder: Path, edit_manifest: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_native(content: dict[str, Any]) -> None:
        content["variants"][0]["variant"] |= {"backend": "openvino", "kernels": "native"}
        content["variants"][0] |= {"build_revision": kernels.REVISION}

    monkeypatch.setattr("engines.bundle.backend_version", lambda _: select.backend_version("onnxruntime"))
    plain = Bundle.open(bundle_folder).variants[0].variant
    edit_manifest(as_native)
    bundle = Bundle.open(bundle_folder)
    assert bundle.stale(bundle.variants[0]) is None
    monkeypatch.setattr(kernels, "REVISION", kernels.REVISION + 1)
    with pytest.raises(BundleError, match=r"was built with other kernels of this project.* --kernels native"):
        bundle.open_network("unet", bundle.variants[0])
    assert build_revision(plain) == 0  # what has none of them stays valid


def test_another_architecture(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(BundleError, match=r"was built for .*, this is cpu-riscv64; rebuild"):
        Bundle.open(bundle_folder).engine("unet", "onnxruntime")


def test_backends_whose_engines_are_all_for_other_gpus(
    bundle_folder: Path, edit_manifest: Edit, monkeypatch: Any
) -> None:
    def on_gpu(content: dict[str, Any]) -> None:
        built = content["variants"][0]
        for backend, gpu_arch in (("tensorrt-rtx", "sm80"), ("tensorrt-rtx", "sm89"), ("onnxruntime-cuda", "cuda")):
            content["variants"].append(copy.deepcopy(built))
            content["variants"][-1]["variant"] |= {"backend": backend, "architecture": gpu_arch}

    edit_manifest(on_gpu)
    monkeypatch.setattr(select, "gpu", lambda: "sm86")
    assert Bundle.open(bundle_folder, verify=False).unfit == {"tensorrt-rtx": "this is sm86"}
    monkeypatch.setattr(select, "gpu", lambda: "sm89")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")  # the processor's are built anew, by the command
    assert Bundle.open(bundle_folder, verify=False).unfit == {}


def test_a_backend_that_is_not_in_the_bundle(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    with pytest.raises(BundleError, match=r"not built for openvino .*there is onnxruntime-fp32.* --backend openvino"):
        bundle.engine("unet", "openvino")
    with pytest.raises(EngineError, match="'gpu': unknown"):
        bundle.engine("unet", "gpu")


def test_a_graph_that_cannot_be_opened_is_rebuilt_by_a_command(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    (bundle_folder / bundle.variants[0].engine("unet").file).write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"cannot open it .*; rebuild it with `smooth-rt build-engine .*--output "):
        bundle.engine("unet", "onnxruntime")


def test_a_graph_that_is_opened_at_its_first_call_is_rebuilt_by_a_command(
    bundle_folder: Path, dims: Dims, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundle_folder)

    def broken(*_: Any) -> Any:
        raise EngineError("model.onnx: cannot be read; rebuild")

    with bundle.engine("vae_encoder", "onnxruntime") as engine:
        monkeypatch.setattr(engine, "infer_impl", broken)
        with pytest.raises(EngineError, match=r"; rebuild it with `smooth-rt build-engine .*--output .*`$"):
            engine.infer(sample=torch.zeros(1, dims.image_channels, 8, 8))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_files_that_others_took_the_place_of_are_noticed(bundle_folder: Path, name: str, dims: Dims) -> None:
    """Before a network is opened, and whenever an open one reads its files again. The same content may come."""
    bundle = Bundle.open(bundle_folder)
    file = bundle_folder / "onnxruntime-fp32" / "vae_encoder" / name
    content = file.read_bytes()

    def replace(others: bytes) -> None:
        (bundle_folder / "fresh").write_bytes(others)
        (bundle_folder / "fresh").replace(file)

    sample = torch.zeros(1, dims.image_channels, 8, 8)
    with bundle.engine("vae_encoder", "onnxruntime") as engine:
        replace(content)
        engine.refit_impl({})  # which opens the graph again
        engine.infer(sample=sample)
        replace(content + b"\x32\x01x")  # to a graph a doc_string
        said = re.escape(f"{file}: was replaced or removed since the bundle was opened; open it again")
        with pytest.raises(EngineError, match=said):
            engine.refit_impl({})
        with pytest.raises(EngineError, match=said):
            bundle.engine("vae_encoder", "onnxruntime")


def test_a_manifest_that_was_written_anew_is_read_again(bundle_folder: Path, edit_manifest: Edit) -> None:
    bundle = Bundle.open(bundle_folder)
    edit_manifest(lambda manifest: manifest["variants"][0].update(seconds=7.0))
    bundle.reload()
    assert bundle.variants[0].seconds == 7.0
    edit_manifest(lambda manifest: manifest["source"]["digests"].update(unet="9" * 64))
    with pytest.raises(BundleError):  # the keys no longer follow
        bundle.reload()


def test_places_that_were_changed_are_noticed(bundle_folder: Path, edit_manifest: Edit) -> None:
    places = {name: {"name": f"constant_{name}", "transposed": False} for name in "ab"}
    edit_manifest(lambda content: content["variants"][0]["engines"][1].update(places=places))
    Bundle.open(bundle_folder)
    path = bundle_folder / "manifest.json"
    whole = path.read_text()
    for changed in (
        {"a": places["b"], "b": places["a"]},
        {**places, "a": {**places["a"], "transposed": True}},
        {"a": places["a"]},
        {**places, "c": places["a"]},
        {},
    ):
        content = json.loads(whole)
        content["variants"][0]["engines"][1]["places"] = changed
        path.write_text(json.dumps(content))
        refusal(bundle_folder, "the key does not follow from the record")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"relative": 3.5}, "differs from torch's by 3.5, tolerance 0.0001"),
        ({"relative": 3.5, "tolerance": 4.0}, "differs from torch's by 3.5, tolerance 4"),
        ({"tolerance": -1.0}, "tolerance -1"),
        ({"cases": 0}, "in 0 cases"),
        ({"output": "x"}, "its parity is not of its outputs"),
    ],
)
def test_errors_that_no_build_lets_pass(
    bundle_folder: Path, edit_manifest: Edit, changed: dict[str, Any], said: str
) -> None:
    edit_manifest(lambda content: content["variants"][0]["engines"][0]["parity"][0].update(changed))
    refusal(bundle_folder, said)


def test_configuration_that_the_manifest_does_not_list(bundle_folder: Path, edit_manifest: Edit) -> None:
    def drop(content: dict[str, Any]) -> None:
        content["files"] = [file for file in content["files"] if not file["path"].startswith("config/")]

    edit_manifest(drop)
    refusal(bundle_folder, f"{bundle_folder / 'config' / 'model.json'}: not among the manifest's files", verify=False)


@pytest.mark.parametrize("model", ["", "a\0b"])
def test_a_source_without_a_model_names_the_manifest(bundle_folder: Path, model: str) -> None:
    path = bundle_folder / "manifest.json"
    content = json.loads(path.read_text())
    content["source"]["model"] = model
    path.write_text(json.dumps(content))
    refusal(bundle_folder, "names no model")


def test_what_is_no_folder_is_not_told_to_be_built(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / ".bundle.partial-1").mkdir()
    for name, said in (("file", "not a folder"), (".bundle.partial-1", f"open {tmp_path / 'bundle'}")):
        with pytest.raises(BundleError, match=re.escape(said)) as caught:
            Bundle.open(tmp_path / name)
        assert "build-engine" not in str(caught.value)


def test_convolutions_that_are_not_in_the_bundle(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    side = bundle.dims.sample_size * bundle.dims.vae_factor
    sizes = f"--batch 1 --height {side} --width {side}"
    with pytest.raises(BundleError, match=rf"with winograd convolutions .*--convolution winograd .*{sizes} --output"):
        bundle.find("openvino", convolution="winograd")
    said = r"with winograd convolutions and native kernels .*--convolution winograd --kernels native "
    with pytest.raises(BundleError, match=said):
        bundle.find("openvino", convolution="winograd", kernels="native")
    with pytest.raises(BundleError, match=r"; nor can it be: convolution=winograd: openvino has it, in fp32, not onn"):
        bundle.find("onnxruntime", convolution="winograd")


def test_of_two_kinds_of_kernels_the_backends_are_found_unless_others_are_named(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    (plain,) = bundle.variants
    native = plain.model_copy(update={"variant": plain.variant.model_copy(update={"kernels": "native"})})
    with pytest.raises(BundleError, match=r"not built for openvino with native kernels .*--kernels native "):
        bundle.find("openvino", kernels="native")
    with pytest.raises(BundleError, match=r"nor can it be: kernels=native: openvino has them, not onnxruntime"):
        bundle.find("onnxruntime", kernels="native")
    bundle.manifest = bundle.manifest.model_copy(update={"variants": [native, plain]})
    assert bundle.find("onnxruntime") == bundle.find("onnxruntime", kernels="backend") == plain
    assert bundle.find("onnxruntime", kernels="native") == native
    bundle.manifest = bundle.manifest.model_copy(update={"variants": [native]})
    assert bundle.find("onnxruntime") == native
    with pytest.raises(BundleError, match="not built for onnxruntime with backend kernels"):
        bundle.find("onnxruntime", kernels="backend")


def test_a_precision_that_is_not_in_the_bundle(bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match=r"not built for onnxruntime in int8 .*--precision int8"):
        Bundle.open(bundle_folder).engine("unet", "onnxruntime", "int8")


def test_a_variant_has_all_networks(bundle_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda content: content["variants"][0]["engines"].pop())
    refusal(bundle_folder, "its engines are not text_encoder, unet, vae_encoder, vae_decoder")


def test_bounds_follow_from_the_profiles(bundle_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda content: content["variants"][0]["engines"][1]["bounds"][0].update(batch=[1, 2, 8]))
    refusal(bundle_folder, "unet: its bounds do not follow from the profiles")


def test_misfit_says_what_differs(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    own = bundle.source
    assert own.lora is not None
    variant = bundle.variants[0].variant
    assert bundle.misfit(own, variant) is None
    renamed = own.model_copy(update={"model": "elsewhere", "revision": None})
    assert bundle.misfit(renamed, variant, bundle.variants[0].profiles) is None
    for change, said in [
        ({"digests": {**own.digests, "unet": "f" * 64}}, "unet is another one"),
        ({"digests": {**own.digests, "scheduler": "f" * 64}}, "scheduler is another one"),
        ({"lora": None}, "the LoRA or its strength"),
        ({"lora": own.lora.model_copy(update={"strength": 0.25})}, "the LoRA or its strength"),
    ]:
        assert said in str(bundle.misfit(own.model_copy(update=change)))
    for change in ({"backend": "openvino"}, {"precision": "fp16"}, {"architecture": "sm89"}):
        other = variant.model_copy(update=change)
        assert f"{other.name} is not built" in str(bundle.misfit(own, other))
    one = Span(min=1, opt=1, max=1)
    profile = Profile(batch=one, height=Span(min=16, opt=16, max=16), width=Span(min=16, opt=16, max=16))
    assert "is not built for batch 1, height 16, width 16" in str(bundle.misfit(own, variant, [profile]))


DIMS = Dims(7, 16, 50, 4, 3, 2, 2, 8)
VARIANT = Variant(backend="openvino", precision="fp32", lora_mode="fused", architecture="cpu-x86_64")
BASE: dict[str, Any] = {
    "dims": DIMS,
    "graph": "g",
    "weights": {"a.data": "w"},
    "source": Source(model="m", digests={"unet": "u"}, lora=LoraSource(source="l", digest="d", strength=1.0)),
    "variant": VARIANT,
    "bounds": [{"batch": (1, 1, None)}],
    "precision": "fp32",
    "hint": "f32",
    "backend_version": "1",
}


@pytest.mark.parametrize(
    "change",
    [
        {"dims": replace(DIMS, tokens=8)},
        {"graph": "h"},
        {"weights": {"a.data": "x"}},
        {"source": Source(model="m", digests={"unet": "v"}, lora=BASE["source"].lora)},
        {"source": Source(model="m", digests={"unet": "u"})},
        {"source": Source(model="m", digests={"unet": "u"}, lora=LoraSource(source="l", digest="e", strength=1.0))},
        {"source": Source(model="m", digests={"unet": "u"}, lora=LoraSource(source="l", digest="d", strength=0.9))},
        {"precision": "fp16"},
        {"hint": "bf16"},
        {"hint": None},
        {"bounds": [{"batch": (1, 1, 8)}]},
        {"bounds": [{"batch": (1, 2, None)}]},
        {"backend_version": "2"},
        {"build_revision": 1},
        {"places": {"a": {"name": "b", "transposed": False}}},
        {"variant": VARIANT.model_copy(update={"backend": "onnxruntime"})},
        {"variant": VARIANT.model_copy(update={"precision": "int8"})},
        {"variant": VARIANT.model_copy(update={"lora_mode": "runtime"})},
        {"variant": VARIANT.model_copy(update={"architecture": "cpu-aarch64"})},
        {"variant": VARIANT.model_copy(update={"convolution": "winograd"})},
        {"variant": VARIANT.model_copy(update={"kernels": "native"})},
    ],
)
def test_all_that_can_change_the_numbers_changes_the_key(change: dict[str, Any]) -> None:
    assert digest_json(key_parts(**{**BASE, **change})) != digest_json(key_parts(**BASE))


def test_what_nobody_asked_for_leaves_older_keys_as_they_are() -> None:
    assert set(key_parts(**BASE)["variant"]) == {"backend", "precision", "lora_mode", "architecture"}
    assert "build_revision" not in key_parts(**BASE)
    assert "places" not in key_parts(**BASE, places={})
    for variant in (VARIANT, VARIANT.model_copy(update={"convolution": "winograd", "kernels": "native"})):
        assert Variant(**variant.model_dump()) == variant


def test_names_and_places_do_not_change_the_key() -> None:
    moved = Source(model="n", revision="r", digests={"unet": "u"}, lora=BASE["source"].lora)
    assert key_parts(**{**BASE, "source": moved, "weights": {"b.data": "w"}}) == key_parts(**BASE)


def test_a_manifest_without_variants_is_no_bundle(bundle_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda content: content.update(variants=[]))
    with pytest.raises(BundleError, match="no variant is listed"):
        Bundle.open(bundle_folder)


def test_sizes_that_were_changed_are_noticed(bundle_folder: Path) -> None:
    path = bundle_folder / "manifest.json"
    content = json.loads(path.read_text())
    content["dims"]["tokens"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="the key does not follow"):
        Bundle.open(bundle_folder)


def test_a_link_to_itself_is_named(bundle_folder: Path) -> None:
    graph = bundle_folder / "onnxruntime-fp32" / "unet" / "model.onnx"
    graph.unlink()
    graph.symlink_to(graph)
    with pytest.raises(BundleError, match=r"model\.onnx: .*rebuild it with"):
        Bundle.open(bundle_folder)


def test_digest_json_ignores_order_and_refuses_nan() -> None:
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_json({"a": float("nan")})


def test_the_bundles_networks_are_the_contracts(bundle_folder: Path) -> None:
    assert [record.network for record in Bundle.open(bundle_folder).variants[0].engines] == list(NETWORKS)


@pytest.mark.parametrize("lora", [None, LoraSource(source="some/lora", digest="2" * 64, strength=0.5)])
def test_the_mending_command_names_the_lora(bundle_folder: Path, lora: LoraSource | None) -> None:
    source = Bundle.open(bundle_folder).source.model_copy(update={"model": "default", "lora": lora})
    # Without --lora, the command would add the shipped one to the default model.
    wanted = "--lora none" if lora is None else "--lora some/lora --lora-strength 0.5"
    assert build_command(None, source) == f"smooth-rt build-engine --model default {wanted}"
