"""Does a model fit? What it needs, from its headers and config.json, against what is free: before anything is loaded.

Owns the arithmetic (docs/memory.md spells it out), the reading of free memory, and the message that refuses.
"""

from __future__ import annotations

import math
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metal_marlin.mapping import DTYPES
from metal_marlin.weights import Checkpoint

GB = 1e9
DEFAULT_CONTEXT = 4096
SCRATCH_BYTES = 64 << 20  # csrc/cpu/moe.c cuts a call's rows into chunks of so much
#: Left to the system when a higher wired limit is proposed: a GPU that wires all of memory hangs a Mac.
MAC_RESERVE_BYTES = 4 << 30


@dataclass(frozen=True)
class Need:
    """Bytes that a loaded model takes. `experts`: the routed experts' tiles, which a cache can hold in part."""

    experts: int
    dense: int
    kv_cache: int
    activations: int
    context: int
    top_k: int
    expert_bytes: int  # the largest expert's tiles: what one slot of a cache takes

    def total(self, cache_bytes: int | None = None) -> int:
        """All of them, with all experts in memory or with a cache of so many bytes."""
        experts = self.experts if cache_bytes is None else min(cache_bytes, self.experts)
        return experts + self.dense + self.kv_cache + self.activations

    @property
    def least_cache(self) -> int:
        """The smallest cache that works: one token's experts of one layer."""
        return self.top_k * self.expert_bytes


@dataclass(frozen=True)
class Free:
    """Bytes that can be had: `free` of `total`, and what says so."""

    free: int
    total: int
    source: str


def need_of(
    checkpoint: Checkpoint, config: dict[str, Any], context: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Need:
    """What a model takes on one device, one sequence of `context` tokens, activations and plain tensors in `dtype`.

    ValueError: a context that isn't positive, or a config that lacks a size.
    """
    config = config.get("text_config") or config
    if context is None:
        context = min(DEFAULT_CONTEXT, config.get("max_position_embeddings") or DEFAULT_CONTEXT)
    if context < 1:
        raise ValueError(f"context is {context}; expected at least 1")
    experts, by_expert = 0, dict[str, int]()
    packed = {name for group in checkpoint.groups.values() for name in group.names.values()}
    dense = 0
    for group in checkpoint.groups.values():
        trellis = checkpoint.tensors[group.names["trellis"]].nbytes
        match = re.match(r"(.*\bexperts\.\d+)\.", group.prefix)
        if match:
            experts += trellis
            by_expert[match[1]] = by_expert.get(match[1], 0) + trellis
            dense += group.nbytes - trellis  # scales are joined, and stay
        else:
            dense += group.nbytes
    for name, info in checkpoint.tensors.items():
        if name not in packed:
            stored = DTYPES.get(info.dtype)
            cast = stored is not None and stored.is_floating_point and stored.itemsize > 1
            dense += math.prod(info.shape) * dtype.itemsize if cast else info.nbytes
    return Need(
        experts=experts,
        dense=dense,
        kv_cache=kv_cache_bytes(config, context, dtype),
        activations=activation_bytes(config, context, dtype),
        context=context,
        top_k=config.get("num_experts_per_tok") or config.get("moe_topk") or 1,
        expert_bytes=max(by_expert.values(), default=0),
    )


def size(config: dict[str, Any], name: str) -> int:
    """A size that config.json must have."""
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {name} is {value!r}; expected a positive number")
    return value


def kv_cache_bytes(config: dict[str, Any], context: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers for `context` tokens, as transformers' DynamicCache holds them.

    Layers whose layer_types say sliding_attention keep a window; linear_attention ones keep a state that doesn't grow.
    Models with compressed keys and values (kv_lora_rank) are counted expanded, which is what transformers caches.
    """
    layers, heads = size(config, "num_hidden_layers"), size(config, "num_attention_heads")
    if config.get("kv_lora_rank"):
        key = (config.get("qk_nope_head_dim") or 0) + (config.get("qk_rope_head_dim") or 0)
        each = heads * (key + (config.get("v_head_dim") or key))
    else:
        head = config.get("head_dim") or size(config, "hidden_size") // heads
        each = 2 * (config.get("num_key_value_heads") or heads) * head
    kinds = config.get("layer_types") or ["full_attention"] * layers
    window = min(context, config.get("sliding_window") or context)
    tokens = sum(
        0 if "linear" in kind or "mamba" in kind else window if "sliding" in kind or "chunked" in kind else context
        for kind in kinds
    )
    return tokens * each * dtype.itemsize


def activation_bytes(config: dict[str, Any], context: int, dtype: torch.dtype) -> int:
    """A prefill of `context` tokens at its widest, generously.

    Eight rows of the model's width a token (residual, norm, queries, keys, values, attention's output, the mixture's
    input and float32 output), one layer's dense or shared expert's gate and up, the ops' scratch, one row of logits.
    """
    hidden = size(config, "hidden_size")
    heads = size(config, "num_attention_heads")
    width = 8 * max(hidden, heads * (config.get("head_dim") or hidden // heads)) + 2 * (
        config.get("intermediate_size") or 0
    )
    return context * width * max(dtype.itemsize, 2) + SCRATCH_BYTES + 4 * (config.get("vocab_size") or 0)


# ---- what is free ----


def free_memory() -> Free:
    """Memory of this machine, or of the control group that this process is confined to, whichever is less."""
    if platform.system() == "Darwin":
        return _mac_memory()
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    machine = Free(int(fields["MemAvailable"]) * 1024, int(fields["MemTotal"]) * 1024, "MemAvailable in /proc/meminfo")
    group = cgroup_memory()
    return machine if group is None or group.free >= machine.free else group


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Free | None:
    """The tightest limit of this process's control groups, version 2 or 1; None if there is none.

    Page cache counts towards a group's use but is given back under pressure (inactive_file), so it counts as free.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place != base and base not in place.parents:
                break
            limit, used = (_number(place / name) for name in names)
            if limit is not None and used is not None and limit < 1 << 60:
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(place / "memory.stat"), re.MULTILINE)
                free = limit - used + (int(cached[1]) if cached else 0)
                found.append(Free(max(0, min(free, limit)), limit, f"{place / names[0]}"))
    return min(found, key=lambda each: each.free, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _sysctl(name: str) -> int:
    out = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=True)
    return int(out.stdout)


