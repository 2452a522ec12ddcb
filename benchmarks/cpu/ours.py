"""Our ops as a contender, at one SIMD level. Weights are random bits: a legal trellis with a real one's statistics.

All rates and codebooks lie in one pool of random bits, each layer a window of it, and every call takes the next window
whichever variant it is of: the pool is as large as one variant's copies, and no call finds what the last one left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import metal_marlin
from benchmarks.cpu.contender import Absent, Contender, Options, Variant, Work, copies_for
from benchmarks.cpu.shapes import Array, Inputs, Shape, reference, scattered
from metal_marlin import _C, ops
from metal_marlin.trellis import pad128

CODEBOOKS = ("mul1", "mcg", "3inst")
EXACT, ROUNDED = 1e-5, 2e-2  # relative error against the dequantized weights: float32 sums; activations in integers


@dataclass(frozen=True)
class Stack:
    """One projection of all experts, as ops.moe_trellis_swiglu takes it: a window of the pool."""

    trellis: Tensor
    table: Tensor
    suh: Tensor
    svh: Tensor
    bias: None = None


class Pool:
    """Random bits, and where the next call reads. Windows are taken in order; at the end it starts over."""

    def __init__(self, elements: int, experts: int, widest: int) -> None:
        generator = torch.Generator().manual_seed(11)
        self.bits = torch.randint(-(2**63), 2**63 - 1, (-(-elements // 4),), generator=generator).view(torch.int16)
        signs = torch.randint(0, 2, (experts, widest), generator=generator).mul_(2).sub_(1)
        self.signs = signs.half()
        self.next = 0

    def window(self, starts: list[int], size: int) -> int:
        """Index of the first window that begins at `next` or later; moves on behind it."""
        index = next((i for i, start in enumerate(starts) if start >= self.next), 0)
        self.next = starts[index] + size
        return index


class Ours(Contender):
    """metal_marlin at options.level; "" is the level that it takes by itself."""

    def __init__(self, options: Options) -> None:
        if options.level:
            if options.level not in _C.cpu_levels():
                raise Absent(f"this machine runs {', '.join(_C.cpu_levels())}")
            _C.set_cpu_level(options.level)
        torch.set_num_threads(options.threads)
        self.limits = _C.cpu_input_limits()[_C.cpu_level()]
        self.pool: Pool | None = None

    def facts(self) -> dict[str, str]:
        return {"version": metal_marlin.__version__, "level": _C.cpu_level(), "torch": torch.__version__}

    def variants(self, op: str) -> list[Variant]:
        if op == "router":
            return [Variant("float32", 32.0, 1e-5, "router")]
        found = []
        for codebook in CODEBOOKS:
            limit = ROUNDED if self.limits[codebook] else EXACT
            for rate2 in _C.RATES2[codebook]:
                found.append(Variant(f"{codebook} {rate2 / 2:g}", rate2 / 2, limit, codebook))
        return found

    def bytes_needed(self, shape: Shape, variant: str, cold_bytes: int) -> int:
        return 0

    def shared_bytes(self, shape: Shape, variants: list[str], cold_bytes: int) -> int:
        bits = [32.0 if shape.op == "router" else float(variant.split()[1]) for variant in variants]
        return cold_bytes + int(shape.weights * max(bits, default=0.0) / 8)

    def build(self, shape: Shape, variant: str, cold_bytes: int, weights: tuple[Array, ...] | None) -> Work:
        if shape.op == "router":
            return Router(shape, cold_bytes, weights)
        codebook, bits = variant.split()
        rate2 = round(2 * float(bits))
        if self.pool is None:  # the widest variant comes first, so that the others' windows make cold_bytes as well
            elements = shape.experts * pad128(shape.hidden) * pad128(shape.inner) * (3 if shape.op == "moe" else 1)
            most = max(pad128(shape.hidden), pad128(shape.inner))
            self.pool = Pool(elements * rate2 // 32 + cold_bytes // 2, shape.experts, most)
        return Packed(shape, codebook, rate2, self.pool)

    def drop(self) -> None:
        self.pool = None


class Packed(Work):
    """moe_trellis_swiglu or trellis_linear on windows of the pool."""

    def __init__(self, shape: Shape, codebook: str, rate2: int, pool: Pool) -> None:
        self.shape, self.codebook, self.pool = shape, codebook, pool
        h, i = pad128(shape.hidden), pad128(shape.inner)
        self.sizes = [(h, i), (h, i), (i, h)] if shape.op == "moe" else [(h, i)]
        self.rate2, self.each = rate2, [k * n * rate2 // 32 for k, n in self.sizes]
        count = shape.experts if shape.op == "moe" else 1
        self.elements = count * sum(self.each)
        self.copies = max(1, pool.bits.numel() // self.elements)
        self.starts = [copy * self.elements for copy in range(self.copies)]
        self.matrix_bytes = sum(2 * e for e in self.each) + sum(2 * (k + n) for k, n in self.sizes)
        index = _C.CODEBOOKS.index(codebook)
        self.stacks: list[list[Stack]] = []
        for start in self.starts:
            stacks = []
            for (k, n), elements in zip(self.sizes, self.each, strict=True):
                rows = [(start + e * elements, rate2, index) for e in range(count)]
                table = torch.tensor(rows, dtype=torch.int64)
                # an input scale of 1 / sqrt(k) gives outputs of the inputs' size
                suh, svh = pool.signs[:count, :k].div(math.sqrt(k)), pool.signs[:count, :n].clone()
                stacks.append(Stack(pool.bits, table, suh, svh))
                start += count * elements
            self.stacks.append(stacks)

    def load(self, given: Inputs) -> None:
        self.at = self.pool.window(self.starts, self.elements)
        self.x = torch.from_numpy(given.x)
        self.ids, self.weights = torch.from_numpy(given.ids).long(), torch.from_numpy(given.weights)
        if self.shape.op == "linear":
            stack = self.stacks[self.at][0]
            self.tiles = self._tiles(stack, 0, 0)

    def _tiles(self, stack: Stack, expert: int, which: int) -> Tensor:
        (k, n), begin = self.sizes[which], int(stack.table[expert, 0])
        return stack.trellis[begin : begin + self.each[which]].view(k // 16, n // 16, 8 * self.rate2)

    def run(self) -> None:
        stacks = self.stacks[self.at]
        if self.shape.op == "linear":
            one = stacks[0]
            self.y = ops.trellis_linear(
                self.x, self.tiles, one.suh[0], one.svh[0], codebook=self.codebook, out_features=self.shape.inner
            )
        else:
            self.y = ops.moe_trellis_swiglu(self.x, self.weights, self.ids, *stacks, intermediate=self.shape.inner)

    def result(self) -> Array:
        array: Array = self.y.numpy()
        return array

    def expected(self, shape: Shape, given: Inputs, weights: tuple[Array, ...]) -> Array:
        """From the dequantized weights of the window that was read: EXL3 weights are not made here."""
        dense = []
        for which, stack in enumerate(self.stacks[self.at]):
            matrices = [
                ops.dequantize(self._tiles(stack, e, which), stack.suh[e], stack.svh[e], codebook=self.codebook)
                for e in range(len(stack.table))
            ]
            k, n = (shape.hidden, shape.inner) if which < 2 else (shape.inner, shape.hidden)
            dense.append(torch.stack([m[:k, :n].T for m in matrices]).numpy())
        return reference(shape, given, tuple(dense) if shape.op == "moe" else (dense[0][0],))


class Router(Work):
    """The router op on float32 weights."""

    def __init__(self, shape: Shape, cold_bytes: int, weights: tuple[Array, ...] | None) -> None:
        self.shape, self.matrix_bytes = shape, 4.0 * shape.weights
        if weights is not None:
            self.gates = torch.from_numpy(weights[0]).unsqueeze(0)
        else:
            copies = copies_for(self.matrix_bytes, cold_bytes)
            generator = torch.Generator().manual_seed(13)
            self.gates = torch.randn(copies, shape.experts, shape.hidden, generator=generator) / shape.hidden**0.5
        self.copies, self.at = len(self.gates), -1

    def load(self, given: Inputs) -> None:
        self.at = (self.at + 1) % self.copies
        self.x, self.gate = torch.from_numpy(given.x), self.gates[self.at]

    def run(self) -> None:
        self.answer = ops.router(self.x, self.gate, top_k=self.shape.top_k)

    def result(self) -> Array:
        return scattered(self.shape, self.answer[1].numpy(), self.answer[0].numpy())
