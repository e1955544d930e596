"""What a long job shows of itself: the time that is left, times that move while a step lasts, lines in a log."""

from __future__ import annotations

import math
import re
import time

import pytest

from smooth_rt.commands import progress
from smooth_rt.commands.progress import TimeLeft, build_progress, step_progress


class Clock:
    """Seconds that are set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_that_is_left_follows_from_what_is_done() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert str(left) == "-:-- left"
    left.update(0, 100)
    clock.now += 30
    left.update(0, 100)  # within the first step
    assert left.seconds is None
    left.update(25, 100)
    assert left.seconds == pytest.approx(90)
    assert str(left) == "1:30 left"
    clock.now += 9
    assert left.seconds == pytest.approx(81, abs=1)
    clock.now += 80  # nearly all that was left is over, and a step still lasts
    assert left.seconds == pytest.approx(90 / math.e, abs=1)
    clock.now += 2  # longer than was thought: nobody knows
    assert (left.seconds, str(left)) == (None, "-:-- left")
    left.update(50, 100)
    assert left.seconds == pytest.approx(121)
    left.update(100, 100)
    assert left.seconds == 0
    left.update(0, 50)  # another job
    assert left.seconds is None
    clock.now += 3600
    left.update(10, 50)
    assert str(left) == "4:00:00 left"


def test_nothing_is_guessed_from_a_first_step_that_is_short() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.update(0, 400)
    clock.now += 0.02
    left.update(1, 400)  # which is why it would be 8 seconds
    assert left.seconds is None
    clock.now += 30
    left.update(301, 400)
    assert left.seconds == pytest.approx(9.9, abs=0.1)


def test_the_time_moves_while_a_step_lasts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which is a terminal to rich
    monkeypatch.setenv("COLUMNS", "60")
    with build_progress() as show:
        show("unet: convert to openvino-fp32 (2,717 layers)", 10, 40)
        time.sleep(1.3)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", capsys.readouterr().err)
    assert {"0:00:00", "0:00:01"} <= set(re.findall(r"0:00:0[0-9]", said))
    assert "building: unet: conver" in said
    assert "-:-- left" in said


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with build_progress() as show:
        show("unet: export", 0, 40)
        # Another stage is told of soon, for it may be long, and its next step not before its time.
        monkeypatch.setattr(progress, "SAY_ANOTHER", 0.0)
        show("unet: verify openvino-fp32", 10, 40)
        show("unet: verify openvino-fp32", 11, 40)
        monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
        show("unet: verify openvino-fp32", 20, 40)
    said = capsys.readouterr()
    line = r"building: unet: verify openvino-fp32; {} % done, \d+:\d\d left\n"
    assert re.fullmatch(line.format(25) + line.format(50), said.err)
    assert said.out == ""


def test_a_log_is_told_of_steps_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with step_progress("generate", 3) as on_step:
        on_step()  # too soon for a line
        monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
        on_step()
    assert capsys.readouterr().err == "generate, steps: 2 of 3\n"
