"""Several processes of one gloo group for a test: forked from a server that has imported torch, so they start at once.

`run` gives every rank a function of this file and brings back what it returned or raised. No rank outlives it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What became of a rank: the value or the error's text, None both if it died; seconds from the start to then."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None
    seconds: float = 0.0


def run(
    folder: Path, size: int, function: Callable[..., Any], *args: Any, stalls: int | None = None, limit: float = 60.0
) -> list[Outcome]:
    """function(rank, size, *args) in `size` processes, for at most `limit` seconds; `stalls` is a rank that need not
    end. Whoever still runs is killed, and has no exit code."""
    context = _server()
    store = folder / f"store-{time.monotonic_ns()}"
    outcomes = [Outcome() for _ in range(size)]
    processes, pipes = [], {}
    begin = time.monotonic()
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, str(store), rank, size, function, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = rank
        while pipes and time.monotonic() - begin < limit:
            for pipe in wait(list(pipes), timeout=1.0):
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    outcomes[rank].value, outcomes[rank].error = pickle.loads(pipe.recv_bytes())
                except EOFError:  # it died
                    processes[rank].join(5)
                outcomes[rank].seconds = time.monotonic() - begin
                pipe.close()
            if set(pipes.values()) == {stalls}:
                break
        for rank, process in enumerate(processes):
            if rank not in pipes.values():
                process.join(10)
                outcomes[rank].exitcode = process.exitcode
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return outcomes


@cache
def _server() -> Any:
    """The context of a server that has imported all that ranks need. Python before 3.13 doesn't tell it sys.path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "metal_marlin.sharding", "ranks", "sharded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; fails with the first error."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        assert outcome.exitcode == 0, f"rank {rank} ended with {outcome.exitcode}"
    return [outcome.value for outcome in outcomes]


def _rank(
    pipe: Connection, store: str, rank: int, size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    try:
        pipe.send_bytes(pickle.dumps((function(rank, size, *args), None)))  # a copy: torch's own way shares memory
    except BaseException as error:
        traceback.print_exc()
        pipe.send_bytes(pickle.dumps((None, f"{type(error).__name__}: {error}")))
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def die() -> None:
    """As the out-of-memory killer ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)
