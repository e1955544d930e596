"""A folder appears whole or not at all, whatever happens while it is made."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import engines
from engines.bundle import Bundle
from engines.contract import DERIVED, NETWORKS
from engines.errors import BundleError, SmoothRTError
from engines.staging import discard, foreign, staging

DEAD = 2**22 + 1  # above the greatest process number of Linux


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "home" / "bundle"


@pytest.fixture
def old(target: Path) -> Path:
    target.mkdir(parents=True)
    (target / "manifest.json").write_text("old")
    return target


def publish(target: Path, text: str, error: BaseException | None = None) -> None:
    """Publish a folder with one file, unless `error` strikes first."""
    with staging(target) as folder:
        (folder / "manifest.json").write_text(text)
        if error is not None:
            raise error


def siblings(target: Path) -> list[str]:
    return sorted(p.name for p in target.parent.iterdir()) if target.parent.exists() else []


def test_published_at_the_end(target: Path) -> None:
    with staging(target) as folder:
        (folder / "manifest.json").write_text("new")
        assert folder.name == f".bundle.partial-{os.getpid()}"
        assert not target.exists()
    assert content(target) == {"manifest.json": "new"}
    assert siblings(target) == ["bundle"]


def test_what_a_library_kept_to_the_owner_is_as_open_as_the_folder(target: Path) -> None:
    with staging(target) as folder:
        (folder / "manifest.json").touch(mode=0o600)
    rights = target.stat().st_mode & 0o666
    assert target.joinpath("manifest.json").stat().st_mode & 0o666 == rights


def test_an_old_bundle_is_replaced_whole(old: Path) -> None:
    (old / "onnx").mkdir()
    (old / "onnx" / "unet.onnx").write_text("old")
    with staging(old) as folder:
        (folder / "manifest.json").write_text("new")
        assert content(old)["manifest.json"] == "old"
    assert content(old) == {"manifest.json": "new"}
    assert siblings(old) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SystemExit(1), BundleError("y")])
def test_whatever_happens_the_old_bundle_stays(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        publish(old, "half", error)
    assert content(old) == {"manifest.json": "old"}
    assert siblings(old) == ["bundle"]


def test_a_failure_leaves_no_folder_that_was_not_there(target: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        publish(target / "deep" / "er", "half", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30 - 2**20, 2**20))


@pytest.mark.usefixtures("nearly_full")
def test_a_full_disk_names_path_and_space(old: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "unet.onnx")
    with pytest.raises(BundleError, match=r"bundle: the disk is full \(1\.0 MiB free\); .* more space") as caught:
        publish(old, "half", full)
    assert "\n" not in str(caught.value)
    assert content(old) == {"manifest.json": "old"}
    assert siblings(old) == ["bundle"]


@pytest.mark.usefixtures("nearly_full")
def test_too_little_space_is_said_beforehand(target: Path, tmp_path: Path) -> None:
    said = r"needs 3\.0 GiB of disk and 1\.0 MiB are free"
    with pytest.raises(BundleError, match=said), staging(target, needed=3 * 2**30):
        pytest.fail("the build began")
    assert list(tmp_path.iterdir()) == []


def test_a_path_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file" / "bundle", tmp_path / "file" / "a" / "b"):
        with pytest.raises(BundleError, match=r"lies under .*file, which is a file"), staging(target):
            pytest.fail("the build began")
    with pytest.raises(BundleError, match="is a file; name a folder"), staging(tmp_path / "file"):
        pytest.fail("the build began")
    assert content(tmp_path) == {"file": "mine"}


def test_somebodys_own_folder_is_never_replaced(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"holds thesis\.tex.* will not be replaced"), staging(target):
        pytest.fail("the build began")
    assert content(target) == {"thesis.tex": "years of work"}


@pytest.mark.parametrize("mine", ["onnx/my-yolo.onnx", "config/settings.ini", "openvino/unet.onnx.txt"])
def test_a_folder_of_models_is_never_replaced(target: Path, mine: str) -> None:
    (target / mine).parent.mkdir(parents=True)
    (target / mine).write_text("mine")
    with pytest.raises(BundleError, match="is not a bundle"):
        publish(target, "new")
    assert (target / mine).read_text() == "mine"
    (target / "manifest.json").write_text("{}")
    assert (foreign(target) is None) == mine.startswith("config")


@pytest.mark.parametrize("mine", ["config/000.png", "onnxruntime-fp32/unet/000.PNG"])
def test_pictures_in_a_bundle_are_never_removed(old: Path, mine: str) -> None:
    (old / mine).parent.mkdir(parents=True)
    (old / mine).write_text("mine")
    with pytest.raises(BundleError, match=rf"it holds {mine}.* will not be replaced"):
        publish(old, "new")
    assert (old / mine).read_text() == "mine"


def test_the_root_is_no_place_to_write_to() -> None:
    with pytest.raises(BundleError, match="not a place to write to"):
        publish(Path("/"), "new")


def test_a_bundle_of_every_network_is_replaced(target: Path) -> None:
    for name in (*NETWORKS, *DERIVED):
        (target / "onnxruntime-fp32" / name).mkdir(parents=True)
    (target / "manifest.json").write_text("{}")
    assert foreign(target) is None


def test_a_write_that_stops_short_is_a_full_disk(target: Path) -> None:
    with pytest.raises(BundleError, match="the disk may be full"):
        publish(target, "half", OSError("problem writing element 5120 to file"))


def test_an_empty_folder_is_taken(target: Path) -> None:
    target.mkdir(parents=True)
    with staging(target) as folder:
        (folder / "manifest.json").write_text("new")
    assert content(target) == {"manifest.json": "new"}


def test_a_link_stays_a_link(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old)
    with staging(link) as folder:
        (folder / "manifest.json").write_text("new")
    assert link.is_symlink()
    assert content(old) == {"manifest.json": "new"}


def test_what_the_dead_left_is_swept(old: Path) -> None:
    left = [f".bundle.partial-{DEAD}", f".bundle.old-{DEAD}", f".bundle.partial-{os.getpid()}"]
    others = [f".bundle2.partial-{DEAD}", f".bundle.partial-{os.getppid()}", ".bundle.partial-x"]
    for name in (*left, *others):
        (old.parent / name).mkdir()
        (old.parent / name / "manifest.json").write_text(name)
    with staging(old) as folder:
        (folder / "manifest.json").write_text("new")
    assert siblings(old) == sorted([*others, "bundle"])
    assert content(old) == {"manifest.json": "new"}


def test_a_build_that_was_killed_is_no_bundle_and_goes_with_the_next(target: Path) -> None:
    build = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from engines.staging import staging\n"
        f"with staging(Path({str(target)!r})) as folder:\n"
        "    (folder / 'graph').write_bytes(bytes(1000))\n"
        "    (folder / 'manifest.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", build], cwd=Path(engines.__file__).parents[1], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(BundleError, match="no such bundle folder"):
        Bundle.open(target)
    (left,) = siblings(target)
    assert left.startswith(".bundle.partial-")
    with staging(target) as folder:
        (folder / "manifest.json").write_text("new")
    assert siblings(target) == ["bundle"]


def test_what_is_discarded_is_gone_at_once(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (seen.append((old.exists(), path.name)), remove(path)))
    discard(old)
    assert seen == [(False, f".bundle.gone-{os.getpid()}")]
    assert siblings(old) == []
    with pytest.raises(FileNotFoundError):
        discard(old)


def test_what_cannot_be_discarded_is_found_where_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        discard(old)
    assert content(old) == {"manifest.json": "old"}


def test_who_died_while_it_discarded_leaves_nothing(old: Path) -> None:
    old.rename(old.with_name(f".bundle.gone-{DEAD}"))
    publish(old, "new")
    assert siblings(old) == ["bundle"]


def test_a_bundle_that_is_removed_while_it_is_looked_at_is_nobodys(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> Any:
        shutil.rmtree(path, ignore_errors=True)
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr("engines.staging._strange", gone)
        assert foreign(old) is None
    assert not old.exists()
    publish(old, "new")
    looks = []
    with monkeypatch.context() as patch:
        patch.setattr("engines.staging._strange", lambda path: looks.append(path) or gone(path / "part"))
        assert foreign(old) == "it changes all the time"
    assert len(looks) > 1


@pytest.mark.parametrize("number", [os.getpid(), DEAD], ids=["this", "none"])
def test_who_is_at_work_in_another_container_is_left_alone(target: Path, number: int) -> None:
    """There its number is another one, or this process's."""
    left = target.with_name(f".bundle.partial-{number}")
    left.mkdir(parents=True)
    hold = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from engines.staging import held\n"
        f"with held(Path({str(left)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    home = Path(engines.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", hold], cwd=home, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            publish(target, "new")
            assert siblings(target) == [left.name, "bundle"]
        finally:
            other.kill()
    publish(target, "newer")
    assert siblings(target) == ["bundle"]


