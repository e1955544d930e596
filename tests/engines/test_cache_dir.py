"""The cache folder, for users who have a home and for those who have none."""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import cache_dir
from engines.cache_dir import VARIABLE, cache_root, ensure_home, pin_cache_root
from engines.errors import InputError

Stranger = tuple[Path, int, Callable[..., "subprocess.CompletedProcess[str]"]]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, without SMOOTH_RT_CACHE and with nothing logged yet."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cache_dir._log.cache_clear()
    return folder


@pytest.fixture
def homeless(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a user without a home."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return temporary


def test_relative_cache_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "cache")
    pin_cache_root()
    monkeypatch.chdir("/")
    assert cache_root() == tmp_path / "cache"
    assert os.environ[VARIABLE] == str(tmp_path / "cache")  # which processes that are started inherit


def test_importing_a_package_pins_the_cache(tmp_path: Path) -> None:
    for package in ("engines", "smooth_rt"):
        code = f"import os, {package}; os.chdir('/'); from smooth_rt.cache import cache_root; print(cache_root())"
        environment = {**os.environ, VARIABLE: "cache", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == str(tmp_path / "cache")


def test_cache_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/cache")
    assert cache_root() == tmp_path / "cache"


def test_cache_without_a_home_is_private(homeless: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smooth_rt"):
        roots = {cache_root(), cache_root()}
    private = homeless / f"smooth-rt-{os.getuid()}"
    assert roots == {private / ".cache" / "smooth-rt"}
    assert private.stat().st_mode & 0o777 == 0o700
    assert caplog.messages == [
        f"cache: this user has no home folder; using {private / '.cache' / 'smooth-rt'} instead, unless "
        "SMOOTH_RT_CACHE names another folder"
    ]


def test_home_is_set_for_libraries(homeless: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = cache_root()
    cache_dir._log.cache_clear()
    caplog.clear()
    ensure_home()
    assert Path.home() == homeless / f"smooth-rt-{os.getuid()}"
    assert cache_root() == before
    assert "no home folder" in caplog.text


def test_home_that_is_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path / "missing")


@pytest.mark.parametrize("planted", ["file", "link", "open"])
def test_private_folder_of_somebody_else_is_refused(homeless: Path, planted: str) -> None:
    private = homeless / f"smooth-rt-{os.getuid()}"
    if planted == "file":
        private.write_text("")
    elif planted == "link":
        (homeless / "theirs").mkdir()
        private.symlink_to(homeless / "theirs")
    else:
        private.mkdir()
        private.chmod(0o777)
    with pytest.raises(
        InputError, match=r"^cache: this user has no home folder, and .*; set SMOOTH_RT_CACHE to a"
    ) as e:
        cache_root()
    assert "\n" not in str(e.value)
    ensure_home()
    assert os.environ["HOME"] == "/nonexistent"


def test_home_below_a_file(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_root().is_relative_to(temporary)


@pytest.mark.parametrize("mode", ["missing", "unwritable", "unreadable"])
def test_home_where_no_cache_can_be(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    home = tmp_path / "home"
    cache = home / ".cache" / "smooth-rt"
    if mode == "unreadable":
        cache.mkdir(parents=True)
    elif mode == "unwritable":
        home.mkdir()
    refused = {"missing": tmp_path, "unwritable": home, "unreadable": cache}[mode]
    # Root may do anything, so the system is made to answer as it answers others.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != refused)
    monkeypatch.setenv("HOME", str(home))
    assert cache_root().is_relative_to(temporary)
    assert f"cache: {cache}: cannot be " in caplog.text


def test_home_that_can_be_used(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    assert cache_root() == tmp_path / "new" / ".cache" / "smooth-rt"
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_unknown_user_needs_a_cache_and_gets_one(as_stranger: Stranger) -> None:
    folder, uid, run = as_stranger
    ran = run("engines", "list")
    private = folder / f"smooth-rt-{uid}"
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == f"cache: {private / '.cache' / 'smooth-rt'}"
    assert ran.stderr.startswith("cache: this user has no home folder; using ")
    assert len(ran.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == [private.name]
    assert private.stat().st_uid == uid
