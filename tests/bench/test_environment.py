"""What is said about the machine, and the peak of a fresh process."""

from __future__ import annotations

import subprocess
import sys

import torch

from bench.environment import busy, environment, uneven


def test_this_machine() -> None:
    now = environment()
    assert now.cpu
    assert 1 <= now.usable_cores <= now.logical_cores
    assert now.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert now.threads["torch"] == torch.get_num_threads()
    assert now.threads["openvino"] >= 1


def test_a_busy_machine_is_warned_about() -> None:
    now = environment().model_copy(update={"usable_cores": 4, "load_average_1min": 3.0})
    warning = busy(now)
    assert warning is not None
    assert "3.00" in warning
    assert "\n" not in warning


def test_an_idle_machine_is_not() -> None:
    idle = environment().model_copy(update={"usable_cores": 4, "load_average_1min": 0.9})
    assert busy(idle) is None
    assert busy(idle.model_copy(update={"load_average_1min": None})) is None


def test_unlike_thread_counts_are_warned_about() -> None:
    now = environment().model_copy(
        update={"threads": {"torch": 1, "openvino": 2}, "thread_variables": {"OMP_NUM_THREADS": "1"}}
    )
    warning = uneven(now)
    assert warning is not None
    assert "OMP_NUM_THREADS=1" in warning
    assert "set OMP_NUM_THREADS=2" in warning
    assert uneven(now.model_copy(update={"threads": {"torch": 2, "openvino": 2}})) is None


def test_a_fresh_process_does_not_bear_the_peak_of_its_parent() -> None:
    ballast = b"\x01" * 600_000_000
    ask = "from export.versions import peak_memory; print(peak_memory())"
    ran = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    own = "from export.versions import peak_memory; b = b'\\x01' * 600_000_000; print(peak_memory())"
    larger = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < len(ballast)
    assert int(larger.stdout) > int(ran.stdout) + 500_000_000


def test_the_peak_is_a_childs_where_that_is_larger() -> None:
    child = "b = b'\\x01' * 600_000_000"
    ask = (
        "import subprocess, sys; from export.versions import peak_memory; before = peak_memory(); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True); print(before, peak_memory())"
    )
    ran = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert before < 500_000_000 < 600_000_000 < after < 800_000_000
