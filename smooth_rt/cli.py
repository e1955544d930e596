"""`smooth-rt`: calls, prints, and answers whatever happens in one line; no logic of its own.

Exit codes: 0 done; 1 a fault of the program; 2 something that the user can act on, in one line; 130, 143 and 129 after
Ctrl-C, SIGTERM and SIGHUP, once all has been cleaned up; 141 where the reader of stdout has gone (`| head`), without a
word, as for any tool that SIGPIPE ends.

The commands are imported by `main`, so that it can answer an interruption of that, too.
"""

from __future__ import annotations

import atexit
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType
from typing import Any, TextIO

from smooth_rt.errors import SmoothRTError

__all__ = ["main"]

SIGNALLED = 128  # added to the number of the signal that ended a run
SIGPIPE = 13  # which Windows does not name
LONGEST_NAME = 255  # bytes of a file name, on all common file systems
FINALIZER_SECONDS = 0.05  # until a signal that met a finalizer is raised again


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see the module's docstring). `argv` leaves out the program."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it speaks of processors that nothing here uses
    received: list[int] = []
    try:
        with _stoppable(received):
            return _carry_out(arguments)
    except KeyboardInterrupt as interruption:
        number = received[0] if received else signal.SIGINT
        by = f" by {signal.Signals(number).name}" if number != signal.SIGINT else ""
        # What was interrupted may know better what is left, and how to go on.
        said = " ".join(str(interruption).split())
        _say(said or f"interrupted{by}; nothing half-written is left; run the same command again")
        atexit.register(_deaf)
        return SIGNALLED + number
    except _StdoutError as refusal:
        if isinstance(refusal.error, BrokenPipeError):
            return SIGNALLED + SIGPIPE
        _say(f"error: stdout: the result cannot be printed ({refusal.error.strerror}); send it elsewhere")
        return 2
    except Exception as error:
        code = _answer(error, arguments)
        return SIGNALLED + received[0] if received else code


class _StdoutError(Exception):
    """Stdout takes nothing more. No OSError, which a library might take for a fault of its own."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Stdout:
    """Stdout whose errors can be told from those of any other file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._checked():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._checked():
            self._stream.flush()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python would try once more on its way out, and print a traceback.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise _StdoutError(error) from error


@contextmanager
def _stoppable(received: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does, so that all that cleans up after it does so after them; and none of
    the three is lost where it meets a finalizer, nor does a second one meet the cleaning up.

    Args:
        received: takes the signal's number.
    """
    former: dict[int, Any] = {}
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a library's forked process, which has nothing to clean up and nobody to tell
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _in_finalizer(frame):  # where Python drops what is raised: say it again when it is over
            again = threading.Timer(FINALIZER_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        for one in former:  # it is being answered; `timeout` and systemd send more than one
            signal.signal(one, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Under nohup SIGHUP is ignored, and shall be; so is SIGINT in the background of a shell.
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                former[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


_WEAK = ("weakref.py", "_weakrefset.py")


def _deaf() -> None:
    """Leaving takes a while, and a second Ctrl-C would print where it met Python."""
    with suppress(ValueError):  # of another thread than the main one
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether within `__del__`, or what a weak reference calls when its object is gone."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or os.path.basename(frame.f_code.co_filename) in _WEAK:
            return True
        frame = frame.f_back
    return False


def _carry_out(arguments: Sequence[str]) -> int:
    """Call the command and print its result."""
    for stream in (sys.stdout, sys.stderr):
        # Paths and prompts may hold what the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # The benchmark prints its own JSON.
    as_json = "--json" in arguments and arguments[0] != "bench"
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("smooth_rt").setLevel(logging.INFO)
    from smooth_rt.commands.app import call
    from smooth_rt.commands.show import show

    stdout: Any = None if sys.stdout is None else _Stdout(sys.stdout)
    with redirect_stdout(stdout):
        try:
            # Libraries print what they like; with --json stdout holds the result alone.
            with redirect_stdout(sys.stderr if as_json else stdout):
                result = call(arguments)
            if isinstance(result, Mapping):
                show(result, as_json)
        finally:
            if stdout is not None:
                stdout.flush()  # a full disk may show only here
    return result if isinstance(result, int) else 0


def _answer(error: Exception, arguments: Sequence[str]) -> int:
    """The exit code for an error, which is said in one line."""
    if "--debug" in arguments:
        with suppress(OSError):
            traceback.print_exception(error)
    # The program's own file names are short: such a path was typed.
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        named = str(error.filename)
        # Of a path that was made absolute, the name that is too long.
        long = next((part for part in named.split(os.sep) if len(os.fsencode(part)) > LONGEST_NAME), named)
        error = SmoothRTError(f"{long[:60]}...: {error.strerror}; give a shorter path")
    if isinstance(error, PermissionError) and error.filename:
        error = SmoothRTError(f"{error.filename}: {error.strerror}; give this user the right to it, or name another")
    line, code = _line(error, arguments)
    _say(line)
    return code


def _say(line: str) -> None:
    # After SIGHUP the terminal may be gone; and print takes None for stdout.
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _line(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """One line for any error, whatever its message holds, and the exit code. A parameter at the line's start is named
    as the option typed."""
    from smooth_rt.commands.app import UsageError

    if isinstance(error, UsageError):
        where = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        return f"error: {' '.join(error.format_message().split()).rstrip('.')}{where}", 2
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in said):
        return f"error: out of memory ({said[:200]}); ask for fewer or smaller images at once", 2
    if isinstance(error, SmoothRTError):
        parameter = re.match(r"([a-z]+(?:_[a-z]+)*)=", said)
        option = f"--{parameter[1].replace('_', '-')}" if parameter else ""
        if parameter and any(argument.split("=")[0] == option for argument in arguments):
            said = option + said[len(parameter[1]) :]
        return f"error: {said}", 2
    return f"error: {type(error).__name__}: {said}; a fault of the program: rerun with --debug and report it", 1


if __name__ == "__main__":
    sys.exit(main())
