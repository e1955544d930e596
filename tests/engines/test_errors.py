"""What goes into a line of ours."""

from __future__ import annotations

import pytest

from engines.errors import LONGEST_SAID, InputError, reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("short; told whole. As it is."), "short; told whole. As it is"),
        (ValueError("\nfirst line:\nsecond"), "first line"),
        (ValueError("What is wrong. " + "Advice without end. " * 20), "What is wrong"),
        (ValueError("x" * 1000), "x" * LONGEST_SAID + "..."),
        (KeyError("vocab"), "unknown or missing: 'vocab'"),
        (ValueError(), "ValueError"),
        (OSError(28, "No space left on device", "/some/path"), "No space left on device"),
    ],
)
def test_what_a_library_said_stands_in_one_line(error: Exception, said: str) -> None:
    assert reason(error) == said


def test_message_is_one_line_whatever_it_names() -> None:
    assert str(InputError("a\nname: is\r\nwrong")) == "a name: is wrong"


def test_a_library_that_puts_the_cause_last() -> None:
    assert reason(RuntimeError("at core.cpp:1\n\n  Unable to read the model\n"), -1) == "Unable to read the model"
