"""What the C extension (csrc/module.c) defines; the ops are reached through torch.ops.metal_marlin."""

import os

CODEBOOKS: tuple[str, ...]
MULTIPLIERS: dict[str, int]
RATES2: dict[str, tuple[int, ...]]
ACTIVATIONS: tuple[str, ...]
ROUTERS: tuple[str, ...]
MAX_EXPERTS: int
MAX_TOP_K: int
HADAMARD: int
TILE: int

def cpu_level() -> str: ...
def cpu_levels() -> tuple[str, ...]: ...
def exact_cpu_levels() -> tuple[str, ...]: ...
def set_cpu_level(name: str) -> None: ...
def mps_problem() -> str | None: ...
def use_mps_emulator(path: str | os.PathLike[str] | None) -> None: ...
