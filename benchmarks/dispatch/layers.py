"""One MoE layer in two forms: with packed weights through this package's ops, and with dense weights through torch.

Owns the forms and nothing of timing. Both route and multiply alike, so that experiments are written once: `together`
computes all routed experts without reading the routing back to the host, `one_by_one` loops over experts as a model
without a fused op does. `after` is called after every op that a GPU would launch separately.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.dispatch.result import Settings
from benchmarks.dispatch.sizes import BITS, CODEBOOK
from benchmarks.random_weights import random_tensor
from metal_marlin import TrellisExperts, TrellisLinear, TrellisRouter

After = Callable[[], object]


def nothing() -> None:
    """An `after` that does nothing."""


class PackedMoE:
    """TrellisRouter and TrellisExperts on random 2-bit weights; random bits are a legal trellis."""

    form = f"packed {BITS:g}-bit experts, metal_marlin's ops"
    together_name, loop_name = "the fused op", "a loop over experts (trellis_linear)"

    def __init__(self, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        s, device = settings, torch.device(settings.device)
        shapes = ((s.hidden, s.intermediate), (s.hidden, s.intermediate), (s.intermediate, s.hidden))
        tensors = [[random_tensor(k, n, CODEBOOK, BITS, generator) for _ in range(s.experts)] for k, n in shapes]
        dtype = getattr(torch, s.dtype)
        gate = torch.randn(s.experts, s.hidden, generator=generator).div(s.hidden**0.5)
        self.router = TrellisRouter(gate.to(device, dtype), s.top_k)
        self.experts = TrellisExperts.from_experts(tensors[0], tensors[1], tensors[2]).to(device)
        self.packed_bytes = sum(tensor.nbytes for stack in tensors for tensor in stack)
        # the loop reads the same bits through single matrices
        self.single = [[TrellisLinear.from_tensor(tensor).to(device) for tensor in stack] for stack in tensors]
        self.experts_count = s.experts

    def route(self, x: Tensor, after: After = nothing) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x)
        after()
        return weights, ids

    def together(self, x: Tensor, weights: Tensor, ids: Tensor, after: After = nothing) -> Tensor:
        y: Tensor = self.experts(x, ids, weights)
        after()
        return y

    def one_by_one(self, x: Tensor, weights: Tensor, ids: Tensor, after: After = nothing) -> Tensor:
        gate, up, down = self.single
        return _loop(x, weights, ids, lambda e, rows: down[e](functional.silu(gate[e](rows)) * up[e](rows)), after)

    def expert(self, rows: Tensor) -> Tensor:
        """One expert's first projection."""
        y: Tensor = self.single[0][0](rows)
        return y


