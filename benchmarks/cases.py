"""The cases: one op at one size, what PyTorch does for the same layer with dense weights, and a check of both.

Weights are random bits, which are a legal trellis with the statistics of a real one. Routing is random and uniform, so
that many rows touch most experts, as a real text does; equal rows would flatter the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metal_marlin import TrellisExperts, TrellisLinear, TrellisTensor

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 32, 4
ROWS = (1, 16, 256)
RATES = (("mul1", 2.0), ("mcg", 3.0), ("mul1", 4.0))
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest error / largest value


@dataclass(frozen=True)
class Case:
    """`ours()` and `dense[dtype]()` compute the same layer; one call reads at least `packed_bytes` of weights."""

    name: str
    rows: int
    packed_bytes: int
    ours: Callable[[], Tensor]
    dense: dict[torch.dtype, Callable[[], Tensor]]

    def check(self) -> None:
        """AssertionError if the op and the dense layers disagree."""
        ours = self.ours()
        for dtype, work in self.dense.items():
            error = float((work().float() - ours).abs().max() / ours.abs().max())
            assert error < TOLERANCE[dtype], f"{self.name}, {self.rows} rows: differs from dense {dtype} by {error:.1e}"


def random_tensor(k: int, n: int, codebook: str, bits: float, generator: torch.Generator) -> TrellisTensor:
    """A matrix [k, n] of random bits, scaled so that outputs have the size of inputs."""
    trellis = torch.randint(-(2**15), 2**15, (k // 16, n // 16, int(16 * bits)), dtype=torch.int16, generator=generator)
    suh = torch.randint(0, 2, (k,), generator=generator).mul(2).sub(1).div(k**0.5).half()
    svh = torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1).half()
    return TrellisTensor(trellis, suh, svh, codebook)


def linear(rows: int, codebook: str, bits: float) -> Case:
    """trellis_linear on [HIDDEN, HIDDEN] against torch.nn.functional.linear."""
    generator = torch.Generator().manual_seed(1)
    tensor = random_tensor(HIDDEN, HIDDEN, codebook, bits, generator)
    layer = TrellisLinear.from_tensor(tensor)
    x = torch.randn(rows, HIDDEN, generator=generator)
    weight = layer.dequantize().T.contiguous()

    def dense(dtype: torch.dtype) -> Callable[[], Tensor]:
        cast_x, cast_weight = x.to(dtype), weight.to(dtype)
        return lambda: torch.nn.functional.linear(cast_x, cast_weight)

    name = f"linear {HIDDEN} x {HIDDEN}, {codebook} {bits:g} bits"
    return Case(name, rows, tensor.nbytes, lambda: layer(x), {dtype: dense(dtype) for dtype in TOLERANCE})


def moe(rows: int, codebook: str, bits: float) -> Case:
    """moe_trellis_swiglu against the loop over experts that transformers runs by default."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN))
    tensors = [[random_tensor(k, n, codebook, bits, generator) for _ in range(EXPERTS)] for k, n in sizes]
    experts = TrellisExperts.from_experts(tensors[0], tensors[1], tensors[2])
    x = torch.randn(rows, HIDDEN, generator=generator)
    scores, ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K)
    weights = scores / scores.sum(-1, keepdim=True)
    full = [torch.stack([TrellisLinear.from_tensor(t).dequantize().T for t in stack]) for stack in tensors]

    def dense(dtype: torch.dtype) -> Callable[[], Tensor]:
        gate, up, down = (w.to(dtype) for w in full)
        cast_x = x.to(dtype)

        def work() -> Tensor:
            result = torch.zeros_like(cast_x)
            for e in ids.unique().tolist():
                token, slot = torch.where(ids == e)
                rows_of_e = cast_x[token]
                hidden = torch.nn.functional.silu(rows_of_e @ gate[e].T) * (rows_of_e @ up[e].T)
                scaled = (hidden @ down[e].T) * weights[token, slot, None].to(dtype)
                result.index_add_(0, token, scaled)
            return result

        return work

    touched = len(ids.unique())
    packed = touched * sum(stack[0].nbytes for stack in tensors)
    name = f"moe {EXPERTS} experts of {HIDDEN} x {INTERMEDIATE}, top {TOP_K}, {codebook} {bits:g} bits"
    ours = lambda: experts(x, ids, weights)  # noqa: E731
    return Case(name, rows, packed, ours, {dtype: dense(dtype) for dtype in TOLERANCE})


KINDS: dict[str, Callable[[int, str, float], Case]] = {"linear": linear, "moe": moe}
