"""What happens between the projections of an expert and at its end: activations and their arguments, limits, NaN,
overflow, the one rounding of the result."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DTYPES, Backend, array, ops, same_bits
from test_moe import ACTIVATIONS, check, experts, routing


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_every_kind(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """With down's svh zero the result is weight * bias, whose bits are known: ties, carries, overflow, subnormals."""
    m = experts(1, 2048, 128, bias=True, rates=((2, "mul1"),))
    bias = rng.integers(0, 2**16, 2048).astype(np.uint16).view(np.float16)
    bias[~np.isfinite(bias)] = 65504
    down = ref.Packed(m.down[0].trellis, m.down[0].suh, 0 * m.down[0].svh, "mul1", bias)
    near_one, small = [1 + 2.0**-11, 1 - 2.0**-12, 1 + 2.0**-8], [2.0**-5, 2.0**-13, 3 * 2.0**-14, 2.0**-20, 2.0**-24]
    factors = [1, -1, 3, 1e-30, *near_one, *small]
    weights = backend.put(np.array(factors)[:, None], "float32")
    ids = torch.zeros(len(factors), 1, dtype=torch.long, device=backend.device)
    x = backend.put(rng.normal(size=(len(factors), 2048)), dtype)
    y = backend.moe(x, weights, ids, ref.Experts(m.gate, m.up, [down], 2048, 128))
    assert same_bits(y, (weights * backend.put(bias).float() + 0.0).to(x.dtype))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend: Backend, rng: np.random.Generator, activation: str, bias: bool) -> None:
    """Inputs up to 30 times the usual size, so that limits bite and exponentials reach their ends."""
    m = experts(4, 128, 256, bias=bias, activation=activation)
    for size in (0.1, 1.0, 30.0):
        for dtype in DTYPES:
            x = backend.put(size * rng.normal(size=(7, 128)), dtype)
            w, i = routing(rng, 7, 2, 4)
            weights, ids = backend.put(w, "float32"), backend.put(i)
            check(backend, x, weights, ids, m, backend.moe(x, weights, ids, m), f"{dtype} times {size}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    """One activation per expert, set by biases alone (svh is zero), and read off the row of down that it scales:
    least squares over 128 outputs averages their roundings away, so the activation's own error is what is left."""
    p = experts(1, 128, 1).down[0]
    g, u = np.linspace(-8, 8, 512).astype(np.float16), rng.uniform(-9, 9, 512).astype(np.float16)
    gate, up = (
        [ref.Packed(p.trellis, p.suh, 0 * p.svh, "mul1", np.pad(v[e : e + 1], (0, 127))) for e in range(512)]
        for v in (g, u)
    )
    ids = torch.arange(512, device=backend.device)[:, None]
    x, weights = backend.put(rng.normal(size=(512, 128)), "float32"), torch.ones(512, 1, device=backend.device)
    down = [ref.Packed(p.trellis, p.suh, p.svh, "mul1", np.zeros(128, np.float16))] * 512
    y = array(backend.moe(x, weights, ids, ref.Experts(gate, up, down, 128, 1, activation)))
    row = backend.multiplied(p, 512).dense[0, :128]
    got, want = y @ row / (row @ row), ref.activate(activation, g.astype(np.float64), u.astype(np.float64))
    # a few roundings; those of the exponential's argument, at most 1.6 (|g| + g^3 / 22), count as often as it is
    # large; 1 + erf cancels
    argument = 1.6 * (
        np.abs(g.astype(np.float64)) + (np.abs(g.astype(np.float64)) ** 3 / 22 if activation == "gelu_tanh" else 0)
    )
    bound = ref.F32 * (8 * (4 + argument) * np.abs(want) + np.abs(g.astype(np.float64) * u))
    assert (np.abs(got - want) <= bound).all(), f"worst {np.max(np.abs(got - want) / bound)} times the bound"


def test_limit_and_alpha(backend: Backend, rng: np.random.Generator) -> None:
    """gpt-oss's constants are arguments; the other activations do not read them."""
    base = experts(4, 128, 128, bias=True)
    x, (w, i) = backend.put(3 * rng.normal(size=(5, 128)), "float32"), routing(rng, 5, 2, 4)
    weights, ids = backend.put(w, "float32"), backend.put(i)
    for alpha, limit in ((1.702, 7.0), (1.0, 0.5), (-2.0, 100.0), (0.0, 1.0)):
        m = ref.Experts(base.gate, base.up, base.down, 128, 128, "swiglu_oai", alpha, limit)
        check(backend, x, weights, ids, m, backend.moe(x, weights, ids, m), f"alpha {alpha}, limit {limit}")
    plain, odd = ops.moe_trellis_swiglu, backend.moe_args(base)
    assert same_bits(plain(x, weights, ids, *odd), plain(x, weights, ids, *odd[:-2], float("nan"), -1.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("side", ["gate", "up"])
def test_nan_in_one_projection(backend: Backend, rng: np.random.Generator, side: str, activation: str) -> None:
    """A limit does not turn NaN into a number: one NaN in a bias of gate or up reaches every output of its expert."""
    m = experts(2, bias=True, activation=activation)
    p = getattr(m, side)[1]
    bias = np.where(np.arange(128) == 77, np.float16("nan"), p.bias)
    broken = [getattr(m, side)[0], ref.Packed(p.trellis, p.suh, p.svh, p.codebook, bias)]
    x, weights = backend.put(rng.normal(size=(6, 128)), "float32"), backend.put(np.ones((6, 1)), "float32")
    y = backend.moe(x, weights, backend.put(np.arange(6)[:, None] % 2), dataclasses.replace(m, **{side: broken}))
    assert torch.isfinite(y[::2]).all()
    assert y[1::2].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_overflow(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    """x whose products leave float32 never crashes nor turns into small numbers; a limit keeps gpt-oss's experts
    finite."""
    m = experts(3, activation=activation)
    x = backend.put(np.sign(rng.normal(size=(2, 128))) * 1e35, "float32")
    weights, ids = backend.put(np.ones((2, 1)), "float32"), backend.put(np.array([[0], [2]]))
    y = array(backend.moe(x, weights, ids, m))
    if activation == "swiglu_oai":
        want = ref.moe(array(x), array(weights), array(ids), backend.multiplied_experts(m, 2))
        assert np.isfinite(want).all()
        assert np.abs(y - want).max() <= 1e-4 * np.abs(want).max()
    else:
        assert not np.isfinite(y).any()
