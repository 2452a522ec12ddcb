"""The device under test, through torch.accelerator: waiting for it, committing, memory, its name.

Owns the difference between devices. Waiting is watched: a device that does not answer for `timeout` seconds ends the
program through `late`, since a thread that waits inside a driver can't be interrupted.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.dispatch.result import Refused
from metal_marlin import _C
from metal_marlin.mps import mps_problem

KINDS = ("mps", "cuda", "xpu", "cpu")
EXIT_LATE = 3
POLL_SECONDS = 0.2


def _exit_late(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_LATE)


#: Called from the watching thread when the device is late. The command replaces it, to print what it has first.
late: Callable[[str], None] = _exit_late


class Watch:
    """Calls `late` once when a wait lasts longer than `timeout` seconds. Costs the waiting thread two assignments."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.since, self.what = timeout, 0.0, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(min(POLL_SECONDS, self.timeout / 4)):
            since = self.since
            if since and time.monotonic() - since > self.timeout:
                late(f"the device has not answered for {self.timeout:g} s; gave up waiting (--timeout sets how long)")
                return

    def close(self) -> None:
        self._end.set()


@dataclass
class Device:
    """A torch device and how to wait for it. `asynchronous`: whether launching an op returns before it has run."""

    type: str
    timeout: float = 60.0
    _watch: Watch | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.torch = torch.device(self.type)
        self.asynchronous = self.type != "cpu"
        if self.asynchronous:
            self._watch = Watch(self.timeout)

    def close(self) -> None:
        """Ends the watching thread."""
        if self._watch:
            self._watch.close()

    def wait(self) -> None:
        """Returns when everything that was launched has run."""
        watch = self._watch
        if watch is None:
            return
        watch.since = time.monotonic()
        torch.accelerator.synchronize()
        watch.since = 0.0

    @property
    def commits(self) -> str | None:
        """Why "commit without waiting" is not a thing of its own here, None if it is one."""
        if self.type == "mps":
            return _C.mps_commit_problem()
        if self.type == "cpu":
            return "a CPU has no queue to commit to: an op has run when the call returns"
        return (
            f"{self.type} has no separate commit: every launch goes to the queue at once, so this is the batch column"
        )

    def commit(self) -> None:
        """MPS: hands what is encoded so far to the GPU, without waiting. Elsewhere nothing is held back."""
        if self.type == "mps":
            _C.mps_commit()

    @property
    def packed_ops(self) -> bool:
        """Whether metal_marlin's ops have kernels here."""
        return self.type in ("cpu", "mps")

    @property
    def name(self) -> str:
        """The device as its driver calls it."""
        if self.type in ("cuda", "xpu"):
            return str(getattr(torch, self.type).get_device_name())
        return f"the GPU of this {platform.machine()} Mac" if self.type == "mps" else "CPU"

    def free_bytes(self) -> int | None:
        """Memory that may still be asked for, None where nobody tells."""
        if self.type in ("cuda", "xpu"):
            free: int = getattr(torch, self.type).mem_get_info()[0]
            return free
        if self.type == "mps":
            return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        return host_free_bytes()

    def allocated_bytes(self) -> int | None:
        """Bytes in live tensors by the allocator's own count, None where it keeps none."""
        if self.type == "mps":
            return torch.mps.current_allocated_memory()
        if self.type in ("cuda", "xpu"):
            count: int = getattr(torch, self.type).memory_allocated()
            return count
        return None

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """The most bytes in live tensors while `work` runs, above those at its start. None where nobody counts."""
        if self.type not in ("cuda", "xpu"):
            return None
        module = getattr(torch, self.type)
        self.wait()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        result = work()
        self.wait()
        peak: int = module.max_memory_allocated() - before
        del result
        return peak


def host_free_bytes() -> int | None:
    """The CPU's memory that may still be asked for, None where nobody tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def default_kind() -> str:
    """The accelerator that torch has, "cpu" without one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator is not None else "cpu"
    return kind if kind in KINDS and not (kind == "mps" and mps_problem()) else "cpu"


def check_kind(kind: str) -> None:
    """Refused: not a device that is here; the message says why."""
    if kind not in KINDS:
        raise Refused(f"--device is {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "mps" and (problem := mps_problem()):
        raise Refused(f"--device is mps, which is off: {problem}")
    if kind in ("cuda", "xpu") and not getattr(torch, kind).is_available():
        raise Refused(f"--device is {kind}, of which torch {torch.__version__} sees none here")
