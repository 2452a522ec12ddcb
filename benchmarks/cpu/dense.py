"""PyTorch on dense weights as a contender: a loop over experts, functional.linear, and a router of torch's own ops."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cpu.contender import Contender, Options, Variant, Work, copies_for
from benchmarks.cpu.shapes import Array, Inputs, Shape, scattered

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LIMITS = {"bf16": 2e-2, "f32": 1e-5}
ROWS = 64  # random rows that a large matrix is made of, repeated: drawing gigabytes would take minutes


def dense_variants(prefix: str = "") -> list[Variant]:
    """One variant for each dtype."""
    return [Variant(f"{prefix}{name}", 8.0 * dtype.itemsize, LIMITS[name], "dense") for name, dtype in DTYPES.items()]


def router_variants() -> list[Variant]:
    """In bfloat16, logits that are rounded together may pick another of two experts: a weight of an eighth moves."""
    return [dataclasses.replace(v, limit=0.5 if v.bits < 32 else v.limit) for v in dense_variants("ops ")]


def filled(count: int, n: int, k: int, dtype: torch.dtype, weights: Array | None) -> Tensor:
    """[count, n, k], from the weights or of repeated random rows."""
    if weights is not None:
        return torch.from_numpy(np.ascontiguousarray(weights)).to(dtype).reshape(count, n, k)
    rows = torch.randn(ROWS, k, generator=torch.Generator().manual_seed(k)).div_(k**0.5).to(dtype)
    total = count * n
    return rows.repeat(-(-total // ROWS), 1)[:total].reshape(count, n, k)


class Dense(Contender):
    """torch."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)

    def facts(self) -> dict[str, str]:
        return {"version": torch.__version__}

    def variants(self, op: str) -> list[Variant]:
        return router_variants() if op == "router" else dense_variants({"moe": "loop ", "linear": "linear "}[op])

    def bytes_needed(self, shape: Shape, variant: str, cold_bytes: int) -> int:
        layer = shape.weights * DTYPES[variant.split()[1]].itemsize
        return layer * copies_for(layer, cold_bytes)

    def build(self, shape: Shape, variant: str, cold_bytes: int, weights: tuple[Array, ...] | None) -> Work:
        dtype = DTYPES[variant.split()[1]]
        made: dict[str, type[DenseWork]] = {"moe": Loop, "linear": Linear, "router": Router}
        return made[shape.op](shape, dtype, cold_bytes, weights)


class DenseWork(Work):
    """Copies of a layer's dense weights, and inputs in their dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype, cold_bytes: int, weights: tuple[Array, ...] | None) -> None:
        self.shape, self.dtype, self.at = shape, dtype, -1
        self.matrix_bytes = float(shape.matrix_weights * dtype.itemsize)
        self.copies = 1 if weights is not None else copies_for(shape.weights * dtype.itemsize, cold_bytes)
        self.layers = [self.make(weights) for _ in range(self.copies)]

    def make(self, weights: tuple[Array, ...] | None) -> tuple[Tensor, ...]:
        """One copy."""
        s = self.shape
        n = s.inner if s.op == "linear" else s.experts
        return (filled(1, n, s.hidden, self.dtype, weights[0] if weights else None)[0],)

    def load(self, given: Inputs) -> None:
        self.at = (self.at + 1) % self.copies
        self.x = torch.from_numpy(given.x).to(self.dtype)
        self.ids = torch.from_numpy(given.ids).long()
        self.weights = torch.from_numpy(given.weights).to(self.dtype)

    def result(self) -> Array:
        array: Array = self.y.float().numpy()
        return array

    y: Tensor


class Loop(DenseWork):
    """What a model without a fused op runs: for every expert that was picked, its rows through three products."""

    def make(self, weights: tuple[Array, ...] | None) -> tuple[Tensor, ...]:
        e, h, i = self.shape.experts, self.shape.hidden, self.shape.inner
        gate, up, down = weights or (None, None, None)
        return (
            filled(e, i, h, self.dtype, gate),
            filled(e, i, h, self.dtype, up),
            filled(e, h, i, self.dtype, down),
        )

    def run(self) -> None:
        gate, up, down = self.layers[self.at]
        y = torch.zeros_like(self.x)
        for e in self.ids.unique().tolist():
            token, slot = torch.where(self.ids == e)
            rows = self.x[token]
            hidden = functional.silu(rows @ gate[e].T) * (rows @ up[e].T)
            y.index_add_(0, token, (hidden @ down[e].T) * self.weights[token, slot, None])
        self.y = y


class Linear(DenseWork):
    """nn.functional.linear."""

    def run(self) -> None:
        self.y = functional.linear(self.x, self.layers[self.at][0])


class Router(DenseWork):
    """The sequence that the router op replaces: product, softmax in float32, top k, division by their sum."""

    def run(self) -> None:
        logits = functional.linear(self.x, self.layers[self.at][0])
        scores = torch.softmax(logits, -1, dtype=torch.float32)
        weights, self.picked = scores.topk(self.shape.top_k, dim=-1)
        self.y = weights / weights.sum(-1, keepdim=True)

    def result(self) -> Array:
        return scattered(self.shape, self.picked.numpy(), self.y.numpy())