def test_who_asks_at_the_moment_a_build_begins_is_waited_for(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who lists a cache asks of each folder in it whether somebody is at work there."""
    asked = []
    lock = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if not how & fcntl.LOCK_NB and not asked:  # a build's: another process was faster by a moment
            (partial,) = target.parent.iterdir()
            other = os.open(partial, os.O_RDONLY)
            lock(other, fcntl.LOCK_SH)
            asked.append(threading.Timer(0.2, os.close, (other,)))
            asked[0].start()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    publish(target, "new")
    assert asked
    assert content(target) == {"manifest.json": "new"}


def test_what_the_dead_left_of_a_hidden_bundle_is_swept_too(tmp_path: Path) -> None:
    hidden, seen = tmp_path / ".bundle", tmp_path / "bundle"
    publish(hidden, "old")
    hidden.rename(tmp_path / f"..bundle.old-{DEAD}")  # a swap that was cut off half-way
    (tmp_path / f"..bundle.partial-{DEAD}").mkdir()
    publish(seen, "another")
    with staging(hidden) as folder:
        assert folder.name == f"..bundle.partial-{os.getpid()}"
        assert content(hidden) == {"manifest.json": "old"}
        (folder / "manifest.json").write_text("new")
    assert siblings(seen) == [".bundle", "bundle"]
    assert [content(one) for one in (hidden, seen)] == [{"manifest.json": "new"}, {"manifest.json": "another"}]


def test_a_manifest_that_was_half_rewritten_makes_nobodys_folder(old: Path) -> None:
    (old / f".manifest.json.partial-{DEAD}").write_text("{")
    assert foreign(old) is None
    publish(old, "new")
    assert content(old) == {"manifest.json": "new"}


def test_a_swap_cut_off_half_way_is_undone(target: Path) -> None:
    stranded = target.parent / f".bundle.old-{DEAD}"
    stranded.mkdir(parents=True)
    (stranded / "manifest.json").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        publish(target, "half", KeyboardInterrupt())
    assert content(target) == {"manifest.json": "old"}
    assert siblings(target) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_a_swap_that_fails_brings_the_old_bundle_back(
    monkeypatch: pytest.MonkeyPatch, old: Path, error: BaseException
) -> None:
    rename: Callable[[Path, Any], Path] = Path.rename

    def fail(path: Path, to: Any) -> Path:
        if ".partial-" in path.name:
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((KeyboardInterrupt, SmoothRTError)):
        publish(old, "new")
    assert content(old) == {"manifest.json": "old"}
    assert siblings(old) == ["bundle"]


def test_another_process_that_publishes_first_is_followed(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    rename: Callable[[Path, Any], Path] = Path.rename
    rivals = ["first"]

    def rival(path: Path, to: Any) -> Path:
        if ".partial-" in path.name and rivals:
            target.mkdir()
            (target / "manifest.json").write_text(rivals.pop())
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rival)
    with staging(target) as folder:
        (folder / "manifest.json").write_text("second")
    assert rivals == []
    assert content(target) == {"manifest.json": "second"}
    assert siblings(target) == ["bundle"]


def test_two_at_once_in_one_process_do_not_harm_each_other(target: Path) -> None:
    with staging(target) as folder:
        (folder / "manifest.json").write_text("first")
        publish(target, "second")
        assert content(folder) == {"manifest.json": "first"}
        assert content(target) == {"manifest.json": "second"}
    assert content(target) == {"manifest.json": "first"}
    assert siblings(target) == ["bundle"]
