"""Repeated runs of several candidates, interleaved, and what to say about their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bench.results import Timing
from smooth_rt.errors import InputError

__all__ = ["interleave", "summarise"]

# Worker threads of OpenMP, ONNX Runtime and TBB spin for some milliseconds after their last task and would take
# cores from the next candidate.
SETTLE_S = 0.01
# A run shorter than this is preceded by an untimed run of the same candidate: it would else pay for the change of
# engines (cold caches, threads to wake), which no user of one engine pays. Measured on identical torch modules, 25 ms
# became 25 to 55 ms by the neighbour; a run of seconds does not feel it and is not made twice.
PRIME_BELOW_S = 1.0


def summarise(seconds: Sequence[float]) -> Timing:
    """Median, p90 and p99 by linear interpolation between the closest ranks (numpy's default, Hyndman-Fan type 7).

    Raises:
        InputError: no run.
    """
    if not seconds:
        raise InputError("repeats: no timed run; give at least 1")
    median, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Timing(
        median_s=median, p90_s=p90, p99_s=p99, fastest_s=min(seconds), slowest_s=max(seconds), repeats=len(seconds)
    )


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    settle: float = SETTLE_S,
) -> dict[str, list[float]]:
    """Seconds of each timed run by candidate. All candidates run once a round, so drift of the machine hits all alike.

    Every other round goes backwards: then a steady drift within a round cancels too, and nobody always runs after the
    same neighbour. Candidates whose last warm-up took less than PRIME_BELOW_S run once untimed before each timed run.

    Args:
        candidates: what to run, by name.
        repeats: timed rounds.
        warmup: rounds before them that are not timed.
        clock: returns seconds.
        settle: seconds of rest before each run.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm: dict[str, float] = {}
    for i in range(warmup + repeats):
        for name in names if i % 2 == 0 else reversed(names):
            time.sleep(settle)
            if i >= warmup and warm.get(name, PRIME_BELOW_S) < PRIME_BELOW_S:
                candidates[name]()
            start = clock()
            candidates[name]()
            elapsed = clock() - start
            if i < warmup:
                warm[name] = elapsed
            else:
                seconds[name].append(elapsed)
    return seconds
