"""The command line as a process: signals, readers that go away, full disks, encodings that lack a character."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smooth_rt import cli
from smooth_rt.commands import bundles

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]

# Code that has the import of the commands interrupted.
INTERRUPTED = """
import sys
class Interrupts:
    def find_spec(self, name, *_):
        if name in ('typer', 'rich', 'pydantic', 'torch'): raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """The signals as a terminal leaves them: under nohup or in the background some are ignored from the start, and the
    command line respects that."""
    before = {number: signal.getsignal(number) for number, _ in SIGNALS}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def process(tmp_path: Path, code: str, environment: dict[str, str] | None = None, **options: Any) -> Any:
    """What Python says to `code`, with a cache of its own."""
    own = {**os.environ, "SMOOTH_RT_CACHE": str(tmp_path), **(environment or {})}
    return subprocess.run([sys.executable, "-c", code], env=own, check=False, timeout=120, **options)


def listing(*arguments: str) -> str:
    """Code that lists the engines."""
    return f"import sys; from smooth_rt.cli import main; sys.exit(main({['engines', 'list', *arguments]}))"


@pytest.fixture
def engines_list(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Has `engines list` do something else before it lists none."""

    def replace(work: Callable[[], Any]) -> None:
        def listed() -> list[Any]:
            work()
            return []

        monkeypatch.setattr("smooth_rt.cache.list_bundles", listed)

    return replace


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_cleans_up_and_is_told_in_one_line(
    engines_list: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    before = [signal.getsignal(one) for one, _ in SIGNALS]

    def work() -> None:
        (tmp_path / "half").write_text("")
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did nothing")
        finally:
            (tmp_path / "half").unlink()

    engines_list(work)
    assert cli.main(["engines", "list"]) == code
    captured = capsys.readouterr()
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    assert captured.err == f"interrupted{by}; nothing half-written is left; run the same command again\n"
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(one) for one, _ in SIGNALS] == before


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_second_signal_does_not_disturb_the_cleaning_up(
    engines_list: Any, tmp_path: Path, number: int, code: int
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            for one, _ in SIGNALS:
                os.kill(os.getpid(), one)
            (tmp_path / "cleaned up").write_text("")

    engines_list(work)
    assert cli.main(["engines", "list"]) == code
    assert (tmp_path / "cleaned up").exists()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("by", ["__del__", "weakref"])
def test_a_signal_that_meets_a_finalizer_is_not_lost(engines_list: Any, by: str, number: int, code: int) -> None:
    """What is raised in a finalizer Python drops."""

    def meet() -> None:
        os.kill(os.getpid(), number)
        for _ in range(100):  # the handler runs between two of these
            pass

    class Plain:
        pass

    class Fragile:
        def __del__(self) -> None:
            meet()

    def work() -> None:
        fragile = Fragile() if by == "__del__" else Plain()
        if by == "weakref":
            weakref.finalize(fragile, meet)
        del fragile
        for _ in range(100):
            time.sleep(0.1)

    began = time.monotonic()
    engines_list(work)
    assert cli.main(["engines", "list"]) == code
    assert time.monotonic() - began < 5


def test_what_was_interrupted_may_say_how_to_go_on(engines_list: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("state saved at step 7;\nadd --resume") from None

    engines_list(work)
    assert cli.main(["engines", "list"]) == 143
    assert capsys.readouterr().err == "state saved at step 7; add --resume\n"


def test_under_nohup_sighup_is_ignored(engines_list: Any) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engines_list(lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert cli.main(["engines", "list"]) == 0
    finally:
        signal.signal(signal.SIGHUP, former)


def test_main_runs_on_any_thread(engines_list: Any, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    engines_list(lambda: None)
    thread = threading.Thread(target=lambda: codes.append(cli.main(["engines", "list"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_interruption_while_the_result_is_printed(
    engines_list: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(*_: Any) -> None:
        raise KeyboardInterrupt

    engines_list(lambda: None)
    monkeypatch.setattr("smooth_rt.commands.show.show", show)
    assert cli.main(["engines", "list"]) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


def as_module(name: str) -> str:
    """Code that is `python -m name engines`."""
    return f"import runpy, sys; sys.argv[1:] = ['engines']; runpy.run_module('{name}', run_name='__main__')"


@pytest.mark.parametrize("run", [listing(), as_module("smooth_rt"), as_module("bench")])
def test_an_interruption_while_the_commands_are_imported(tmp_path: Path, run: str) -> None:
    code = INTERRUPTED + run
    ran = process(tmp_path, code, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr == "interrupted; nothing half-written is left; run the same command again\n"


def test_a_second_ctrl_c_while_it_leaves_is_not_heard(tmp_path: Path) -> None:
    code = (
        "import atexit, os, signal\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n" + INTERRUPTED + listing()
    )
    ran = process(tmp_path, code, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr == "interrupted; nothing half-written is left; run the same command again\n"


def test_a_process_that_a_library_forked_ends_without_a_word(engines_list: Any, capfd: Any) -> None:
    ended = []

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says it where there are threads
            child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os._exit(1)
        ended.append(os.waitpid(child, 0)[1])

    engines_list(work)
    assert cli.main(["engines", "list"]) == 0
    assert os.WTERMSIG(ended[0]) == signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["engines", "list"], ["engines", "list", "--json"], ["--help"], ["bench", "-h"]])
def test_a_reader_that_has_gone(tmp_path: Path, arguments: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    code = f"import sys; from smooth_rt.cli import main; sys.exit(main({arguments}))"
    ran = process(tmp_path, code, {"PYTHONUNBUFFERED": unbuffered}, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["engines", "list"], ["engines", "list", "--json"], ["--help"]])
def test_a_full_disk_behind_stdout(tmp_path: Path, arguments: list[str], unbuffered: str) -> None:
    code = f"import sys; from smooth_rt.cli import main; sys.exit(main({arguments}))"
    with Path("/dev/full").open("w") as full:
        environment = {"PYTHONUNBUFFERED": unbuffered}
        ran = process(tmp_path, code, environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "error: stdout: the result cannot be printed (No space left on device); send it elsewhere\n"


@pytest.mark.parametrize("name", ["ü 犬", os.fsdecode(b"\xff\xfe")])
@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict", "latin-1:strict"])
def test_what_the_encoding_lacks_is_escaped(tmp_path: Path, name: str, encoding: str) -> None:
    cache = tmp_path / name
    environment = {"SMOOTH_RT_CACHE": str(cache), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for as_json in (False, True):
        ran = process(tmp_path, listing(*["--json"] * as_json), environment, capture_output=True)
        assert (ran.returncode, ran.stderr) == (0, b"")
        said = ran.stdout.decode(encoding.split(":")[0])
        if as_json:
            assert json.loads(said)["cache"] == str(cache)
        else:
            expected = str(cache).encode(encoding.split(":")[0], "backslashreplace").decode(encoding.split(":")[0])
            assert f"cache: {expected}" in said


@pytest.mark.parametrize("stream", [1, 2])
def test_a_stream_that_is_closed(tmp_path: Path, stream: int) -> None:
    code = f"import sys; from smooth_rt.cli import main; sys.exit(main({['generate', '--height', '0']}))"
    closing = {"stdout": None} if stream == 1 else {"stderr": None}
    ran = process(
        tmp_path, code, capture_output=False, preexec_fn=lambda: os.close(stream),
        **{**{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, **closing},
    )  # fmt: skip
    assert ran.returncode == 2
    assert not ran.stdout


def test_the_listing_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the tests above replace is what the command calls.
    monkeypatch.setenv("SMOOTH_RT_CACHE", str(tmp_path))
    from smooth_rt.commands.options import OutputOptions

    assert bundles.list_engines(OutputOptions(json=True)) == {"cache": str(tmp_path), "bundles": []}
