"""Timing one piece of work: warm up, repeat, report the median and the middle half."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 0.5  # how long one case is repeated at most, unless MIN_RUNS take longer
MIN_RUNS = 5
MAX_RUNS = 200


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the quartiles of `runs` calls."""

    median: float
    low: float
    high: float
    runs: int


def measure(work: Callable[[], object], seconds: float = SECONDS) -> Timing:
    """Times `work`, which must be finished when it returns (on a CPU it is), after two calls that don't count."""
    work()
    work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < MIN_RUNS or (time.perf_counter() - began < seconds and len(times) < MAX_RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high, len(times))
