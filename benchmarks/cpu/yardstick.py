"""What the machine can do at most, for shares: a large copy, and torch's dense products. A process of its own.

python -m benchmarks.cpu.yardstick THREADS prints JSON: bytes per second read and written, FLOP/s of each dtype.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from benchmarks.cpu.processes import ROOT, environment
from benchmarks.machine import COPY_BYTES, copy_speed
from benchmarks.timing import measure

SIZE = 1024  # of a square product: large enough for a blocked one, small enough to be short
SECONDS = 300.0


def peaks(threads: int) -> dict[str, float]:
    """The copy: a median, as the figures that are held against it. Products: the lower quartile of their times, since a
    peak is what nothing disturbed. "peak" is the faster of them."""
    torch.set_num_threads(threads)
    found = {"copy": 2 * COPY_BYTES / copy_speed().median}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        found[name] = 2.0 * SIZE**3 / measure(lambda a=a, b=b: torch.nn.functional.linear(a, b)).low  # type: ignore[misc]
    return {**found, "peak": max(found["f32"], found["bf16"])}


def ask(threads: int) -> dict[str, float]:
    """`peaks` in a process of its own, so that no thread pool stays behind. RuntimeError: it failed."""
    command = [sys.executable, "-m", "benchmarks.cpu.yardstick", str(threads)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(threads, False), capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"the machine's own speed could not be measured: {done.stderr.strip()[-200:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(peaks(int(sys.argv[1]))))
