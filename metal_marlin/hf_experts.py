"""Experts of unquantized transformers models: `model.set_experts_implementation("metal_marlin")`.

Owns the function behind that name and the grouped product it is made of. On a CPU it is what it looks like: tokens
sorted by expert, then one dense torch product per expert that has tokens, in the weights' dtype. It gives the same
bits from run to run, takes biases, transposed weights, gateless experts and expert-parallel sentinels as transformers'
own implementations do, traces under torch.compile and has gradients. It is not faster than transformers' grouped_mm
there; kernels for Apple GPUs are to come behind the same name. Contract: transformers/integrations/moe.py
(use_experts_implementation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, top_k] -> [T, H]; `self` is transformers' experts module.

    Ids from num_experts on are other ranks' experts (sentinels): they add nothing and their router weights get no
    gradient.
    """
    tokens, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    here = (ids < self.num_experts).unsqueeze(-1)
    ends = torch.searchsorted(ids, torch.arange(self.num_experts, device=ids.device, dtype=ids.dtype), right=True)
    rows = ids.clamp(max=self.num_experts - 1)
    h = hidden_states[order // top_k]
    for name, act in (("gate_up_proj" if self.has_gate else "up_proj", True), ("down_proj", False)):
        weight = getattr(self, name)
        h = torch.ops.metal_marlin.grouped_mm(h.to(weight.dtype), weight, ends, bool(self.is_transposed))
        if self.has_bias:
            h = h + getattr(self, f"{name}_bias")[rows]
        if act:
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    if getattr(self, "has_post_expert_norm", False):
        h = self.post_expert_norm(h)
    # where, not a product: a sentinel's row may hold anything after biases and norms
    h = torch.where(here, h * top_k_weights.reshape(-1)[order].unsqueeze(-1), 0.0)
    unsorted = torch.empty_like(h).index_copy(0, order, h)
    return unsorted.view(tokens, top_k, h.shape[-1]).sum(dim=1).to(hidden_states.dtype)


@torch.library.custom_op("metal_marlin::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """Rows of x [S, k] times their group's weight -> [S, n], zeros past the last group.

    weight [E, n, k], or [E, k, n] if transposed; ends int [E]: group e is rows ends[e-1] to ends[e] of x.
    """
    y = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    for e, begin, end in _groups(ends):
        torch.mm(x[begin:end], weight[e] if transposed else weight[e].t(), out=y[begin:end])
    return y


@torch.library.custom_op("metal_marlin::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of grouped_mm with respect to x and weight."""
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for e, begin, end in _groups(ends):
        rows, own = grad[begin:end], x[begin:end]
        torch.mm(rows, weight[e].t() if transposed else weight[e], out=grad_x[begin:end])
        torch.mm(*((own.t(), rows) if transposed else (rows.t(), own)), out=grad_weight[e])
    return grad_x, grad_weight


def _groups(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, begin, end) of every group that has rows."""
    bounds = [0, *ends.tolist()]
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


@grouped_mm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.transposed = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.metal_marlin.grouped_mm_backward(grad.contiguous(), x, weight, ends, ctx.transposed)
    return grad_x, grad_weight, None, None


grouped_mm.register_autograd(_backward, setup_context=_save)
