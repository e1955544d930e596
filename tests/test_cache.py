"""Where the cache is, what it holds and what is removed from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from engines.bundle import Bundle
from engines.staging import discard
from smooth_rt import cache, cli
from smooth_rt.cache import _last_used as last_used
from smooth_rt.cache import cache_root, limit, list_bundles, make_room, parse_size, prune, timings, used
from smooth_rt.errors import InputError

DEAD = 2**22 + 1  # above the greatest process number


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SMOOTH_RT_CACHE")
    assert cache_root().name == "smooth-rt"


def test_a_cache_that_is_a_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("SMOOTH_RT_CACHE", str(root))
        with pytest.raises(InputError, match=rf"SMOOTH_RT_CACHE={root}: .*file is not a folder"):
            cache_root()


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    """Bundles (damaged: nothing but a half manifest) and what builds left beside them."""
    for name in ("one", f".two.partial-{DEAD}", f".three.old-{DEAD}", f".four.partial-{os.getppid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{")
    return tmp_path


def test_prune_removes_what_cannot_be_used_and_what_the_dead_left(bundles: Path) -> None:
    removed = prune(bundles)
    # "three" is a bundle whose swap was cut off: it is brought back, and then judged like any other.
    assert sorted(entry.path.name for entry in removed) == [f".two.partial-{DEAD}", "one", "three"]
    assert [entry.size for entry in removed] == [1, 1, 1]
    assert [path.name for path in bundles.iterdir()] == [f".four.partial-{os.getppid()}"]


def test_what_the_dead_left_is_listed_and_builds_under_way_are_not(bundles: Path) -> None:
    assert [entry.path.name for entry in list_bundles(bundles)] == ["one", "three", f".two.partial-{DEAD}"]


def test_prune_leaves_what_no_build_has_written(tmp_path: Path) -> None:
    for mine in ("my-thesis/thesis.tex", "models/onnx/my-yolo.onnx", "website/manifest.json"):
        (tmp_path / mine).parent.mkdir(parents=True)
        (tmp_path / mine).write_text("work")
    (tmp_path / "website" / "index.html").write_text("work")
    (tmp_path / "link").symlink_to(tmp_path / "my-thesis")
    (tmp_path / "empty").mkdir()
    assert [entry.path.name for entry in prune(tmp_path, every=True)] == ["empty"]
    assert len(list_bundles(tmp_path)) == 4
    assert (tmp_path / "my-thesis" / "thesis.tex").exists()


def test_prune_takes_a_link_away_and_not_what_it_leads_to(tmp_path: Path) -> None:
    bundle = tmp_path / "elsewhere"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(bundle)
    assert [entry.path.name for entry in prune(tmp_path / "cache")] == ["link"]
    assert (bundle / "manifest.json").exists()
    assert not list((tmp_path / "cache").iterdir())


def test_bundles_that_another_process_removes_meanwhile(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are opened, before they are judged and before they are removed."""

    def elsewhere(path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    opened = Bundle.open
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "open", lambda path, verify=True: (elsewhere(path), opened(path, verify))[1])
        assert [entry.path.name for entry in list_bundles(bundles)] == [f".two.partial-{DEAD}"]
    for name in ("one", "two"):
        (bundles / name).mkdir()
        (bundles / name / "manifest.json").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "discard", lambda path: (elsewhere(path), discard(path)))
        assert prune(bundles) == []
    assert [path.name for path in bundles.iterdir()] == [f".four.partial-{os.getppid()}"]
    (bundles / "one").mkdir()
    (bundles / "one" / "manifest.json").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_last_used", lambda entry: (elsewhere(entry.path), last_used(entry))[1])
        assert make_room(0, root=bundles) == []


def test_an_absent_cache_is_empty(tmp_path: Path) -> None:
    assert list_bundles(tmp_path / "none") == []
    assert prune(tmp_path / "none") == []


@pytest.fixture
def aged(tmp_path: Path) -> Path:
    """Four bundles of 1000 bytes, the first not used for longest; two of them share a file."""
    for age, name in enumerate(("newest", "newer", "older", "oldest")):
        bundle = tmp_path / name
        bundle.mkdir()
        (bundle / "manifest.json").write_bytes(b"{" * 500)
        (bundle / "config").mkdir()
        (bundle / "config" / "model.json").write_bytes(b" " * 500)
        os.link(bundle / "config" / "model.json", bundle / "config" / "again.json")
        os.utime(bundle, (1e9 - age, 1e9 - age))
    return tmp_path


def test_the_one_not_used_for_longest_goes_first(aged: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert make_room(4000, root=aged) == []
    used(aged / "oldest")
    with caplog.at_level("INFO", "smooth_rt"):
        assert [entry.path.name for entry in make_room(2000, root=aged)] == ["older", "newer"]
    assert "removed older, not used for longest" in caplog.text
    assert [entry.path.name for entry in make_room(0, keep=aged / "newest", root=aged)] == ["oldest"]
    assert [path.name for path in aged.iterdir()] == ["newest"]


def test_what_tensorrt_timed_counts_and_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    for removes in (lambda: make_room(999), lambda: prune(every=True)):
        timings().mkdir()
        (timings() / "tensorrt-11-sm89").write_bytes(b" " * 1000)
        assert make_room(1000) == []
        prune()
        assert timings().is_dir()  # a build to come takes it
        removes()
        assert not timings().exists()


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1K", 1024), ("1.5 MB", 3 * 2**19), ("20g", 20 * 2**30), ("2TiB", 2 * 2**40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "20 potatoes", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=r"max_size=.*: no size; give for example 20G"):
        parse_size(text, "max_size")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9" * 400, r"max_size=9{40}\.\.\.: too large for a size"),
        ("9" * 308 + "T", r"max_size=9{40}\.\.\.: too large for a size"),
        ("0.4", r"max_size=0\.4: less than one byte"),
        ("0." + "0" * 400 + "1", "less than one byte"),
        ("0.0001K", r"max_size=0\.0001K: less than one byte"),
    ],
)
def test_sizes_that_cannot_be_held_to(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_size(text, "max_size")


def test_the_limit_is_read_before_anything_is_built(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    monkeypatch.delenv("SMOOTH_RT_CACHE_LIMIT", raising=False)
    assert limit() == 40 * 2**30
    monkeypatch.setenv("SMOOTH_RT_CACHE_LIMIT", "0")
    assert limit() is None
    monkeypatch.setenv("SMOOTH_RT_CACHE_LIMIT", "much")
    assert cli.main(["build-engine", "--model", str(tiny_model), "--backend", "onnxruntime"]) == 2
    assert capsys.readouterr().err == (
        "error: SMOOTH_RT_CACHE_LIMIT=much: no size; give for example 20G or 500M (0 is no limit)\n"
    )
    assert list(tmp_path.iterdir()) == []
