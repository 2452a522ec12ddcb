"""Timing several ways to do one thing in turns, so that what drifts (clocks, heat, neighbours) drifts for all of them.

Owns the measuring loop: warm up, then rounds; in a round every variant runs once, in an order drawn anew.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping

from benchmarks.dispatch.device import Device
from benchmarks.dispatch.result import Progress, Settings

WARM_UP = 1
FEWEST = 5  # rounds, whatever the time: less has no quartiles worth printing


def in_turns(
    variants: Mapping[str, Callable[[], object]],
    device: Device,
    settings: Settings,
    progress: Progress = lambda fraction, what: None,
) -> dict[str, tuple[float, ...]]:
    """Wall milliseconds of each variant, one a round; sample i of each comes from round i.

    Each timing starts with an idle device and ends when the device is idle again. Ends after settings.repeats rounds or
    settings.seconds, but not before FEWEST rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(settings.seed)
    for work in variants.values():
        for _ in range(WARM_UP):
            work()
            device.wait()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in one variant and not in the other is no difference between them
    try:
        began = time.perf_counter()
        for done in range(max(settings.repeats, FEWEST)):
            spent = time.perf_counter() - began
            if done >= FEWEST and spent >= settings.seconds:
                break
            progress(max(done / settings.repeats, min(1.0, spent / max(settings.seconds, 1e-9))), "")
            for name in order.sample(list(variants), len(variants)):
                work = variants[name]
                device.wait()
                start = time.perf_counter()
                work()
                device.wait()
                times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(values) for name, values in times.items()}
