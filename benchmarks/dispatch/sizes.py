"""Which sizes a run uses, what they need in memory, and which are refused. Owns the defaults of every device."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.dispatch.device import Device
from benchmarks.dispatch.result import Refused, Settings
from metal_marlin import _C

#: The study's, on a GPU; a quarter of each width on a CPU, where the study's layer takes seconds.
GPU: dict[str, Any] = {"batch": 128, "hidden": 4096, "intermediate": 14336, "layers": 4}
CPU: dict[str, Any] = {"batch": 32, "hidden": 1024, "intermediate": 3584, "layers": 4}
QUICK: dict[str, Any] = {"batch": 8, "hidden": 256, "intermediate": 512, "layers": 2, "repeats": 7, "seconds": 8.0}
#: What each device multiplies fastest, 2 bytes on every GPU as in the study.
DTYPES = {"cpu": "float32", "mps": "float16", "cuda": "bfloat16", "xpu": "bfloat16"}
BITS, CODEBOOK = 2.0, "mul1"  # of packed experts
MULTIPLE = 128  # of hidden and intermediate: the width of a packed block
SHARE = 0.8  # of free memory that a run may take


def defaults(kind: str, quick: bool = False) -> dict[str, Any]:
    """Settings of a device that has not been asked for anything else."""
    sizes = {**(CPU if kind == "cpu" else GPU), **(QUICK if quick else {})}
    return {**sizes, "device": kind, "dtype": DTYPES[kind], "quick": quick}


def element_bytes(dtype: str) -> int:
    """Bytes of one number of a torch dtype's name."""
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise Refused(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16")
    return found.itemsize


def needed_bytes(settings: Settings, packed: bool) -> dict[str, int]:
    """Bytes that the run holds at once, part by part; an estimate from the sizes alone, good to a few percent."""
    s, size = settings, element_bytes(settings.dtype)
    matrix, pairs = s.hidden * s.intermediate, s.batch * s.top_k
    a_weight = 2 * BITS / 8 if packed else size  # packed ones are held twice: stacked, and one by one for the loop
    return {
        "experts": int(3 * s.experts * matrix * a_weight),
        "dense expert": 3 * matrix * size + s.layers * s.hidden * s.hidden * size,
        "activations": pairs * (4 * s.intermediate + 2 * s.hidden) * 4 + 8 * s.batch * s.hidden * 4,
    }


def amount(count: float) -> str:
    """Bytes for people: 3.5 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count:,.1f} {unit}"


def check(settings: Settings, device: Device) -> None:
    """Refused: sizes that mean nothing, that the ops don't take, or that don't fit; the message has the numbers."""
    s = settings
    for name in ("batch", "hidden", "intermediate", "experts", "top_k", "layers", "repeats"):
        if getattr(s, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(s, name)}; expected at least 1")
    for name in ("seconds", "timeout"):
        if not 0 < getattr(s, name) < 1e6:
            raise Refused(f"--{name} is {getattr(s, name):g}; expected more than 0 and less than 1,000,000 seconds")
    if not 0 < s.threshold < 10:
        raise Refused(f"--threshold is {s.threshold:g}; expected a fraction such as 0.15")
    for name in ("hidden", "intermediate"):
        if getattr(s, name) % MULTIPLE:
            raise Refused(
                f"--{name} is {getattr(s, name)}; expected a multiple of {MULTIPLE}, the width of a packed block"
            )
    if s.experts > _C.MAX_EXPERTS:
        raise Refused(f"--experts is {s.experts}; expected at most {_C.MAX_EXPERTS}")
    if s.top_k > min(s.experts, _C.MAX_TOP_K):
        raise Refused(f"--top-k is {s.top_k}; expected at most {min(s.experts, _C.MAX_TOP_K)}, of {s.experts} experts")
    parts = needed_bytes(s, device.packed_ops)
    needed, free = sum(parts.values()), device.free_bytes()
    if free is not None and needed > SHARE * free:
        listed = ", ".join(f"{name} {amount(value)}" for name, value in parts.items())
        raise Refused(
            f"these sizes need {amount(needed)} ({listed}); {device.name} has {amount(free)} free, of which a run takes"
            f" at most {SHARE:.0%}: make --batch, --hidden, --intermediate, --experts or --layers smaller"
        )
