"""One load in a process of its own, measured: prints a JSON object. `read`: the file once, with read(); `ours`:
from_pretrained; `copy`: every tensor through safetensors, copied into memory of its own."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIELDS = {"Rss": "rss", "Pss": "pss", "Anonymous": "anonymous"}


def memory() -> dict[str, int]:
    """Bytes of this process as the kernel counts them; zeros where it doesn't (not Linux)."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return dict.fromkeys(FIELDS.values(), 0)
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    return {name: int(found[field]) * 1024 for field, name in FIELDS.items()}


def read(directory: Path) -> Any:
    buffer = bytearray(8 << 20)
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def ours(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16")


def copy(directory: Path) -> Any:
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 -- no dict
    return tensors


WAYS: dict[str, Callable[[Path], Any]] = {"read": read, "ours": ours, "copy": copy}


def main(way: str, directory: Path) -> dict[str, Any]:
    """Seconds of wall and of CPU, and bytes that the process then has more than before."""
    if way != "read":  # imports are no part of a load
        import torch  # noqa: F401

    if way == "ours":
        import transformers

        import metal_marlin.hf  # noqa: F401

        transformers.logging.disable_progress_bar()
        assert transformers.AutoModelForCausalLM.from_pretrained  # imports lazily
        import transformers.models.qwen3_moe.modeling_qwen3_moe
    if way == "copy":
        import safetensors.torch  # noqa: F401
    before, wall, cpu = memory(), time.perf_counter(), time.process_time()
    kept = WAYS[way](directory)
    seconds, busy = time.perf_counter() - wall, time.process_time() - cpu
    after = memory()
    del kept
    return {"seconds": seconds, "cpu": busy, **{name: after[name] - before[name] for name in after}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
