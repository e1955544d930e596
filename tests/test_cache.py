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


def test_builds_under_way_are_not_listed(bundles: Path) -> None:
    assert [entry.path.name for entry in list_bundles(bundles)] == ["one"]


def test_an_absent_cache_is_empty(tmp_path: Path) -> None:
    assert list_bundles(tmp_path / "none") == []
    assert prune(tmp_path / "none") == []
