"""Absolute paths of what users name."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from engines.errors import InputError
from engines.paths import absolute, expanded, recorded


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a link `link` to a folder two levels deep elsewhere."""
    (tmp_path / "here").mkdir()
    (tmp_path / "deep" / "target").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "deep" / "target")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("m", "m"),
        ("./m/", "m"),
        (".", ""),
        ("sub/../m", "m"),
        ("link", "link"),
        ("link/../m", "link/../m"),
        ("link/../../m", "link/../../m"),
        ("/etc/../m", "/m"),
        ("/../m", "/m"),
    ],
)
def test_absolute_keeps_links_and_what_they_lead_to(folder: Path, typed: str, wanted: str) -> None:
    assert str(absolute(typed)) == str(folder / wanted)
    assert absolute(Path(typed)) == absolute(typed)


def test_absolute_parent_of_the_current_folder(folder: Path) -> None:
    assert absolute("../deep") == folder.parent / "deep"
    assert absolute("..") == folder.parent


def test_expanded_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/m") == tmp_path / "m"
    assert absolute("~") == tmp_path
    assert expanded("~nobody-of-this-name/m") == Path("~nobody-of-this-name/m")
    assert expanded("a/~/m") == Path("a/~/m")


def test_expanded_without_a_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(InputError, match=r"^~/m: HOME is not set, .*; give an absolute path$"):
        absolute("~/m")


def test_absolute_in_a_removed_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(InputError, match=r"^m: the current folder was removed; give an absolute path$"):
        absolute("m")
    assert absolute(tmp_path) == tmp_path


def test_recorded_path_is_valid_utf8(folder: Path) -> None:
    assert recorded("m") == str(folder / "m")
    assert recorded(os.fsdecode(b"caf\xe9")) is None
