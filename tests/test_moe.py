"""moe_trellis_swiglu against the oracle: routing shapes, mixed rates, activations, biases, padding, strides,
non-finite input."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DTYPES, RATES, Backend, array, assert_close, ops, same_bits

import metal_marlin._C as _C

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")


@cache
def experts(count: int = 4, hidden: int = 128, intermediate: int = 128, bias: bool = False, junk: bool = False,
            activation: str = "silu", rates: tuple[tuple[int, str], ...] = ((4, "mul1"),)) -> ref.Experts:  # fmt: skip
    rng = np.random.default_rng([count, hidden, intermediate])
    return ref.random_experts(rng, count, hidden, intermediate, rates, bias, junk, activation=activation)


def routing(rng: np.random.Generator, tokens: int, top_k: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights that sum to 1 and distinct experts, as a router gives."""
    weights = rng.dirichlet(np.ones(top_k), size=tokens) if tokens else np.zeros((0, top_k))
    ids = np.array([rng.permutation(count)[:top_k] for _ in range(tokens)], np.int64).reshape(tokens, top_k)
    return weights, ids


def check(backend: Backend, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, m: ref.Experts, y: torch.Tensor,
          what: str = "") -> None:  # fmt: skip
    """Compares y with the oracle on the very values of x and weights."""
    assert (y.dtype, y.device, y.shape) == (x.dtype, x.device, x.shape), what
    rows, pairs = array(x).reshape(-1, m.hidden), [array(t).reshape(-1, ids.shape[-1]) for t in (weights, ids)]
    m = backend.multiplied_experts(m, len(rows))
    want = ref.moe(rows, *pairs, m)
    bound = ref.rounded(ref.moe_bound(rows, *pairs, m), want, str(x.dtype).removeprefix("torch."))
    assert_close(y.reshape(-1, m.hidden), want, bound, what)


def run(backend: Backend, rng: np.random.Generator, m: ref.Experts, tokens: int, top_k: int, dtype: str = "float32",
        ids_dtype: str = "int64", weights_dtype: str = "float32") -> torch.Tensor:  # fmt: skip
    """One random call, checked."""
    x = backend.put(rng.normal(size=(tokens, m.hidden)), dtype)
    w, i = routing(rng, tokens, top_k, len(m.gate))
    weights, ids = backend.put(w, weights_dtype), backend.put(i, ids_dtype)
    y = backend.moe(x, weights, ids, m)
    what = f"{tokens} tokens, top {top_k}, {dtype}, {weights_dtype} weights, {ids_dtype} ids"
    check(backend, x, weights, ids, m, y, what)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 4, 8, 32])
def test_top_k(backend: Backend, rng: np.random.Generator, top_k: int, dtype: str) -> None:
    for tokens in (1, 2, 5):
        run(backend, rng, experts(32), tokens, top_k, dtype)


@pytest.mark.parametrize("tokens", [3, 9, 17, 40, 130])
def test_many_tokens(backend: Backend, rng: np.random.Generator, tokens: int) -> None:
    """From a few rows per expert to more than a hundred."""
    for dtype in DTYPES:
        run(backend, rng, experts(3, 256, 128), tokens, 2, dtype)


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend: Backend, rng: np.random.Generator, dtype: str, weights_dtype: str, ids_dtype: str) -> None:
    """The dtype of x does not tie that of the weights or the ids."""
    run(backend, rng, experts(), 6, 2, dtype, ids_dtype, weights_dtype)


@pytest.mark.parametrize("count", [1, 512])
def test_expert_counts(backend: Backend, rng: np.random.Generator, count: int) -> None:
    """One expert, and as many as the op takes, most of them without a token; the first and the last get some."""
    m = experts(count, rates=((2, "mul1"),))
    run(backend, rng, m, 5, min(count, 4))
    ids = np.array([[count - 1, 0], [0, count - 1], [count - 1, count - 1]])
    x, w = backend.put(rng.normal(size=(3, 128)), "float32"), backend.put(rng.uniform(size=(3, 2)), "float32")
    check(backend, x, w, backend.put(ids), m, backend.moe(x, w, backend.put(ids), m))


