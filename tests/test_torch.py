"""How the ops fit PyTorch: opcheck, meta tensors, torch.compile and export, autocast, profiler, and the typed
functions."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
from conftest import Backend, ops, same_bits
from samples import DIFFERENTIABLE, OPS, linear_args, moe_args, outputs, router_args

import metal_marlin
import metal_marlin._C as _C

# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(3,), (2, 2), (), (0,)], ids=str)
def test_opcheck(device: Backend, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch with symbolic shapes; with and without gradients."""
    for dtype in ("float32", "bfloat16") if shape == (3,) else ("float32",):
        args = OPS[name](device, rng, shape, dtype)
        torch.library.opcheck(getattr(ops, name).default, tuple(args))
        for position in DIFFERENTIABLE.get(name, ()):
            args[position] = args[position].requires_grad_()
        if name in DIFFERENTIABLE:
            torch.library.opcheck(getattr(ops, name).default, tuple(args))


@pytest.mark.parametrize("kind", ["topk_softmax", "sigmoid_topk"])
def test_opcheck_of_router_kinds(device: Backend, rng: np.random.Generator, kind: str) -> None:
    for corrected in (True, False):
        args = router_args(device, rng, kind=kind, corrected=corrected)
        args[0].requires_grad_()
        torch.library.opcheck(ops.router.default, tuple(args))


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors(device: Backend, rng: np.random.Generator, name: str) -> None:
    """On the meta device the ops say what they would return: shapes, dtypes and strides."""
    for shape in ((4,), (0,), (2, 3), ()):
        args = OPS[name](device, rng, shape, "bfloat16")
        real = outputs(getattr(ops, name)(*args))
        meta = outputs(getattr(ops, name)(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]))
        for r, m in zip(real, meta, strict=True):
            assert m.device.type == "meta"
            assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("name", OPS)
def test_inputs_stay_and_outputs_are_new(device: Backend, rng: np.random.Generator, name: str) -> None:
    args = OPS[name](device, rng)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    out = outputs(getattr(ops, name)(*args))
    tensors = [(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor)]
    assert all(same_bits(a, b) for a, b in tensors)
    storages = {t.untyped_storage().data_ptr() for t in out if t.numel()}
    assert len(storages) == sum(t.numel() > 0 for t in out)
    assert not storages & {a.untyped_storage().data_ptr() for a, _ in tensors}


def test_typed_functions(device: Backend, rng: np.random.Generator) -> None:
    """metal_marlin.trellis_linear and the others: optional arguments, defaults, and the ops' bits."""
    x, trellis, suh, svh, bias, codebook, _ = linear_args(device, rng)
    none = device.put(None)
    linear = metal_marlin.trellis_linear
    want = ops.trellis_linear(x, trellis, suh, svh, bias, codebook, 130)
    assert same_bits(linear(x, trellis, suh, svh, bias, codebook=codebook, out_features=130), want)
    want = ops.trellis_linear(x, trellis, suh, svh, none, codebook, 256)
    assert same_bits(linear(x, trellis, suh, svh, codebook=codebook), want)
    want = ops.dequantize(trellis, suh, svh, codebook, 256, 256)
    assert same_bits(metal_marlin.dequantize(trellis, suh, svh, codebook=codebook), want)
    want = ops.dequantize(trellis, none, none, codebook, 200, 130)
    got = metal_marlin.dequantize(trellis, None, None, codebook=codebook, in_features=200, out_features=130)
    assert same_bits(got, want)

    x, gate, correction, *_ = router_args(device, rng)
    wanted = ops.router(x, gate, correction, 3, "sigmoid_topk", True, 2.0, 4, 2)
    options = {"top_k": 3, "kind": "sigmoid_topk", "scale": 2.0, "n_group": 4, "topk_group": 2}
    full = metal_marlin.router(x, gate, correction, return_logits=True, renormalize=True, **options)
    assert all(same_bits(a, b) for a, b in zip(full, wanted, strict=True))
    weights, ids = metal_marlin.router(x, gate, top_k=3, kind="topk_softmax")
    wanted = ops.router(x, gate, none, 3, "topk_softmax", True, 1.0, 1, 1)
    assert same_bits(weights, wanted[0])
    assert same_bits(ids, wanted[1])

    x, weights, ids, *rest = moe_args(device, rng)
    names = ("trellis", "table", "suh", "svh", "bias")
    stacks = [SimpleNamespace(**dict(zip(names, rest[i : i + 5], strict=True))) for i in (0, 5, 10)]
    got = metal_marlin.moe_trellis_swiglu(x, weights, ids, *stacks, intermediate=130, activation="swiglu_oai")
    assert same_bits(got, ops.moe_trellis_swiglu(x, weights, ids, *rest[:15], 130, "swiglu_oai", 1.702, 7.0))
    for stack in stacks:
        stack.bias = None
    plain = [none if i % 5 == 4 else t for i, t in enumerate(rest[:15])]
    got = metal_marlin.moe_trellis_swiglu(x, weights, ids, *stacks, intermediate=130)
    assert same_bits(got, ops.moe_trellis_swiglu(x, weights, ids, *plain, 130, "silu", 1.702, 7.0))


