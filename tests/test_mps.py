"""The MPS backend on Linux: the C encoders and the Metal text that a Mac runs, executed by the emulator, against the
oracle.

Kernels run plain (fast) here for the numbers and, on small shapes, checked: every load and store watched for bounds,
races and uninitialised threadgroup memory. The decode kernels (up to 8 rows) multiply mul1's weights without their
rounding to binary16, so the oracle does too (reference.Unrounded); all else is exact to float32.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DTYPES, RATES, Backend, array, assert_close, ops, rate_id

import metal_marlin
import metal_marlin._C as _C
from metal_marlin import mps_gradients
from metal_marlin.mps import mps_problem

CPU = Backend("cpu")
DECODE_ROWS = 8  # csrc/shared/kernels.h


def as_computed(p: ref.Packed, rows: int) -> ref.Packed:
    return ref.unrounded(p) if rows <= DECODE_ROWS else p


def run(emulated: Any, call: Any, *args: Any) -> Any:
    result = call(*args)
    emulated.synchronize()
    return result


def check_linear(emulated: Any, x: torch.Tensor, p: ref.Packed, out_features: int) -> None:
    y = run(emulated, CPU.linear, x, p, out_features)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], out_features))
    rows = array(x).reshape(-1, x.shape[-1])
    oracle = as_computed(p, len(rows))
    want = ref.linear(rows, oracle, out_features)
    dtype = str(x.dtype).removeprefix("torch.")
    bound = ref.rounded(ref.linear_bound(rows, oracle, out_features), want, dtype)
    assert_close(y.reshape(-1, out_features), want, bound, f"{len(rows)} rows, {dtype}, {p.codebook} {p.rate2 / 2}")


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_linear_rates(emulated: Any, rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """Every codebook and rate, few rows and many, junk in the padding, with bias."""
    p = ref.random_packed(rng, 200, 300, *rate, True, True)
    for rows in (1, 40):
        check_linear(emulated, CPU.put(rng.normal(size=(rows, 200)), "float32"), p, 300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_and_strides(emulated: Any, rng: np.random.Generator, dtype: str) -> None:
    """Row counts around every variant's limit; batch shapes; transposed, expanded and offset inputs; no rows."""
    p = ref.random_packed(rng, 256, 128, 4, "mcg")
    whole = CPU.put(rng.normal(size=(70, 300)), dtype)
    for rows in (0, 2, 3, 5, 8, 9, 32, 33, 70):
        check_linear(emulated, whole[:rows, 44:], p, 128)
    check_linear(emulated, whole[:6, :256].reshape(2, 3, 256), p, 128)
    check_linear(emulated, whole[0, :256], p, 128)
    check_linear(emulated, CPU.put(rng.normal(size=(256, 5)), dtype).T, p, 128)
    check_linear(emulated, whole[:1, :256].expand(4, 256), p, 128)


def check_moe(
    emulated: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, m: ref.Experts, what: str = ""
) -> None:
    y = run(emulated, CPU.moe, x, weights, ids, m)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    rows, pairs = array(x).reshape(-1, m.hidden), [array(t).reshape(-1, ids.shape[-1]) for t in (weights, ids)]
    if len(rows) <= DECODE_ROWS:
        stacks = [[ref.unrounded(p) for p in stack] for stack in (m.gate, m.up, m.down)]
        m = ref.Experts(*stacks, m.hidden, m.intermediate, m.activation, m.alpha, m.limit)
    want = ref.moe(rows, *pairs, m)
    bound = ref.rounded(ref.moe_bound(rows, *pairs, m), want, str(x.dtype).removeprefix("torch."))
    assert_close(y.reshape(-1, m.hidden), want, bound, what)