def test_mixed_rates(backend: Backend, rng: np.random.Generator) -> None:
    """Every codebook at every rate in one layer, another one for each expert and projection."""
    mixed = [RATES[i] for i in np.random.default_rng(1).permutation(len(RATES))]
    m = experts(9, 256, 128, rates=tuple(mixed))
    assert {(p.rate2, p.codebook) for p in (*m.gate, *m.up, *m.down)} == set(RATES)
    for tokens, top_k in ((1, 9), (4, 9), (30, 3)):
        run(backend, rng, m, tokens, top_k)


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("sizes", [(1, 1), (100, 130), (130, 100), (200, 16), (127, 257)], ids=str)
def test_padding(backend: Backend, rng: np.random.Generator, sizes: tuple[int, int], activation: str) -> None:
    """NaN, Inf and huge numbers in the padding of every suh, svh and bias stay there, also on the way from gate and
    up to down."""
    m = experts(3, *sizes, bias=True, junk=True, activation=activation, rates=((4, "mul1"), (6, "3inst"), (5, "mul1")))
    for tokens in (1, 6, 40):
        run(backend, rng, m, tokens, 2)
    run(backend, rng, experts(3, *sizes, junk=True, activation=activation), 6, 3, "bfloat16")


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 3), (1, 2, 2)], ids=str)
def test_batch_shapes(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    tokens, m = int(np.prod(shape)), experts(5)
    x = rng.normal(size=(tokens, 128)).reshape(*shape, 128)
    w, i = (a.reshape(*shape, 3) for a in routing(rng, tokens, 3, 5))
    for dtype in DTYPES:
        args = backend.put(x, dtype), backend.put(w, "float32"), backend.put(i)
        check(backend, *args, m, backend.moe(*args, m), dtype)


def test_repeated_ids(backend: Backend, rng: np.random.Generator) -> None:
    """One expert twice in a token counts twice; all tokens at one expert leave the others idle."""
    m = experts()
    for chosen in ([[2, 2], [0, 3], [1, 1]], [[1, 1]] * 20, [[0, 2]] * 5, rng.integers(0, 4, (3, 12)).tolist()):
        tokens, top_k = len(chosen), len(chosen[0])
        x, ids = backend.put(rng.normal(size=(tokens, 128)), "float32"), backend.put(np.array(chosen))
        weights = backend.put(rng.normal(size=(tokens, top_k)), "float32")
        check(backend, x, weights, ids, m, backend.moe(x, weights, ids, m), str(chosen))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_without_an_expert(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Id -1 adds nothing, not even a NaN weight; tokens that have nobody become zero, and the others are unharmed."""
    m = experts(4, 200, 130, bias=True)
    for tokens, ids_dtype in ((1, "int64"), (6, "int32"), (70, "int64")):
        x = backend.put(rng.normal(size=(tokens, 200)), dtype)
        w, i = routing(rng, tokens, 3, 4)
        i[rng.uniform(size=i.shape) < 0.6] = _C.NO_EXPERT
        i[-1] = _C.NO_EXPERT
        weights, ids = backend.put(np.where(i < 0, np.nan, w), "float32"), backend.put(i, ids_dtype)
        y = backend.moe(x, weights, ids, m)
        check(backend, x, backend.put(np.where(i < 0, 0, w), "float32"), backend.put(np.maximum(i, 0)), m, y)
        assert (y[-1] == 0).all()
        assert tokens == 1 or (y[(i >= 0).any(axis=1)] != 0).any()


def test_weights_of_any_value(backend: Backend, rng: np.random.Generator) -> None:
    """Weights need not be positive nor sum to 1; with all of them zero the result is zero."""
    m, x, ids = experts(), backend.put(rng.normal(size=(4, 128)), "float32"), backend.put(np.tile([3, 1], (4, 1)))
    for weights in ([[-1.5, 0.0], [0.0, 0.0], [1e-3, 1e3], [1, 1]],):
        w = backend.put(np.array(weights), "float32")
        y = backend.moe(x, w, ids, m)
        check(backend, x, w, ids, m, y)
        assert (y[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Views of x, weights and ids give the bits of their contiguous copies."""
    m = experts(6)
    x = backend.put(rng.normal(size=(128, 9, 2)), dtype).permute(1, 2, 0)[::2, 0]
    weights = backend.put(rng.uniform(size=(3, 5)), dtype).t()
    ids = backend.put(rng.integers(0, 6, (5, 6)))[:, ::2]
    y = backend.moe(x, weights, ids, m)
    check(backend, x, weights, ids, m, y)
    assert same_bits(y, backend.moe(x.contiguous(), weights.contiguous(), ids.contiguous(), m))
    one = backend.moe(x[:1].expand(4, 128), weights[:1].expand(4, 3), ids[:1].expand(4, 3), m)
    assert same_bits(one, y[:1].expand(4, 128))
    every = weights[:, :1].expand(5, 3)
    assert same_bits(
        backend.moe(x, every, ids[:, :1].expand(5, 3), m), backend.moe(x, every.clone(), ids[:, :1].repeat(1, 3), m)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(cpu: Backend, rng: np.random.Generator, dtype: str) -> None:
    """A token's result has the same bits alone, in any batch and order, wherever the other tokens go."""
    m, tokens = experts(5, 256, 256, rates=((4, "mul1"), (3, "mul1"), (6, "mcg"))), 70
    x = cpu.put(rng.normal(size=(tokens, 256)), dtype)
    w, i = routing(rng, tokens, 2, 5)
    weights, ids = cpu.put(w, "float32"), cpu.put(i)
    y = cpu.moe(x, weights, ids, m)
    for part in (slice(0, 1), slice(3, 5), slice(0, 9), slice(8, 41), slice(69, 70)):
        assert same_bits(cpu.moe(x[part], weights[part], ids[part], m), y[part]), str(part)
    order = torch.from_numpy(rng.permutation(tokens)).to(cpu.device)
    assert same_bits(cpu.moe(x[order], weights[order], ids[order], m), y[order]), "permuted tokens"


def test_equals_linears(backend: Backend, rng: np.random.Generator) -> None:
    """With one expert of weight 1 the op is three trellis_linear and an activation, as the ops' own float32 results
    show."""
    m = experts(1, 200, 130, bias=True)
    x = backend.put(rng.normal(size=(3, 200)), "float32")
    g, u = backend.linear(x, m.gate[0], 130), backend.linear(x, m.up[0], 130)
    y = backend.moe(
        x, torch.ones(3, 1, device=backend.device), torch.zeros(3, 1, dtype=torch.long, device=backend.device), m
    )
    joined = backend.linear(torch.nn.functional.silu(g) * u, m.down[0], 200)
    ones, zeros = np.ones((3, 1)), np.zeros((3, 1), int)
    assert_close(y, array(joined), 2 * ref.moe_bound(array(x), ones, zeros, m))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_input(backend: Backend, rng: np.random.Generator, poison: float, activation: str) -> None:
    """One NaN or Inf in x makes its token non-finite, in a weight too; other tokens keep their bits, even at the same
    expert."""
    m = experts(3, 200, 130, bias=True, activation=activation)
    for tokens, dtype in ((1, "float32"), (4, "bfloat16"), (5, "float16"), (40, "float32")):
        x = backend.put(rng.normal(size=(tokens, 200)), dtype)
        w, i = routing(rng, tokens, 2, 3)
        weights, ids = backend.put(w, "float32"), backend.put(i)
        clean = backend.moe(x, weights, ids, m)
        others = torch.arange(tokens) != tokens // 2
        for name in ("x", "weights"):
            dirty = {"x": x.clone(), "weights": weights.clone()}
            dirty[name][tokens // 2, 1] = poison
            y = backend.moe(dirty["x"], dirty["weights"], ids, m)
            assert not torch.isfinite(y[tokens // 2]).any(), f"{name}, {tokens} tokens"
            assert same_bits(y[others], clean[others]), f"{name}, {tokens} tokens"


def test_more_pairs_than_one_pass_holds(cpu: Backend, rng: np.random.Generator) -> None:
    """20,000 (token, expert) pairs, forward and backward: every part of the batch as if it were alone."""
    m = experts(40, rates=((4, "mul1"), (6, "mcg")))
    args, tokens = cpu.moe_args(m), 640
    x, grad = (cpu.put(rng.normal(size=(tokens, 128)), "float32") for _ in range(2))
    w, i = routing(rng, tokens, 32, 40)
    weights, ids = cpu.put(w, "float32"), cpu.put(i)
    y = ops.moe_trellis_swiglu(x, weights, ids, *args)
    dx, dweights = ops.moe_trellis_swiglu_backward(grad, x, weights, ids, *args)
    for part in (slice(0, 3), slice(300, 333), slice(637, 640)):
        pair = x[part], weights[part], ids[part]
        assert same_bits(ops.moe_trellis_swiglu(*pair, *args), y[part]), str(part)
        got = ops.moe_trellis_swiglu_backward(grad[part], *pair, *args)
        assert same_bits(got[0], dx[part]), str(part)
        assert same_bits(got[1], dweights[part]), str(part)
    check(cpu, x[:4], weights[:4], ids[:4], m, y[:4])