def test_cpu_levels() -> None:
    """A machine's SIMD levels can be switched at run time; a wrong name changes nothing."""
    before, levels = _C.cpu_level(), _C.cpu_levels()
    assert levels[0] == "scalar"
    assert before in levels
    with pytest.raises(ValueError, match=r"sse9.*scalar"):
        _C.set_cpu_level("sse9")
    with pytest.raises(TypeError, match="str"):
        _C.set_cpu_level(2)  # type: ignore[arg-type]
    assert _C.cpu_level() == before
    for level in levels:
        _C.set_cpu_level(level)
        assert _C.cpu_level() == metal_marlin.cpu_level() == level
    _C.set_cpu_level(before)


# ---------------------------------------------------------------- torch.compile and export


def block(x: torch.Tensor, gate: torch.Tensor, moe: list[Any], linear: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Router, experts, residual, a linear: what a decoder layer does with these ops."""
    weights, ids, logits = ops.router(x, gate, gate.new_empty(0), 2, "softmax_topk", True, 1.0, 1, 1)
    y = x + ops.moe_trellis_swiglu(x, weights, ids, *moe)
    return ops.trellis_linear(y.transpose(0, -2), *linear).relu(), logits


def block_args(b: Backend, rng: np.random.Generator) -> list[Any]:
    return [b.put(rng.normal(size=(5, 200)), "float32"), moe_args(b, rng)[3:], linear_args(b, rng)[1:]]


def require_compiler(backend: str) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler")


@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(device: Backend, rng: np.random.Generator, backend_name: str, dynamic: bool) -> None:
    """One graph, the bits of eager, and with dynamic=True one compilation for every number of tokens."""
    require_compiler(backend_name)
    torch._dynamo.reset()
    gate, moe, linear = block_args(device, rng)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend_name)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=counter)
    for tokens in (4, 7, 40) if dynamic else (4,):
        x = device.put(rng.normal(size=(tokens, 3, 200)), "float32")
        want, got = block(x, gate, moe, linear), compiled(x, gate, moe, linear)
        assert all(same_bits(w, g) for w, g in zip(want, got, strict=True)), f"{tokens} tokens"
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1  # dynamic=True starts with an empty one


@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
def test_compile_with_gradient(device: Backend, rng: np.random.Generator, backend_name: str) -> None:
    require_compiler(backend_name)
    torch._dynamo.reset()
    gate, moe, linear = block_args(device, rng)
    compiled = torch.compile(block, fullgraph=True, backend=backend_name)
    gradients = []
    for f in (block, compiled):
        x = device.put(np.random.default_rng(3).normal(size=(4, 3, 200)), "float32").requires_grad_()
        g = gate.clone().requires_grad_()
        y, logits = f(x, g, moe, linear)
        (y.sum() + (logits**2).sum()).backward()
        gradients.append((x.grad, g.grad))
    for eager, other in zip(*gradients, strict=True):
        # the same kernels, but sums of gradients in another order: a few roundings of the largest
        assert torch.allclose(eager, other, rtol=0, atol=float(16 * ref.F32 * eager.abs().max()))


def test_export_with_dynamic_tokens(device: Backend, rng: np.random.Generator) -> None:
    """Symbolic sizes survive the fake kernels: an export over 2..64 tokens runs at others than its example."""
    gate, moe, linear = block_args(device, rng)

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return block(x, gate, moe, linear)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    example = device.put(rng.normal(size=(6, 2, 200)), "float32")
    exported = torch.export.export(Block(), (example,), dynamic_shapes={"x": {0: tokens}}).module()
    for count in (2, 31):
        x = device.put(rng.normal(size=(count, 2, 200)), "float32")
        assert all(same_bits(a, b) for a, b in zip(exported(x), block(x, gate, moe, linear), strict=True))


# ---------------------------------------------------------------- modes and tools


def test_no_gradient_without_need(device: Backend, rng: np.random.Generator) -> None:
    """no_grad and inference_mode record nothing, and give the bits of a call that does."""
    for name in DIFFERENTIABLE:
        args = OPS[name](device, rng)
        recorded = outputs(getattr(ops, name)(args[0].clone().requires_grad_(), *args[1:]))
        assert recorded[0].requires_grad
        assert recorded[0].grad_fn is not None
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                plain = outputs(getattr(ops, name)(*args))
            assert not any(t.requires_grad for t in plain)
            assert all(same_bits(a, b) for a, b in zip(plain, recorded, strict=True)), name


def test_autocast_changes_nothing(device: Backend, rng: np.random.Generator) -> None:
    """The ops compute in float32 whatever x is, so autocast leaves their inputs and outputs alone."""
    for name in OPS:
        args = OPS[name](device, rng)
        plain = outputs(getattr(ops, name)(*args))
        with torch.autocast(device.device, dtype=torch.bfloat16):
            under = outputs(getattr(ops, name)(*args))
        assert all(same_bits(a, b) for a, b in zip(plain, under, strict=True)), name


def test_profiler_names(device: Backend, rng: np.random.Generator) -> None:
    calls = [(name, OPS[name](device, rng)) for name in OPS]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for name, args in calls:
            getattr(ops, name)(*args)
    seen = {event.key for event in profile.key_averages()}
    assert {f"metal_marlin::{name}" for name in OPS} <= seen
