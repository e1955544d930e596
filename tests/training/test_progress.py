"""What a training run shows of how far it is: on a terminal of any width, and in a log."""

from __future__ import annotations

import logging
import re

import pytest

from smooth_rt.training import progress

NUMBERS = {"loss": 0.2070, "base": 0.1563, "reg": 0.0507, "norm": 0.1872}


@pytest.mark.parametrize(
    ("width", "numbers"), [(80, "loss 0.2070 base 0.1563 reg …"), (160, "norm 0.1872 0.04 steps/s")]
)
def test_a_narrow_terminal_keeps_the_steps_and_the_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, numbers: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    with progress.run_progress("run", 0, 20_000) as show:
        show(12_345, NUMBERS, 0.04)
    out, told = capsys.readouterr()
    assert not out
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", told).splitlines()[-1].rstrip()
    assert re.match(r"run [━╺╸]+ +12345/20000 0:00:00 -?[\d:-]+ ", last)
    assert last.endswith(numbers)
    assert len(last) <= width


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "smooth_rt"), progress.run_progress("run", 10, 60) as show:
        for step in range(11, 61):
            now[0] += 10
            show(step, NUMBERS, 0.1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 17  # the last step's, too
    assert lines[-1].startswith("run: step 60 of 60, loss 0.2070 ")
    assert lines[0] == "run: step 13 of 60, loss 0.2070 base 0.1563 reg 0.0507 norm 0.1872 0.10 steps/s, 0:07:50 left"
    assert capsys.readouterr() == ("", "")
    caplog.clear()
    with caplog.at_level(logging.INFO, "smooth_rt"), progress.run_progress("run", 0, 60, quiet=True) as show:
        now[0] += 100
        show(1, NUMBERS, 0.1)
        show(60, NUMBERS, 0.1)
    assert not caplog.records
