"""Threads: the ops release the GIL, give the same bits for any thread count, and can be called from many threads."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import reference as ref
import torch
from conftest import Backend, ops, same_bits
from samples import OPS, grown, outputs


@pytest.mark.parametrize("name", OPS)
def test_gil_is_released(device: Backend, rng: np.random.Generator, threads: None, name: str) -> None:
    """While a long call runs, another Python thread keeps ticking."""
    torch.set_num_threads(1)
    op, args, seconds = getattr(ops, name), OPS[name](device, rng), 0.0
    if name == "dequantize":
        big = ref.random_packed(rng, 128, 128, 4, "mul1")
        trellis, suh, svh = (
            device.put(np.tile(a, r)) for a, r in ((big.trellis, (24, 24, 1)), (big.suh, 24), (big.svh, 24))
        )
        args = [trellis, suh, svh, "mul1", 3072, 3072]
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        longest = 0.0
        for _ in range(20):  # repeat the tokens until the call is long enough
            begin = time.perf_counter()
            op(*args)
            end = time.perf_counter()
            seconds = end - begin
            if seconds > 0.1 or name == "dequantize":
                inside = [begin, *(t for t in ticks if begin < t < end), end]
                longest = max(b - a for a, b in itertools.pairwise(inside))
                if longest < seconds / 3:
                    break
            else:
                args = grown(name, args, 4)
    finally:
        stop.set()
        ticker.join()
    assert longest < seconds / 3, f"no other thread ran for {longest:.3f} s of a call of {seconds:.3f} s"


def test_thread_counts_give_the_same_bits(cpu: Backend, rng: np.random.Generator, threads: None) -> None:
    """1, 2, 3 and 4 threads, each twice."""
    for name in OPS:
        for shape in ((1,), (2,), (45,)):
            args, results = OPS[name](cpu, rng, shape), []
            for count in (1, 2, 3, 4, 4, 1):
                torch.set_num_threads(count)
                results.append(outputs(getattr(ops, name)(*args)))
            assert all(same_bits(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True)), (
                f"{name} {shape}"
            )


def test_concurrent_callers(cpu: Backend, rng: np.random.Generator) -> None:
    """Six Python threads call every op at once with their own sizes; each gets what it gets alone."""
    calls = [(name, OPS[name](cpu, rng, (1 + 7 * i,))) for i in range(6) for name in OPS]
    alone = [outputs(getattr(ops, name)(*args)) for name, args in calls]
    wrong: list[str] = []
    start = threading.Barrier(6)

    def work(first: int) -> None:
        start.wait()
        for round_ in range(5):
            for i in range(len(calls)):
                name, args = calls[(first * 7 + i) % len(calls)]
                got = outputs(getattr(ops, name)(*args))
                if not all(same_bits(a, b) for a, b in zip(got, alone[(first * 7 + i) % len(calls)], strict=True)):
                    wrong.append(f"{name} in thread {first}, round {round_}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
