"""Gradients on Apple GPUs, made of torch's own ops over dequantized weights.

The CPU has C kernels for these; Metal kernels are not written yet. Memory: one dense projection at a time. The
mixture's gradient reads the routing back to the host, once per expert; its forward never does. Same formulas as
csrc/cpu/moe.c, which the tests compare these with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C

_ops = torch.ops.metal_marlin


def linear_backward(grad: Tensor, trellis: Tensor, suh: Tensor, svh: Tensor, codebook: str, in_features: int) -> Tensor:
    """grad [..., out_features] -> [..., in_features]."""
    weight = _ops.dequantize(trellis, suh, svh, codebook, in_features, grad.shape[-1])
    dx: Tensor = (grad.to(torch.float32) @ weight.T).to(grad.dtype)
    return dx


def _expert_weight(stack: tuple[Tensor, ...], table: list[list[int]], expert: int, sizes: tuple[int, int]) -> Tensor:
    trellis, _table, suh, svh, _bias = stack
    offset, rate2, codebook = table[expert]
    k_tiles, n_tiles, width = suh.shape[1] // _C.TILE, svh.shape[1] // _C.TILE, rate2 * _C.TILE // 2
    packed = trellis[offset : offset + k_tiles * n_tiles * width].view(k_tiles, n_tiles, width)
    weight: Tensor = _ops.dequantize(packed, suh[expert], svh[expert], _C.CODEBOOKS[codebook], *sizes)
    return weight


def _activate(gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(gate) * up
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def moe_backward(grad: Tensor, x: Tensor, weights: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """grad, x [..., hidden], weights, ids [..., top_k] and the forward's other arguments -> gradients of x and
    weights."""
    stacks = rest[0:5], rest[5:10], rest[10:15]
    intermediate, activation, alpha, limit = rest[15:19]
    hidden, top_k = x.shape[-1], ids.shape[-1]
    rows, grads = x.reshape(-1, hidden).to(torch.float32), grad.reshape(-1, hidden).to(torch.float32)
    routing, chosen = weights.reshape(-1, top_k).to(torch.float32), ids.reshape(-1, top_k)
    dx, dweights = torch.zeros_like(rows), torch.zeros_like(routing)
    tables = [stack[1].tolist() for stack in stacks]
    sizes = (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)
    for expert in range(len(tables[0])):
        tokens, slots = torch.where(chosen == expert)
        if not len(tokens):
            continue
        gate_w, up_w, down_w = (
            _expert_weight(stack, table, expert, size) for stack, table, size in zip(stacks, tables, sizes, strict=True)
        )
        bias = [
            stack[4][expert, : size[1]].to(torch.float32) if stack[4].numel() else 0.0
            for stack, size in zip(stacks, sizes, strict=True)
        ]
        with torch.enable_grad():
            gate = (rows[tokens] @ gate_w + bias[0]).requires_grad_()
            up = (rows[tokens] @ up_w + bias[1]).requires_grad_()
            act = _activate(gate, up, activation, alpha, limit)
        own = grads[tokens]
        dweights[tokens, slots] = ((act.detach() @ down_w + bias[2]) * own).sum(-1)
        dact = routing[tokens, slots, None] * (own @ down_w.T)
        dgate, dup = torch.autograd.grad(act, (gate, up), dact)
        dx.index_add_(0, tokens, dgate @ gate_w.T + dup @ up_w.T)
    return dx.view_as(x).to(x.dtype), dweights.view_as(weights).to(weights.dtype)


torch.library.impl("metal_marlin::trellis_linear_backward", "MPS", linear_backward)
torch.library.impl("metal_marlin::moe_trellis_swiglu_backward", "MPS", moe_backward)
