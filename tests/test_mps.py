"""The MPS backend on Linux: the C encoders and the Metal text that a Mac runs, executed by the emulator.

Every op's own tests run on it as well (conftest.py's `backend`). Here is what is the GPU's alone: every kernel with all
loads and stores watched, chunks of tokens, kernels of the user's own, gradients.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import reference as ref
import test_linear
import test_moe
import torch
from conftest import EMULATED, Backend, array, assert_close, ops, running

import metal_marlin
import metal_marlin._C as _C
from metal_marlin import mps_gradients
from metal_marlin.mps import mps_problem

CPU = Backend("cpu")
MIXED = ((4, "mul1"), (3, "mul1"), (6, "mcg"), (2, "3inst"), (7, "mul1"), (10, "mcg"))

gpu = pytest.fixture(params=[EMULATED], ids=str, name="gpu")(running)


def test_more_than_a_chunk_of_tokens(gpu: Backend, rng: np.random.Generator) -> None:
    """Prefill runs in chunks of 1024 tokens that share scratch memory."""
    m = ref.random_experts(rng, 2, 128, 128, ((4, "mcg"),), False, False)
    x, weights = gpu.put(rng.normal(size=(1100, 128)), "float32"), torch.ones(1100, 1)
    ids = torch.from_numpy(rng.integers(0, 2, size=(1100, 1)))
    y = gpu.moe(x, weights, ids, m)
    for part in (slice(0, 20), slice(1015, 1035), slice(1080, 1100)):
        want = ref.moe(array(x[part]), array(weights[part]), array(ids[part]), m)
        assert_close(y[part], want, ref.moe_bound(array(x[part]), array(weights[part]), array(ids[part]), m))


def test_checked(gpu: Backend, emulated: Any, rng: np.random.Generator) -> None:
    """Every kernel once with all loads and stores watched for bounds, races and uninitialised threadgroup memory, in
    three orders of lanes and simdgroups: nothing is reported."""
    m = ref.random_experts(rng, 3, 136, 130, ((4, "mul1"), (3, "mul1"), (6, "mcg")), True, True)
    p, none = m.gate[1], gpu.put(None)
    for order in (0, 1, 7):
        with emulated.configured(check=True, order=order):
            for tokens in (1, 3, 10):
                test_moe.run(gpu, rng, m, tokens, 2)
                x = gpu.put(rng.normal(size=(tokens, 136)), "float32")
                test_linear.check(gpu, x, p, 130, f"{tokens} rows, order {order}")
            logits = torch.randn(2, 40), torch.randn(64, 40), torch.randn(64)
            for kind in _C.ROUTERS:
                ops.router(*logits, 6, kind, True, 1.0, 8, 4)
            for scales in (gpu.packed(p)[1:], (none, none)):
                ops.dequantize(gpu.packed(p)[0], *scales, p.codebook, 136, 130)
            assert [report for report in emulated.reports() if report.is_error] == []


def test_torch_inside_a_command_block_is_found(emulated: Any, rng: np.random.Generator) -> None:
    """The emulator sees every torch function that the extension calls, so that none can slip into a block unnoticed."""
    library = emulated.Library("kernel void idle() {}")
    p = ref.random_packed(rng, 128, 128, 4, "mcg")
    with pytest.raises(RuntimeError, match="refused a command block"):  # one inside of another
        library.block(library.kernel("idle"), lambda: CPU.linear(torch.ones(1, 128), p, 128))
    with pytest.raises(emulated.EmulatorError, match="aoti_torch_get_sizes is called inside a command block"):
        emulated.synchronize()


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
    weights, ids = test_moe.routing(rng, 14, 2, 4)
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
        want = CPU.linear(x, p, 128)
        emulated.synchronize()
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
