"""Manifests changed at random and files that were cut: refused in one line, and never another engine opened."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle
from engines.errors import BundleError, EngineError
from engines.manifest import digest_file

CHANGES = 400
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**70, 1e308, "", "x", "../x", "/etc/passwd", "a\0b", "fp16", "refit", "sm90",
    [], {}, [[]], {"a": 1}, "1:2:3", "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "é" * 300,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inside for found in places(one, (*path, key)))]


def changed(content: Any, chance: random.Random) -> Any:
    """A copy with one to three values replaced, dropped, doubled or swapped."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(places(content))
        if not path:
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        kind = chance.randrange(4)
        if kind == 0:
            parent[path[-1]] = chance.choice(STRANGE)
        elif kind == 1:
            del parent[path[-1]]
        elif kind == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif isinstance(parent[path[-1]], str):
            parent[path[-1]] = parent[path[-1]][::-1] + chance.choice("0a/:.")
        else:
            parent[path[-1]] = chance.choice(STRANGE)
    return content


def keys(bundle: Bundle) -> set[tuple[str, str, str, str]]:
    return {(b.variant.name, r.network, r.key, r.file) for b in bundle.variants for r in b.engines}


def opened_or_refused(folder: Path) -> Bundle | str:
    """The bundle, or the message with which it is refused; any other exception is the test's failure."""
    try:
        return Bundle.open(folder)
    except BundleError as error:
        return str(error)


def test_no_manifest_that_was_changed_opens_another_engine(bundle_folder: Path) -> None:
    path = bundle_folder / "manifest.json"
    content = json.loads(path.read_text())
    whole = Bundle.open(bundle_folder)
    before = keys(whole)
    chance = random.Random(0)
    refused = 0
    for _ in range(CHANGES):
        path.write_text(json.dumps(changed(content, chance)))
        opened = opened_or_refused(bundle_folder)
        if isinstance(opened, str):
            assert "\n" not in opened
            assert "`smooth-rt build-engine" in opened
            refused += 1
            continue
        # What was changed says nothing of how the engines compute: times, versions, errors, notes, names.
        assert keys(opened) <= before
        assert opened.dims == whole.dims
        assert opened.source.digests == whole.source.digests
    assert refused > CHANGES / 2


def test_no_bytes_that_were_changed_are_a_crash(bundle_folder: Path) -> None:
    path = bundle_folder / "manifest.json"
    whole = path.read_bytes()
    before = keys(Bundle.open(bundle_folder))
    chance = random.Random(1)
    for _ in range(CHANGES):
        content = bytearray(whole)
        if chance.random() < 0.5:
            content = content[: chance.randrange(len(content))]
        else:
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        opened = opened_or_refused(bundle_folder)
        assert "\n" not in opened if isinstance(opened, str) else keys(opened) <= before


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "inductor"])
def test_a_graph_that_was_cut_is_refused_even_where_the_manifest_agrees(
    bundle_folder: Path, write_graph: Callable[[Path], Path], tmp_path: Path, backend: str
) -> None:
    from engines.contract import Dims, contract
    from engines.select import open_engine

    whole = write_graph(tmp_path / "whole.onnx").read_bytes()
    dims: Dims = Bundle.open(bundle_folder).dims
    chance = random.Random(2)
    suffix = {"onnxruntime": ".onnx", "openvino": ".xml", "inductor": ".pt2"}[backend]
    for size in (0, 1, *(chance.randrange(len(whole)) for _ in range(12))):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(whole[:size])
        with pytest.raises(EngineError) as caught:
            open_engine(backend, contract("vae_encoder", dims), cut)
        assert "\n" not in str(caught.value)
        assert str(cut) in str(caught.value)


def test_a_cut_file_is_refused_by_its_size_and_a_changed_one_by_its_digest(bundle_folder: Path) -> None:
    chance = random.Random(3)
    files = [file for file in sorted(bundle_folder.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    for file in files:
        whole, digest = file.read_bytes(), digest_file(file)
        file.write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises(BundleError, match="so it is damaged"):
            Bundle.open(bundle_folder, verify=False)
        file.write_bytes(whole)
        assert digest_file(file) == digest
    Bundle.open(bundle_folder)
