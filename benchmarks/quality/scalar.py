"""Scalar formats to compare with: affine in groups and NF4, by round to nearest in torch, and ggml's types.

Affine is what MLX's quantize does: per group of `group` weights along the inputs a float16 scale and offset from the
smallest and largest weight. NF4 (QLoRA, arXiv:2305.14314, appendix E): 16 quantiles of a Gaussian, scaled by the
largest magnitude of 64 weights. No calibration: both are used that way. ggml's types, GGUF's, are rounded by ggml
itself, without the importance matrix that llama.cpp can take from calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cpu.contender import Absent
from benchmarks.cpu.ggml_library import DEQUANTIZED, Library

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64
SUPERBLOCK = 256  # of ggml's K types


@dataclass(frozen=True)
class Scalar:
    """A format: `bits` per weight with scales, and what it makes of weights [..., inputs]."""

    name: str
    bits: float
    round: Callable[[Tensor], Tensor]


def affine(bits: int, group: int) -> Scalar:
    """`bits` per weight and a float16 scale and offset for each `group` weights."""

    def rounded(weight: Tensor) -> Tensor:
        w = _grouped(weight, group)
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7).half().float()
        offset = low.half().float()
        levels = ((w - offset) / scale).round().clamp(0, 2**bits - 1)
        result: Tensor = (levels * scale + offset).reshape(weight.shape)
        return result

    return Scalar(f"affine {bits} bits, group {group}", bits + 32 / group, rounded)


def nf4() -> Scalar:
    """4 bits and a float16 magnitude for each 64 weights."""
    values = torch.tensor(NF4)
    edges = (values[1:] + values[:-1]) / 2

    def rounded(weight: Tensor) -> Tensor:
        w = _grouped(weight, NF4_BLOCK)
        size = w.abs().amax(-1, keepdim=True).clamp_min(1e-7).half().float()
        levels: Tensor = values[torch.bucketize((w / size).contiguous(), edges)]
        return (levels * size).reshape(weight.shape)

    return Scalar("NF4, block 64", 4 + 16 / NF4_BLOCK, rounded)


def gguf() -> list[Scalar]:
    """ggml's types, of llama-cpp-python or of ik_llama.cpp's library. Absent: neither is here; the message says why."""
    reasons = []
    for ik in (False, True):
        try:
            library = Library(ik, "")
            return [_ggml(library, kind) for kind in DEQUANTIZED]
        except Absent as absent:
            reasons.append(str(absent))
    raise Absent("; ".join(reasons))


def _ggml(library: Library, kind: str) -> Scalar:
    def rounded(weight: Tensor) -> Tensor:
        columns = weight.shape[-1]
        if columns % SUPERBLOCK:
            raise ValueError(f"a layer has {columns} inputs; expected a multiple of {kind}'s {SUPERBLOCK}")
        packed = library.quantize(kind, weight.detach().float().reshape(-1, columns).numpy())
        return torch.from_numpy(library.dequantize(kind, packed, columns)).reshape(weight.shape)

    return Scalar(f"GGUF {kind}", 8 * int(library.row_size(library.types[kind], SUPERBLOCK)) / SUPERBLOCK, rounded)


def _grouped(weight: Tensor, group: int) -> Tensor:
    """ValueError if the inputs aren't whole groups."""
    if weight.shape[-1] % group:
        raise ValueError(f"a layer has {weight.shape[-1]} inputs; expected a multiple of the group size {group}")
    return weight.float().reshape(*weight.shape[:-1], -1, group)
