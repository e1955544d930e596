"""Relative paths stay valid after the current folder has changed."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Generator

from engines.bundle import Bundle
from smooth_rt import cli
from smooth_rt.build import Built, ensure_engines
from smooth_rt.cache import find
from smooth_rt.errors import ModelError
from smooth_rt.lora import read_lora
from smooth_rt.model import load_model
from smooth_rt.opening import reopen_model
from smooth_rt.pipeline import SmoothPipeline

ELSEWHERE = "/"


@pytest.fixture(scope="module")
def home(tiny_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `models/m`, a LoRA `l.safetensors` and a link `latest` to the model."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_model, folder / "models" / "m")
    shutil.copyfile(lora, folder / "l.safetensors")
    (folder / "latest").symlink_to("models/m")
    return folder


@pytest.fixture(scope="module")
def built(home: Path) -> Iterator[Built]:
    """A bundle `b` of them, all named by relative paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        made = ensure_engines("models/m", "l.safetensors", backends=["openvino"], output="b")
        patch.chdir(ELSEWHERE)
        yield made


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Path:
    """A copy of the bundle, whose manifest may be changed."""
    return Path(shutil.copytree(built.bundle.path, tmp_path / "copied"))


def edit(bundle: Path, **source: Any) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["source"] |= source
    path.write_text(json.dumps(content))


def as_written_before(bundle: Path, model: str) -> None:
    """Make the manifest one of a version that recorded what was typed alone."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("model_path", "config_path"):
        del content["source"][name]
    del content["source"]["lora"]["path"]
    content["source"]["model"] = model
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("engine", ["openvino", "eager"])
def test_a_relative_bundle_runs_from_another_folder(
    built: Built, home: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.chdir(home)
    with SmoothPipeline.from_engines("b", engine) as pipe:
        monkeypatch.chdir(ELSEWHERE)
        made = pipe("dog", num_inference_steps=1, generator=Generator().manual_seed(0)).images
        pipe.invert(made, "dog", num_inference_steps=1)
        assert pipe.source == "models/m"


def test_the_manifest_holds_what_was_typed_and_where_it_is(built: Built, home: Path) -> None:
    source = Bundle.open(home / "b").source
    assert (source.model, source.model_path) == ("models/m", str(home / "models" / "m"))
    assert source.lora is not None
    assert (source.lora.source, source.lora.path) == ("l.safetensors", str(home / "l.safetensors"))
    assert built.bundle.path == home / "b"


def test_the_suggested_command_runs_from_any_folder(built: Built, home: Path) -> None:
    words = shlex.split(built.bundle.command(built.bundle.variants[0]))
    options = dict(itertools.pairwise(words))
    assert options["--model"] == str(home / "models" / "m")
    assert options["--lora"] == str(home / "l.safetensors")
    assert options["--output"] == str(home / "b")


@pytest.mark.parametrize("model", ["m", "../models/m", "{home}/latest", "~/models/m"])
def test_the_same_model_by_another_path_is_the_same_bundle(
    built: Built, home: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "models")
    before = (home / "b" / "manifest.json").read_bytes()
    again = ensure_engines(model.format(home=home), home / "l.safetensors", backends=["openvino"], output="~/b")
    assert again.reused
    assert again.bundle.path == home / "b"
    assert (home / "b" / "manifest.json").read_bytes() == before


def test_paths_of_models_and_loras(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    models = [load_model("latest"), load_model(home / "models" / ".." / "models" / "m")]
    assert [model.path for model in models] == [str(home / "latest"), str(home / "models" / "m")]
    assert models[0].digests == models[1].digests
    assert read_lora("l.safetensors").path == str(home / "l.safetensors")
    assert load_model("default").path is None
    assert read_lora("default").path is None


def test_a_manifest_of_an_earlier_version_opens(copied: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_written_before(copied, "models/m")
    bundle = Bundle.open(copied)
    keys = [record.key for variant in bundle.variants for record in variant.engines]
    assert keys == [record.key for variant in Bundle.open(home / "b").variants for record in variant.engines]
    with pytest.raises(ModelError, match=r"^l\.safetensors: no such file"):
        reopen_model(bundle)
    monkeypatch.chdir(home)
    assert reopen_model(bundle).source == "models/m"


@pytest.mark.parametrize("former", ["an earlier version", "moved"])
def test_a_build_records_where_the_weights_are_now(
    copied: Path, home: Path, monkeypatch: pytest.MonkeyPatch, former: str
) -> None:
    as_written_before(copied, "m") if former == "an earlier version" else edit(copied, model_path="/gone/m")
    assert ensure_engines(home / "models" / "m", home / "l.safetensors", backends=["openvino"], output=copied).reused
    source = Bundle.open(copied).source
    assert source.model_path == str(home / "models" / "m")
    assert reopen_model(Bundle.open(copied)).path == source.model_path


def test_a_name_in_the_cache_and_a_path(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    (tmp_path / "bundles" / "name").mkdir(parents=True)
    monkeypatch.chdir(built.bundle.path.parent)
    assert find(Path("b")) == built.bundle.path
    assert find(Path("name")) == tmp_path / "bundles" / "name"
    assert find(Path("./no/name")) == built.bundle.path.parent / "no" / "name"

    def no_cache() -> Path:
        raise AssertionError("the cache was asked")

    monkeypatch.setattr("smooth_rt.cache.cache_root", no_cache)
    for path in ("b", built.bundle.path, "no/name", "/no/name"):
        find(Path(path))


def test_the_command_line_expands_the_home_folder(
    built: Built, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "b").symlink_to(home / "b")
    command = ["generate", "--engines=~/b", "--prompt", "dog", "--num-inference-steps", "1", "--output=~/out", "--json"]
    assert cli.main(command) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [os.path.dirname(file) for file in files] == [str(tmp_path / "out")] * 2
    assert (tmp_path / "out" / "image-001.png").is_file()


def test_an_unknown_user_runs_a_bundle(built: Built, as_stranger: Any) -> None:
    folder, _, run = as_stranger
    shutil.copytree(built.bundle.path, folder / "b")
    ran = run("generate", "--engines", "b", "--prompt", "dog", "--num-inference-steps", "1", "--output", "out")
    assert ran.returncode == 0, ran.stderr
    assert (folder / "out" / "image-001.png").is_file()
    assert not [line for line in ran.stderr.splitlines() if line.startswith("cache: ")]
