"""What every contender computes: the layers' sizes, their inputs, and the float64 result that they are held against.

Needs NumPy and nothing else, since a contender may live in an environment of its own. Inputs follow from a seed, so
that in one turn all contenders get the same tokens and the same routing without sending either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
OPS = ("moe", "linear", "router")


@dataclass(frozen=True)
class Shape:
    """A layer's sizes. moe: experts of [hidden, inner], top_k of them for each token. linear: [hidden, inner].
    router: scores of `experts`, the best `top_k` of them."""

    key: str
    op: str
    hidden: int
    inner: int = 0
    experts: int = 1
    top_k: int = 1

    @property
    def title(self) -> str:
        """What a table is headed with."""
        if self.op == "moe":
            of = f"top {self.top_k} of {self.experts}"
            return f"{self.key}: routed experts, hidden {self.hidden}, inner {self.inner}, {of}"
        if self.op == "linear":
            return f"{self.key}: linear layer, {self.hidden} x {self.inner}"
        return f"{self.key}: router, hidden {self.hidden}, top {self.top_k} of {self.experts} experts"

    @property
    def matrix_weights(self) -> int:
        """Weights of one expert, or of the layer where there are none."""
        return {
            "moe": 3 * self.hidden * self.inner,
            "linear": self.hidden * self.inner,
            "router": self.hidden * self.experts,
        }[self.op]

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.matrix_weights * (self.experts if self.op == "moe" else 1)

    def flops(self, tokens: int) -> float:
        """Of the products of one call, an addition and a multiplication counted as two."""
        return 2.0 * tokens * self.matrix_weights * (self.top_k if self.op == "moe" else 1)


SHAPES = {
    shape.key: shape
    for shape in (
        Shape("T", "moe", 1024, 512, 32, 4),  # small: a layer's fixed costs show
        Shape("Q", "moe", 2048, 768, 128, 8),  # Qwen3-30B-A3B
        Shape("S", "moe", 4096, 14336, 8, 2),  # Mixtral: few wide experts
        Shape("L2048", "linear", 2048, 2048),
        Shape("L4096", "linear", 4096, 4096),
        *(Shape(f"R{n}", "router", 2048, 0, n, min(n, 8)) for n in (8, 32, 64, 128, 256, 512)),
    )
}
# Small, since every contender quantizes it itself; wide enough for blocks of 256 weights and Hadamards of 128.
CHECKS = {
    "moe": Shape("C", "moe", 512, 256, 8, 4),
    "linear": Shape("CL", "linear", 512, 256),
    "router": Shape("CR", "router", 512, 0, 32, 4),
}
CHECK_TOKENS = (1, 3, 32)


def normal(seed: Iterable[int], *shape: int) -> Array:
    """Float32 values of variance 1 over the last dimension's length, so that outputs have the size of inputs."""
    values = np.random.default_rng(list(seed)).standard_normal(shape, dtype=np.float32)
    values /= np.float32(shape[-1] ** 0.5)
    return values


def check_weights(shape: Shape) -> tuple[Array, ...]:
    """The float32 weights that every contender starts from, each [.., out, in]: gate, up, down; or the one matrix."""
    if shape.op == "moe":
        e, h, i = shape.experts, shape.hidden, shape.inner
        return normal((7, 0), e, i, h), normal((7, 1), e, i, h), normal((7, 2), e, h, i)
    return (normal((7, 3), shape.inner if shape.op == "linear" else shape.experts, shape.hidden),)


@dataclass(frozen=True)
class Inputs:
    """Tokens of one call: x float32 [tokens, hidden]; for moe ids int32 and weights float32, both [tokens, top_k]."""

    x: Array
    ids: Array
    weights: Array

    @property
    def tokens(self) -> int:
        return int(self.x.shape[0])


def inputs(shape: Shape, tokens: int, seed: Iterable[int]) -> Inputs:
    """Normal tokens, routed uniformly: many tokens touch most experts, as a real text's do."""
    rng = np.random.default_rng(list(seed))
    x = rng.standard_normal((tokens, shape.hidden), dtype=np.float32)
    ids = np.argsort(rng.random((tokens, shape.experts)), axis=1)[:, : shape.top_k].astype(np.int32)
    weights = rng.random((tokens, shape.top_k), dtype=np.float32) + np.float32(0.25)
    weights /= weights.sum(1, keepdims=True)
    return Inputs(x, np.ascontiguousarray(ids), np.ascontiguousarray(weights))


def reference(shape: Shape, given: Inputs, weights: tuple[Array, ...]) -> Array:
    """The result in float64. A router's is [tokens, experts]: the weights of those picked, zero elsewhere."""
    x = given.x.astype(np.float64)
    if shape.op == "linear":
        product: Array = x @ weights[0].astype(np.float64).T
        return product
    if shape.op == "router":
        logits = x @ weights[0].astype(np.float64).T
        scores = np.exp(logits - logits.max(1, keepdims=True))
        picked = np.argsort(-scores, axis=1, kind="stable")[:, : shape.top_k]
        best = np.take_along_axis(scores, picked, 1)
        return scattered(shape, picked, best / best.sum(1, keepdims=True))
    y = np.zeros((given.tokens, shape.hidden))
    for e in np.unique(given.ids):
        token, slot = np.nonzero(given.ids == e)
        gate, up, down = (w[e].astype(np.float64).T for w in weights)
        a = x[token] @ gate
        rows = ((a / (1 + np.exp(-a)) * (x[token] @ up)) @ down) * given.weights[token, slot, None]
        np.add.at(y, token, rows)
    return y


def scattered(shape: Shape, ids: Array, weights: Array) -> Array:
    """A router's answer, which may come in any order, as [tokens, experts]."""
    full = np.zeros((ids.shape[0], shape.experts))
    np.put_along_axis(full, ids.astype(np.int64), weights.astype(np.float64), 1)
    return full


def relative_error(got: Array, want: Array) -> float:
    """Length of the difference over length of the result; inf where a value is not finite."""
    if got.shape != want.shape:
        raise ValueError(f"the result is {list(got.shape)}; expected {list(want.shape)}")
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
