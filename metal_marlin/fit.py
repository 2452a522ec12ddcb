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
from typing import Any, NoReturn

import torch

from metal_marlin.mapping import DTYPES
from metal_marlin.weights import Checkpoint

GB = 1e9
DEFAULT_CONTEXT = 4096
MOST_CONTEXT = 1 << 40
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
    longest: int | None = None  # tokens that the model is made for

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

    ValueError: a context that isn't positive, no config.json, or one that lacks a size or has something else for it.
    """
    if not config:
        raise ValueError(
            f"{checkpoint.directory} has no config.json, or an empty one; expected the model's sizes there"
        )
    config = text_config(config)
    longest = optional(config, "max_position_embeddings")
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if not 1 <= context <= MOST_CONTEXT:
        raise ValueError(f"context is {context}; expected at least 1, and at most {MOST_CONTEXT}")
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
        top_k=optional(config, "num_experts_per_tok") or optional(config, "moe_topk") or 1,
        expert_bytes=max(by_expert.values(), default=0),
        longest=longest or None,
    )


def longest_context(config: dict[str, Any], need: Need, free: int, dtype: torch.dtype) -> int:
    """The most tokens, of those that the model is made for, with which it fits into so many bytes; 0: none."""
    config, room = text_config(config), free - need.total() + need.kv_cache + need.activations
    low, high = 0, min(need.context, need.longest or need.context) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = kv_cache_bytes(config, middle, dtype) + activation_bytes(config, middle, dtype) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that says what the language model is."""
    found = config.get("text_config") or config
    if not isinstance(found, dict):
        raise ValueError(f"config.json: text_config is {found!r}; expected an object")
    return found


def size(config: dict[str, Any], name: str) -> int:
    """A size that config.json must have."""
    return optional(config, name) or _refuse(name, config.get(name), "a positive number")


def optional(config: dict[str, Any], name: str) -> int:
    """A size that config.json may have, 0 if it hasn't. Of a list, one for each layer, the largest."""
    value = config.get(name) or 0
    if isinstance(value, list) and all(type(each) is int for each in value):
        value = max(value)
    if type(value) is not int or value < 0:
        _refuse(name, config[name], "a positive number")
    return value


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ValueError(f"config.json: {name} is {value!r}; expected {expected}")


def kv_cache_bytes(config: dict[str, Any], context: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers for `context` tokens, as transformers' DynamicCache holds them.

    Layers whose layer_types say sliding_attention keep a window; linear_attention ones keep a state that doesn't grow.
    Models with compressed keys and values (kv_lora_rank) are counted expanded, which is what transformers caches.
    """
    layers, heads = size(config, "num_hidden_layers"), size(config, "num_attention_heads")
    if optional(config, "kv_lora_rank"):
        key = optional(config, "qk_nope_head_dim") + optional(config, "qk_rope_head_dim")
        each = heads * (key + (optional(config, "v_head_dim") or key))
    else:
        head = optional(config, "head_dim") or size(config, "hidden_size") // heads
        each = 2 * (optional(config, "num_key_value_heads") or heads) * head
    kinds = config.get("layer_types") or ["full_attention"] * layers
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        _refuse("layer_types", kinds, "a list of names")
    window = min(context, optional(config, "sliding_window") or context)
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
    width = 8 * max(hidden, heads * (optional(config, "head_dim") or hidden // heads))
    width += 2 * optional(config, "intermediate_size")
    return context * width * max(dtype.itemsize, 2) + SCRATCH_BYTES + 4 * optional(config, "vocab_size")


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


def gigabytes(nbytes: int, least: int = 0) -> str:
    """Bytes as --cache-gb takes them: rounded down to four digits, but not below `least`."""
    unit: int = 10 ** max(0, len(str(nbytes)) - 4)
    return f"{max(nbytes // unit * unit, least) / GB:.9f}".rstrip("0").rstrip(".")


def options(need: Need, free: Free, *, gpu: bool, machine: int, context: int = 0) -> list[str]:
    """What a user can do about a model that doesn't fit, the mildest first. context: the longest one that fits."""
    found = []
    command = raise_limit_command(need.total(), machine) if gpu else None
    if command:
        found.append(f"let the GPU use more, until the next start: {command}")
    if context:
        found.append(f"a shorter context: --context {context}, or metal_marlin.hf.loading(context={context}), fits")
    room = free.free - need.total(0)
    if need.experts and not gpu and room >= need.least_cache:
        gb = gigabytes(room, need.least_cache)
        found.append(
            f"keep {gb} GB of experts in memory and read the others when they are needed: --cache-gb {gb}, or"
            f" metal_marlin.hf.loading(cache_bytes={room})"
        )
    if need.kv_cache + need.activations < free.free:
        found.append("fewer bits: the same model quantized to a lower rate")
    found.append(
        "load it all the same: --no-check, or metal_marlin.hf.loading(check=False); it may be slow, or be ended"
    )
    return found


def refusal(
    where: object, need: Need, free: Free, cache_bytes: int | None = None, *, gpu: bool = False, context: int = 0
) -> str | None:
    """Why the model isn't loaded, with the numbers and the options; None if it fits."""
    total = need.total(cache_bytes)
    if total <= free.free:
        return None
    lines = [
        f"{where} does not fit: it needs {total / GB:.2f} GB ({amounts(need, cache_bytes)});"
        f" {free.free / GB:.2f} of {free.total / GB:.2f} GB are free ({free.source})",
        *options(need, free, gpu=gpu, machine=free_memory().total if gpu else free.total, context=context),
    ]
    return "\n  - ".join(lines)
