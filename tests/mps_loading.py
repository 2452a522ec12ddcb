"""Loading a transformers model to the emulated GPU: where CPU tensors stand for those of MPS, so do the device map's.

As a program it measures one load, in copies and in the process's memory, and prints a JSON object:

    PYTHONPATH=. python tests/mps_loading.py DIR [--copy]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import metal_marlin._C as _C

COPIES: list[torch.Tensor] = []  # what the last load moved to the GPU, rather than leave it where it was


def to_gpu(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What transformers' loader does to each tensor, to("mps"), where both sides are of the CPU: what is not on the GPU
    yet goes to new memory, and is written down."""
    found: torch.Tensor = tensor[...].to(dtype=dtype)
    if not _C.map_window_holds(found.untyped_storage().data_ptr()):
        found = found.clone()
        COPIES.append(found)
    return found


def load(emulator: Any, folder: Path, **options: Any) -> Any:
    """The model of a folder on the emulated GPU, which has to be on. `options` are those of metal_marlin.hf.loading."""
    import transformers
    from transformers import core_model_loading
    from transformers.integrations import accelerate

    import metal_marlin.hf

    fuse, path = metal_marlin.hf.fuse_routers, emulator.load()._name

    def fuse_and_wait(model: Any) -> None:
        """Compares routers with the op, and would read results too early."""
        _C.use_mps_emulator(None)
        fuse(model)
        _C.use_mps_emulator(path)

    COPIES.clear()
    with (
        mock.patch.object(metal_marlin.hf, "fuse_routers", fuse_and_wait),
        mock.patch.object(core_model_loading, "_materialize_copy", to_gpu),
        mock.patch.object(accelerate, "is_accelerate_available", return_value=True),  # asked for only
        metal_marlin.hf.loading(check=False, **options),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32", device_map="cpu").eval()
    for module in model.modules():
        if type(module).__name__ in ("TrellisLinear", "TrellisExperts", "FusedRouter"):
            module.register_forward_hook(lambda *_: emulator.synchronize())  # what torch does next would not wait
    return model


def measure(folder: Path, copy: bool) -> dict[str, Any]:
    """Seconds, bytes that were copied, and what the process has more than before: its own and the page cache's."""
    import emulator
    from emulator import metal

    import metal_marlin.hf  # noqa: F401  imports are no part of a load
    from benchmarks.memory.worker import memory

    _C.use_metal_fake(metal.path())
    _C.use_mps_emulator(emulator.load()._name)
    before, begin = memory(), time.perf_counter()
    model = load(emulator, folder, copy=copy)
    seconds, after = time.perf_counter() - begin, memory()
    packed = sum(tensor.nbytes for tensor in COPIES if tensor.dtype == torch.int16)
    total = sum(tensor.nbytes for tensor in COPIES)
    COPIES.clear()
    for name, tensor in model.named_buffers():
        if name.endswith("trellis"):
            tensor.view(-1)[:: _C.page_bytes() // 2].sum()  # as after a first use
    used = memory()
    return {
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": seconds,
        "copied_bytes": total,
        "copied_tile_bytes": packed,
        "loaded": {name: after[name] - before[name] for name in after},
        "used": {name: used[name] - before[name] for name in used},
        "placement": str(getattr(model, "metal_marlin_placement", None)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--copy", action="store_true", help="copy every tensor, as before")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.directory, arguments.copy)))
