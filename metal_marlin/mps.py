"""Whether the Apple GPU path is on in this process, and if not, why: what `info`, `selftest` and the loaders ask.

The extension knows whether torch has the C functions it needs; the rest is said by torch and by the system.
"""

from __future__ import annotations

import platform
from typing import Any

import torch

from metal_marlin import _C

#: Metal's bfloat type, which the kernels name, came with macOS 14 (Metal 3.1).
OLDEST_MACOS = (14, 0)
STATUS = "Metal kernels: in, not run on a Mac yet"


def mps_problem() -> str | None:
    """Why ops on MPS tensors don't run here, the first reason in the order in which a user can do something about it.

    None: they do.
    """
    system, machine, release = platform.system(), platform.machine(), platform.mac_ver()[0]
    if system != "Darwin":
        return f"this is {system}; expected macOS, which alone has Metal"
    if machine != "arm64":
        return f"this Python runs as {machine}; expected arm64: Apple silicon, and a Python that is not translated"
    if release and tuple(int(part) for part in release.split(".")[:2]) < OLDEST_MACOS:
        return f"this is macOS {release}; expected {'.'.join(map(str, OLDEST_MACOS))} or newer"
    if not torch.backends.mps.is_built():
        return f"torch {torch.__version__} was built without MPS; expected the macOS arm64 build"
    missing = _C.mps_problem()
    if missing is not None:
        return f"{missing}; expected torch 2.10 or newer for macOS"
    if not torch.backends.mps.is_available():
        return "torch.backends.mps.is_available() is False: torch sees no Metal device, as in some virtual machines"
    return None


def facts() -> dict[str, Any]:
    """The part `mps` of `info --json`."""
    reason = mps_problem()
    return {
        "active": reason is None,
        "reason": reason,
        "status": STATUS,
        "macos": platform.mac_ver()[0] or None,
        "torch_built_with_mps": torch.backends.mps.is_built(),
        "torch_sees_a_gpu": torch.backends.mps.is_available(),
        "torch_lacks": _C.mps_problem(),
    }
