"""Percentiles against hand-computed values, and the order of interleaved runs."""

from __future__ import annotations

import itertools

import pytest

from bench.timing import interleave, summarise
from smooth_rt.errors import InputError


def test_percentiles_of_ten_runs() -> None:
    # Ranks 0..9: the median lies at 4.5, p90 at 8.1, p99 at 8.91.
    timing = summarise([10.0, 1.0, 2.0, 9.0, 3.0, 8.0, 4.0, 7.0, 5.0, 6.0])
    assert timing.median_s == pytest.approx(5.5)
    assert timing.p90_s == pytest.approx(9.1)
    assert timing.p99_s == pytest.approx(9.91)
    assert (timing.fastest_s, timing.slowest_s, timing.repeats) == (1.0, 10.0, 10)


def test_one_run_is_its_own_percentile() -> None:
    timing = summarise([0.25])
    assert (timing.median_s, timing.p90_s, timing.p99_s) == (0.25, 0.25, 0.25)


def test_no_run_is_an_error() -> None:
    with pytest.raises(InputError, match="give at least 1"):
        summarise([])


def test_candidates_take_turns_and_the_warm_up_is_not_timed() -> None:
    calls: list[str] = []
    ticks = itertools.count()
    seconds = interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"},  # type: ignore[misc]
        repeats=3,
        warmup=1,
        clock=lambda: float(next(ticks)),
        settle=0,
    )
    assert "".join(calls) == "abccbaabccba"
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


def test_each_run_is_charged_to_its_own_candidate() -> None:
    now = [0.0]

    def work(cost: float) -> None:
        now[0] += cost

    seconds = interleave(
        {"fast": lambda: work(1.0), "slow": lambda: work(5.0)}, repeats=2, warmup=3, clock=lambda: now[0], settle=0
    )
    assert seconds == {"fast": [1.0, 1.0], "slow": [5.0, 5.0]}


def test_a_short_run_follows_an_untimed_one_of_its_own() -> None:
    now = [0.0]
    calls: list[str] = []

    def work(name: str, cost: float) -> None:
        calls.append(name)
        now[0] += cost

    seconds = interleave(
        {"short": lambda: work("s", 0.25), "long": lambda: work("l", 8.0)},
        repeats=2,
        warmup=1,
        clock=lambda: now[0],
        settle=0,
    )
    assert "".join(calls) == "sllssssl"
    assert seconds == {"short": [0.25, 0.25], "long": [8.0, 8.0]}
