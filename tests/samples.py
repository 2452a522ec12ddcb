"""One call of every op, small and awkward: odd sizes, mixed rates, biases, junk in the padding. Shared by the tests
of how the ops fit PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import reference as ref
import torch
from conftest import Backend

EXPERTS = ref.random_experts(
    np.random.default_rng(7), 5, 200, 130, ((4, "mul1"), (3, "mul1"), (6, "mcg"), (2, "3inst")), bias=True, junk=True
)
LINEAR = ref.random_packed(np.random.default_rng(8), 200, 130, 5, "mul1", bias=True, junk=True)


def linear_args(
    b: Backend, rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: str = "float32"
) -> list[Any]:
    x = b.put(rng.normal(size=(*shape, 200)), dtype)
    return [x, *b.packed(LINEAR), b.put(LINEAR.bias), LINEAR.codebook, 130]


def moe_args(b: Backend, rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: str = "float32",
             activation: str = "silu") -> list[Any]:  # fmt: skip
    x, weights = b.put(rng.normal(size=(*shape, 200)), dtype), b.put(rng.uniform(size=(*shape, 2)), "float32")
    joined = ref.Experts(EXPERTS.gate, EXPERTS.up, EXPERTS.down, 200, 130, activation)
    return [x, weights, b.put(rng.integers(0, 5, (*shape, 2))), *b.moe_args(joined)]


def router_args(b: Backend, rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: str = "float32",
                kind: str = "softmax_topk", corrected: bool = True) -> list[Any]:  # fmt: skip
    x, gate = b.put(rng.normal(size=(*shape, 64)), dtype), b.put(rng.normal(size=(12, 64)) / 8, dtype)
    correction = b.put(rng.normal(size=12) if corrected else None, "float32")
    return [x, gate, correction, 3, kind, True, 1.5, 1, 1]


def dequantize_args(b: Backend, *_: Any) -> list[Any]:
    return [*b.packed(LINEAR), LINEAR.codebook, 200, 130]


def backward_args(
    b: Backend, rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: str = "float32"
) -> list[Any]:
    return [b.put(rng.normal(size=(*shape, 130)), dtype), *b.packed(LINEAR), LINEAR.codebook, 200]


def moe_backward_args(
    b: Backend, rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: str = "float32"
) -> list[Any]:
    return [b.put(rng.normal(size=(*shape, 200)), dtype), *moe_args(b, rng, shape, dtype)]


OPS: dict[str, Callable[..., list[Any]]] = {
    "trellis_linear": linear_args,
    "trellis_linear_backward": backward_args,
    "moe_trellis_swiglu": moe_args,
    "moe_trellis_swiglu_backward": moe_backward_args,
    "router": router_args,
    "dequantize": dequantize_args,
}
TOKEN_ARGUMENTS = {
    "trellis_linear": 1,
    "trellis_linear_backward": 1,
    "moe_trellis_swiglu": 3,
    "moe_trellis_swiglu_backward": 4,
    "router": 1,
}
DIFFERENTIABLE = {
    "trellis_linear": (0,),
    "moe_trellis_swiglu": (0, 1),
    "router": (0, 1, 2),
}  # positions of the arguments with a gradient


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def grown(name: str, args: list[Any], copies: int) -> list[Any]:
    """The same call with its token tensors (and only those) repeated."""
    return [a.repeat(copies, *[1] * (a.dim() - 1)) if i < TOKEN_ARGUMENTS[name] else a for i, a in enumerate(args)]