def _mac_memory() -> Free:
    """Free, purgeable and file-backed pages: what macOS gives without compressing others' memory."""
    names = ("vm.page_free_count", "vm.page_purgeable_count", "vm.page_pageable_external_count")
    pages = sum(_sysctl(name) for name in names)
    source = "free, purgeable and file-backed pages, sysctl vm"
    return Free(pages * _sysctl("hw.pagesize"), _sysctl("hw.memsize"), source)


def free_gpu_memory() -> Free:
    """What Metal recommends that a process use at most, less what torch holds of it."""
    limit = torch.mps.recommended_max_memory()
    return Free(limit - torch.mps.driver_allocated_memory(), limit, "torch.mps.recommended_max_memory()")


# ---- the verdict ----


def raise_limit_command(need: int, machine: int) -> str | None:
    """The command that lets a Mac's GPU wire so many bytes of `machine`; None if too little would be left to macOS.

    Lasts until the next start. Source: Apple's MLX, documentation of mlx.core.set_wired_limit.
    """
    megabytes = -(-need // 2**20)
    return f"sudo sysctl iogpu.wired_limit_mb={megabytes}" if need <= machine - MAC_RESERVE_BYTES else None


def amounts(need: Need, cache_bytes: int | None = None) -> str:
    """One sentence of what makes up a need."""
    experts = need.experts if cache_bytes is None else min(cache_bytes, need.experts)
    parts = [("experts" if cache_bytes is None else "cache of experts", experts), ("other weights", need.dense)]
    parts += [(f"KV cache of {need.context} tokens", need.kv_cache), ("activations", need.activations)]
    return ", ".join(f"{name} {value / GB:.2f}" for name, value in parts if value)


def options(need: Need, free: Free, *, gpu: bool, machine: int) -> list[str]:
    """What a user can do about a model that doesn't fit, the mildest first."""
    found = []
    command = raise_limit_command(need.total(), machine) if gpu else None
    if command:
        found.append(f"let the GPU use more, until the next start: {command}")
    if need.kv_cache + need.activations > need.total() - free.free:
        found.append("a shorter context: --context N, or metal_marlin.hf.loading(context=N)")
    room = free.free - need.total(0)
    if need.experts and not gpu and room >= need.least_cache:
        found.append(
            f"keep {room / GB:.2f} GB of experts in memory and read the others when they are needed:"
            f" --cache-gb {int(room / 1e7) / 100:g}, or metal_marlin.hf.loading(cache_bytes={room})"
        )
    found.append("fewer bits: the same model quantized to a lower rate")
    found.append(
        "load it all the same: --no-check, or metal_marlin.hf.loading(check=False); it may be slow, or be ended"
    )
    return found


def refusal(where: object, need: Need, free: Free, cache_bytes: int | None = None, *, gpu: bool = False) -> str | None:
    """Why the model isn't loaded, with the numbers and the options; None if it fits."""
    total = need.total(cache_bytes)
    if total <= free.free:
        return None
    lines = [
        f"{where} does not fit: it needs {total / GB:.2f} GB ({amounts(need, cache_bytes)});"
        f" {free.free / GB:.2f} of {free.total / GB:.2f} GB are free ({free.source})",
        *options(need, free, gpu=gpu, machine=free_memory().total if gpu else free.total),
    ]
    return "\n  - ".join(lines)
