"""What the cache holds and what is removed from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smooth_rt.cache import list_bundles, prune

DEAD = 2**22 + 1  # above the greatest process number


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


def test_an_absent_cache_is_empty(tmp_path: Path) -> None:
    assert list_bundles(tmp_path / "none") == []
    assert prune(tmp_path / "none") == []