class DenseMoE:
    """The same layer on dense random weights: router as torch ops; experts sorted into one grouped product, without
    asking the host how many rows each expert has. Where torch has no grouped product for the device, a batched one
    over all experts, whose unrouted rows are multiplied too and weighted by zero."""

    def __init__(self, settings: Settings) -> None:
        s, device, dtype = settings, torch.device(settings.device), getattr(torch, settings.dtype)
        generator = torch.Generator(device).manual_seed(s.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype).div_(shape[-2] ** 0.5)

        self.gate_weight = normal(s.hidden, s.experts)
        self.gate, self.up = normal(s.experts, s.hidden, s.intermediate), normal(s.experts, s.hidden, s.intermediate)
        self.down = normal(s.experts, s.intermediate, s.hidden)
        self.top_k, self.experts_count = s.top_k, s.experts
        self.packed_bytes = 0
        self.every_expert = torch.arange(s.experts, device=device)
        self.grouped = self._has_grouped(s)
        self.form = f"dense {s.dtype} experts, torch's ops"
        self.together_name = "torch's grouped_mm" if self.grouped else "torch's bmm over all experts"
        self.loop_name = "a loop over experts (torch)"

    def _has_grouped(self, s: Settings) -> bool:
        try:
            rows = torch.zeros(s.batch, s.hidden, device=self.gate.device, dtype=self.gate.dtype)
            ends = torch.full((s.experts,), s.batch, device=rows.device, dtype=torch.int32)
            functional.grouped_mm(rows, self.gate, offs=ends)
        except (AttributeError, RuntimeError, NotImplementedError):
            return False
        return True

    def route(self, x: Tensor, after: After = nothing) -> tuple[Tensor, Tensor]:
        logits = x @ self.gate_weight
        after()
        scores = torch.softmax(logits, -1, dtype=torch.float32)
        after()
        weights, ids = scores.topk(self.top_k)
        after()
        weights = weights / weights.sum(-1, keepdim=True)
        after()
        return weights, ids

    def together(self, x: Tensor, weights: Tensor, ids: Tensor, after: After = nothing) -> Tensor:
        return (self.together_grouped if self.grouped else self.together_batched)(x, weights, ids, after)

    def together_grouped(self, x: Tensor, weights: Tensor, ids: Tensor, after: After = nothing) -> Tensor:
        flat = ids.reshape(-1)
        in_order, order = flat.sort()
        after()
        # where each expert's rows end; bincount would ask the host for the largest id
        ends = torch.searchsorted(in_order, self.every_expert, right=True, out_int32=True)
        after()
        token = order // self.top_k
        rows = x[token]
        after()
        gate = functional.grouped_mm(rows, self.gate, offs=ends)
        after()
        up = functional.grouped_mm(rows, self.up, offs=ends)
        after()
        hidden = functional.silu(gate) * up
        after()
        out = functional.grouped_mm(hidden, self.down, offs=ends)
        after()
        out = out * weights.reshape(-1)[order, None].to(out.dtype)
        after()
        # back to the pairs' own order and summed, rather than index_add: the same bits in every run
        y = torch.empty_like(out).index_copy_(0, order, out).view(*ids.shape, -1).sum(-2)
        after()
        return y

    def together_batched(self, x: Tensor, weights: Tensor, ids: Tensor, after: After = nothing) -> Tensor:
        all_rows = x.expand(self.experts_count, *x.shape)
        gate, up = torch.bmm(all_rows, self.gate), torch.bmm(all_rows, self.up)
        after()
        out = torch.bmm(functional.silu(gate) * up, self.down)
        after()
        share = torch.zeros(x.shape[0], self.experts_count, device=x.device, dtype=torch.float32).scatter_(
            1, ids, weights
        )
        y = torch.einsum("te,eth->th", share.to(out.dtype), out)
        after()
        return y

    def one_by_one(self, x: Tensor, weights: Tensor, ids: Tensor, after: After = nothing) -> Tensor:
        def expert(e: int, rows: Tensor) -> Tensor:
            return (functional.silu(rows @ self.gate[e]) * (rows @ self.up[e])) @ self.down[e]

        return _loop(x, weights, ids, expert, after)

    def expert(self, rows: Tensor) -> Tensor:
        """One expert's first projection."""
        return rows @ self.gate[0]


def _loop(x: Tensor, weights: Tensor, ids: Tensor, expert: Callable[[int, Tensor], Tensor], after: After) -> Tensor:
    """The loop of an unfused model: the host asks which experts are hit and which rows are theirs."""
    result = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        rows = expert(e, x[token])
        after()
        result.index_add_(0, token, rows * weights[token, slot, None].to(rows.dtype))
        after()
    return result


MoE = PackedMoE | DenseMoE


@lru_cache(maxsize=1)
def layer(settings: Settings) -> MoE:
    """The layer that experiments share; packed where this package has kernels. Kept, since making it takes seconds."""
    return PackedMoE(settings) if settings.device in ("cpu", "mps") else DenseMoE(settings)


def of(settings: Settings) -> MoE:
    """`layer` by what it depends on: time and repeats don't make another one."""
    names = ("device", "seed", "hidden", "intermediate", "experts", "top_k", "dtype", "batch")
    return layer(Settings(**{name: getattr(settings, name) for name in names}))


def tokens(settings: Settings, count: int) -> Tensor:
    """[count, hidden] unit normals. Random tokens route nearly uniformly, so that many touch all experts."""
    generator = torch.Generator().manual_seed(settings.seed + count)
    x = torch.randn(count, settings.hidden, generator=generator)
    return x.to(settings.device, getattr(torch, settings.dtype))