def routed(rng: np.random.Generator, tokens: int, top_k: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([rng.permutation(count)[:top_k] for _ in range(tokens)], np.int64).reshape(tokens, top_k)
    return rng.dirichlet(np.ones(top_k), size=tokens).reshape(tokens, top_k), ids


MIXED = ((4, "mul1"), (3, "mul1"), (6, "mcg"), (2, "3inst"), (7, "mul1"), (10, "mcg"))


@pytest.mark.parametrize("activation", _C.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_moe(emulated: Any, rng: np.random.Generator, activation: str, bias: bool) -> None:
    """Mixed rates and codebooks, junk padding, from one token over the decode limit to several prefill tiles."""
    m = ref.random_experts(rng, 6, 200, 130, MIXED, bias, True, activation=activation)
    for tokens in (0, 1, 3, 8, 9, 50):
        weights, ids = routed(rng, tokens, 3, 6)
        x = CPU.put(rng.normal(size=(tokens, 200)), "float32")
        check_moe(emulated, x, CPU.put(weights, "float32"), CPU.put(ids), m, f"{tokens} tokens")


@pytest.mark.parametrize(("dtype", "weights_dtype", "ids_dtype"), [
    ("bfloat16", "bfloat16", "int64"), ("float16", "float32", "int32"), ("float32", "float16", "int32"),
])  # fmt: skip
def test_moe_dtypes_and_strides(
    emulated: Any, rng: np.random.Generator, dtype: str, weights_dtype: str, ids_dtype: str
) -> None:
    m = ref.random_experts(rng, 4, 128, 128, ((4, "mcg"),), False, False)
    for tokens in (4, 12):
        weights, ids = routed(rng, tokens, 2, 4)
        x = CPU.put(rng.normal(size=(128, tokens)), dtype).T
        w = CPU.put(weights.T, weights_dtype).T
        check_moe(emulated, x, w, CPU.put(ids.astype(ids_dtype)), m, f"{tokens} tokens")
        lead = (2, tokens // 2)
        check_moe(emulated, x.reshape(*lead, 128), w.reshape(*lead, 2), CPU.put(ids).reshape(*lead, 2), m)


def test_moe_repeated_and_foreign_ids(emulated: Any, rng: np.random.Generator) -> None:
    """A token may name an expert twice, more often than a group holds; an id that is none makes its token NaN, no
    other."""
    m = ref.random_experts(rng, 3, 128, 128, ((4, "mul1"),), False, False)
    for tokens in (2, 20):
        weights = np.full((tokens, 12), 1 / 12)
        ids = rng.integers(0, 3, size=(tokens, 12))
        x = CPU.put(rng.normal(size=(tokens, 128)), "float32")
        check_moe(emulated, x, CPU.put(weights, "float32"), CPU.put(ids), m, f"{tokens} tokens")
        clean = run(emulated, CPU.moe, x, CPU.put(weights, "float32"), CPU.put(ids), m)
        ids[1, 3] = 3
        y = run(emulated, CPU.moe, x, CPU.put(weights, "float32"), CPU.put(ids), m)
        others = torch.arange(tokens) != 1
        assert torch.isnan(y[1]).all()
        assert torch.equal(y[others], clean[others])


def test_more_than_a_chunk_of_tokens(emulated: Any, rng: np.random.Generator) -> None:
    """Prefill runs in chunks of 1024 tokens that share scratch memory."""
    m = ref.random_experts(rng, 2, 128, 128, ((4, "mcg"),), False, False)
    x, weights = CPU.put(rng.normal(size=(1100, 128)), "float32"), torch.ones(1100, 1)
    ids = torch.from_numpy(rng.integers(0, 2, size=(1100, 1)))
    y = run(emulated, CPU.moe, x, weights, ids, m)
    for part in (slice(0, 20), slice(1015, 1035), slice(1080, 1100)):
        want = ref.moe(array(x[part]), array(weights[part]), array(ids[part]), m)
        assert_close(y[part], want, ref.moe_bound(array(x[part]), array(weights[part]), array(ids[part]), m))


@pytest.mark.parametrize("kind", _C.ROUTERS)
def test_router(emulated: Any, rng: np.random.Generator, kind: str) -> None:
    """Against the CPU backend, whose own tests have the oracle: the same ids, scores to a few roundings; ties, NaN,
    groups."""
    cases = [(1, 1, 1, 1, 1), (37, 8, 3, 1, 1), (64, 6, 5, 8, 3), (512, 32, 2, 1, 1), (16, 4, 3, 16, 4)]
    for (experts, top_k, tokens, groups, kept), correction in product(cases, (False, True)):
        x, gate = (CPU.put(rng.normal(size=(n, 100)), d) for n, d in ((tokens, "bfloat16"), (experts, "float16")))
        added = torch.from_numpy(rng.normal(size=experts) * 0.1).float() if correction else torch.empty(0)
        args = (x, gate, added, top_k, kind, True, 1.5, groups, kept)
        got = run(emulated, ops.router, *args)
        _C.use_mps_emulator(None)
        want = ops.router(*args)
        _C.use_mps_emulator(emulated.load()._name)
        assert torch.equal(got[1], want[1])
        assert_close(got[0], array(want[0]), 1e-5 * np.abs(array(want[0])) + 1e-7)  # 100 products and an exp, float32
        assert_close(got[2], array(want[2]), np.full(want[2].shape, 100 * 2.0**-24 * 40))
    ties = torch.zeros(2, 8)
    assert (
        array(run(emulated, ops.router, ties, torch.ones(20, 8), torch.empty(0), 5, kind, True, 1.0, 1, 1)[1]).tolist()
        == [list(range(5))] * 2
    )
    ties[1, 0] = torch.nan
    weights, ids, _ = run(emulated, ops.router, ties, torch.ones(20, 8), torch.empty(0), 5, kind, True, 1.0, 1, 1)
    assert torch.isnan(weights[1]).all()
    assert sorted(ids[1].tolist()) == list(range(5))


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_dequantize(emulated: Any, rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """The codebook's values bit for bit; the dense weight as the CPU's to float32 rounding."""
    p = ref.random_packed(rng, 200, 300, *rate, False, True)
    trellis, suh, svh = CPU.packed(p)
    none = torch.empty(0, dtype=torch.float16)
    rotated = run(emulated, ops.dequantize, trellis, none, none, p.codebook, 200, 300)
    assert np.array_equal(array(rotated), p.rotated[:200, :300])
    dense = run(emulated, ops.dequantize, trellis, suh, svh, p.codebook, 200, 300)
    want = p.dense[:200, :300]
    assert_close(dense, want, np.full(want.shape, 18 * ref.F32 * np.sqrt((want**2).mean()) * 4))  # 18 roundings


def test_checked(emulated: Any, rng: np.random.Generator) -> None:
    """Every kernel once with all loads and stores watched, in three orders of lanes and simdgroups: nothing is
    reported."""
    m = ref.random_experts(rng, 3, 136, 130, ((4, "mul1"), (3, "mul1"), (6, "mcg")), True, True)
    p = m.gate[1]
    none = torch.empty(0, dtype=torch.float16)
    for order in (0, 1, 7):
        with emulated.configured(check=True, order=order):
            for tokens in (1, 3, 10):
                weights, ids = routed(rng, tokens, 2, 3)
                x = CPU.put(rng.normal(size=(tokens, 136)), "float32")
                check_moe(emulated, x, CPU.put(weights, "float32"), CPU.put(ids), m, f"{tokens} tokens, order {order}")
                check_linear(emulated, x, p, 130)
            for kind in _C.ROUTERS:
                run(
                    emulated,
                    ops.router,
                    torch.randn(2, 40),
                    torch.randn(64, 40),
                    torch.randn(64),
                    6,
                    kind,
                    True,
                    1.0,
                    8,
                    4,
                )
            for scales in (CPU.packed(p)[1:], (none, none)):
                run(emulated, ops.dequantize, CPU.packed(p)[0], *scales, p.codebook, 136, 130)
            assert [report for report in emulated.reports() if report.is_error] == []


SAXPY = """#include <metal_stdlib>
using namespace metal;
kernel void saxpy(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant float& a [[buffer(2)]],
                  constant long& n [[buffer(3)]], uint i [[thread_position_in_grid]]) {
  if (i < uint(n)) y[i] += a * x[i];
}
"""


def test_dispatch_kernel(emulated: Any) -> None:
    x, y = torch.arange(100.0), torch.ones(100)
    metal_marlin.dispatch_kernel(SAXPY, "saxpy", [x, y, 2.5, 100], 128, 32)
    emulated.synchronize()
    assert torch.equal(y, 1 + 2.5 * x)
    for args, message in (([x, y, "a"], "args\\[2\\] is a str"), ([1], "args has no tensor; expected at least one")):
        with pytest.raises((TypeError, RuntimeError), match=message):
            metal_marlin.dispatch_kernel(SAXPY, "saxpy", args, 128, 32)
    with pytest.raises(RuntimeError, match="grid has 2 lengths, group 1"):
        metal_marlin.dispatch_kernel(SAXPY, "saxpy", [x, y, 2.5, 100], (8, 8), 32)
    with pytest.raises(RuntimeError, match="no kernel of this name"):
        metal_marlin.dispatch_kernel(SAXPY, "daxpy", [x, y, 2.5, 100], 128, 32)
    emulated.reset()


def test_dispatch_kernel_needs_mps() -> None:
    with pytest.raises(RuntimeError, match="all of them on the MPS device"):
        metal_marlin.dispatch_kernel(SAXPY, "saxpy", [torch.ones(4), torch.ones(4), 1.0, 4], 4, 4)


@pytest.mark.parametrize("activation", _C.ACTIVATIONS)
def test_gradients_made_of_torch_ops(rng: np.random.Generator, activation: str) -> None:
    """What MPS tensors get for a gradient, on the CPU, against the CPU's C kernels."""
    m = ref.random_experts(rng, 4, 200, 130, MIXED, True, False, activation=activation)
    weights, ids = routed(rng, 14, 2, 4)
    x, grad = (torch.from_numpy(rng.normal(size=(2, 7, 200))).float() for _ in range(2))
    w, i = torch.from_numpy(weights).float().view(2, 7, 2), torch.from_numpy(ids).view(2, 7, 2)
    args = (grad, x, w, i, *CPU.moe_args(m))
    for got, want in zip(mps_gradients.moe_backward(*args), ops.moe_trellis_swiglu_backward(*args), strict=True):
        assert torch.allclose(got, want, rtol=0, atol=2e-5 * want.abs().max().item())
    p = m.gate[0]
    got = mps_gradients.linear_backward(grad[..., :130].contiguous(), *CPU.packed(p), p.codebook, 200)
    want = ops.trellis_linear_backward(grad[..., :130].contiguous(), *CPU.packed(p), p.codebook, 200)
    assert torch.allclose(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_commit(emulated: Any, rng: np.random.Generator) -> None:
    """Commit hands over what is encoded and does not wait: nothing runs before it, and results don't change."""
    p = ref.random_packed(rng, 128, 128, 4, "mul1")
    x = CPU.put(rng.normal(size=(2, 128)), "float32")
    assert _C.mps_commit_problem() is None
    with emulated.configured(commit_every=0, poison=True):  # the queue begins at a commit, or when someone waits
        want = run(emulated, CPU.linear, x, p, 128)
        y = CPU.linear(x, p, 128)
        assert y.isnan().all()
        _C.mps_commit()
        deadline = time.monotonic() + 60
        while not torch.equal(y, want) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert torch.equal(y, want)
        emulated.synchronize()


def test_commit_without_a_backend() -> None:
    if mps_problem() is None:
        pytest.skip("this machine has an Apple GPU")
    assert "lacks the symbol" in _C.mps_commit_problem()
    with pytest.raises(RuntimeError, match="mps_commit: there is no MPS backend"):
        _C.mps_commit()
