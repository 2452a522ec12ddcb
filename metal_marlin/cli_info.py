"""`info`: versions, the kernels that run here, and why the others don't."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from metal_marlin import _C, mps, mps_mapped
from metal_marlin._version import __version__

LEVEL_VARIABLE = "METAL_MARLIN_CPU"


def version_of(package: str) -> str | None:
    """The installed version of a package, None if there is none; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """What `info --json` prints."""
    return {
        "metal_marlin": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "cpu": {
            "active": True,
            "level": _C.cpu_level(),
            "levels": list(_C.cpu_levels()),
            "override": os.environ.get(LEVEL_VARIABLE),
            "threads": torch.get_num_threads(),
        },
        "mps": mps.facts(),
        "weights": {"cpu": "mapped", "mps": mps_mapped.status()},
        "codebooks": {name: [rate / 2 for rate in _C.RATES2[name]] for name in _C.CODEBOOKS},
        "activations": list(_C.ACTIVATIONS),
        "routers": list(_C.ROUTERS),
        "max_experts": _C.MAX_EXPERTS,
        "max_top_k": _C.MAX_TOP_K,
    }


def rates(values: list[float]) -> str:
    """1-8 and 1.5, 2.5, 3.5: whole rates as a range, the rest one by one."""
    whole = [f"{value:g}" for value in values if value == int(value)]
    halves = [f"{value:g}" for value in values if value != int(value)]
    return " and ".join(part for part in (f"{whole[0]}-{whole[-1]}", ", ".join(halves)) if part)


def info(arguments: argparse.Namespace) -> None:
    """Prints the facts as aligned text or as JSON."""
    found = facts()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    cpu, gpu = found["cpu"], found["mps"]
    override = f"{LEVEL_VARIABLE}={cpu['override']}" if cpu["override"] else f"{LEVEL_VARIABLE} is not set"
    lines = [
        ("metal_marlin", found["metal_marlin"]),
        ("python", f"{found['python']} on {found['system']}"),
        ("torch", found["torch"]),
        ("transformers", found["transformers"] or "not installed; generate, perplexity and demo need it"),
        ("CPU", f"active: {cpu['level']} kernels, {cpu['threads']} threads"),
        ("", f"this machine runs {', '.join(cpu['levels'])}; {override}"),
        ("Apple GPU", "active: tensors on mps" if gpu["active"] else f"not active: {gpu['reason']}"),
        ("", f"{gpu['status']}; python -m metal_marlin selftest checks them"),
        ("weights", "on the CPU views of the mapped file (docs/memory.md)"),
        ("", f"on an Apple GPU {found['weights']['mps']}"),
        *(
            ("codebooks" if i == 0 else "", f"{n:<5} at {rates(r)} bits")
            for i, (n, r) in enumerate(found["codebooks"].items())
        ),
        ("activations", ", ".join(found["activations"])),
        ("routers", ", ".join(found["routers"])),
        ("limits", f"{found['max_experts']} experts, {found['max_top_k']} of them for a token"),
    ]
    for name, value in lines:
        print(f"{name:<13} {value}")
