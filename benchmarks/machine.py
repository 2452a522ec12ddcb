"""The machine a figure was taken on, and the memory bandwidth that it should be held against."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import metal_marlin
from benchmarks.timing import Timing, measure

COPY_BYTES = 2**28  # far beyond any cache


def processor() -> str:
    """The processor's name as the system tells it, and its numbers: on virtual machines the name often says little."""
    if platform.system() == "Darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    numbers = [f"{name.split()[-1]} {facts[name]}" for name in ("cpu family", "model") if facts.get(name)]
    return facts.get("model name", platform.machine()) + (f" ({', '.join(numbers)})" if numbers else "")


def commit() -> str:
    """The commit of this folder, with + if there are changes on top; 'unknown' outside a clone."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def copy_speed() -> Timing:
    """Bytes read and written by a large copy on all of torch's threads."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source))


def describe() -> dict[str, str]:
    """What every report starts with."""
    return {
        "machine": f"{processor()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}",
        "metal_marlin": f"{metal_marlin.__version__}, commit {commit()}, levels {', '.join(metal_marlin.cpu_levels())}",
    }
