"""`fit`: whether a model fits into this machine's memory, read from its headers; loads no weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from metal_marlin import fit as arithmetic
from metal_marlin.fit import GB
from metal_marlin.mps import mps_problem
from metal_marlin.weights import Checkpoint

EXIT_DOES_NOT_FIT = 1


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `fit --json` prints. ValueError: nothing quantized in the folder, no such GPU, a context below 1."""
    if arguments.context is not None and arguments.context < 1:
        raise ValueError(f"--context is {arguments.context}; expected at least 1")
    gpu = arguments.device == "mps"
    if gpu and (problem := mps_problem()):
        raise ValueError(f"--device is mps, which is off: {problem}")
    with Checkpoint(arguments.directory) as checkpoint:
        if not checkpoint.groups:
            raise ValueError(f"{checkpoint.directory} is not an EXL3 model: none of its tensors is a .trellis")
        stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
        name = stored if arguments.dtype == "auto" else arguments.dtype
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name), torch.float32)
        config = checkpoint.config
        need = arithmetic.need_of(checkpoint, checkpoint.config, arguments.context, dtype)
    free = arithmetic.free_gpu_memory() if gpu else arithmetic.free_memory()
    machine = arithmetic.free_memory().total
    fits = need.total() <= free.free
    context = 0 if fits else arithmetic.longest_context(config, need, free.free, dtype)
    return {
        "directory": arguments.directory,
        "device": arguments.device,
        "dtype": str(dtype).removeprefix("torch."),
        "needs": {**dataclasses.asdict(need), "total": need.total(), "least_cache": need.least_cache},
        "memory": dataclasses.asdict(free),
        "fits": fits,
        "options": [] if fits else arithmetic.options(need, free, gpu=gpu, machine=machine, context=context),
    }


def fit(arguments: argparse.Namespace) -> int:
    """Prints the numbers and the verdict; exit status 1 if the model doesn't fit."""
    found = facts(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        needs, memory, longest = found["needs"], found["memory"], found["needs"]["longest"]
        beyond = f"; the model is made for {longest}" if longest and needs["context"] > longest else ""
        rows = [
            (
                "routed experts",
                needs["experts"],
                f"a cache can be as small as {arithmetic.gigabytes(needs['least_cache'], needs['least_cache'])} GB",
            ),
            ("other weights", needs["dense"], f"scales, attention, embeddings ({found['dtype']})"),
            ("KV cache", needs["kv_cache"], f"{needs['context']} tokens{beyond}"),
            ("activations", needs["activations"], "at most, while those tokens are read"),
            ("needed", needs["total"], ""),
            ("free", memory["free"], f"of {memory['total'] / GB:.2f} GB: {memory['source']}"),
        ]
        for name, value, note in rows:
            print(f"{name:<15} {value / GB:>9.3f} GB  {note}".rstrip())
        print("it fits" if found["fits"] else "it does not fit")
        for option in found["options"]:
            print(f"  - {option}")
    return 0 if found["fits"] else EXIT_DOES_NOT_FIT
