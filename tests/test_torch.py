"""How the ops fit PyTorch: opcheck, fake and meta tensors, torch.compile and export, gradients, profiler, GIL,
threads, determinism."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from conftest import DTYPES, Backend, assert_close, ops, same_bits

EXPERTS = ref.random_experts(
    np.random.default_rng(7), 5, 200, 130, ((4, "mul1"), (3, "mul1"), (6, "mcg"), (2, "3inst")), bias=True, junk=True
)
LINEAR = ref.random_packed(np.random.default_rng(8), 200, 130, 5, "mul1", bias=True, junk=True)
BACK = ref.random_packed(np.random.default_rng(9), 130, 200, 4, "mcg")


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


# ---------------------------------------------------------------- gradients


def close_gradient(got: torch.Tensor, want: torch.Tensor, width: int, what: str) -> None:
    """A gradient runs through at most three chains of products (gate or up, down, and back), each off by 4 sqrt(width
    + 16) roundings of its Cauchy-Schwarz length, which for random data is sqrt(width) times the result's root mean
    square; then its dtype's rounding."""
    want_array = want.detach().double().numpy()
    rms = np.sqrt((want_array**2).mean(axis=-1, keepdims=True))
    bound = 3 * 4 * np.sqrt((width + 16) * width) * ref.F32 * rms
    assert np.abs(want_array).max() > 0, f"{what}: this gradient tests nothing"
    assert_close(got, want_array, ref.rounded(bound, want_array, str(got.dtype).removeprefix("torch.")), what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_linear(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    for shape in ((), (1,), (3, 5), (33,)):
        args = linear_args(backend, rng, shape, dtype)
        x = args[0].requires_grad_()
        y = ops.trellis_linear(*args)
        grad = backend.put(rng.normal(size=y.shape), dtype)
        y.backward(grad)
        dense = torch.from_numpy(LINEAR.dense[:200, :130].copy())
        assert x.grad.dtype == x.dtype
        close_gradient(x.grad, grad.cpu().double() @ dense.T, 256, f"{shape}")
        assert same_bits(x.grad, ops.trellis_linear_backward(grad, *args[1:4], args[5], 200))


def dense_moe(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, m: ref.Experts) -> torch.Tensor:
    """The mixture in float64 PyTorch over dequantized weights, for autograd."""

    def dense(p: ref.Packed, size_in: int, size_out: int) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = (
            torch.from_numpy(p.dense[:size_in, :size_out].copy()),
            torch.from_numpy(p.bias[:size_out].astype(float)),
        )
        return lambda a: a @ weight + bias

    activations: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "silu": lambda g, u: F.silu(g) * u,
        "gelu": lambda g, u: F.gelu(g) * u,
        "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
        "swiglu_oai": lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)),
    }
    rows = []
    for t in range(len(x)):
        row = torch.zeros(m.hidden, dtype=torch.float64)
        for slot, e in enumerate(ids[t].tolist()):
            g, u = (dense(p[e], m.hidden, m.intermediate)(x[t]) for p in (m.gate, m.up))
            row = row + weights[t, slot] * dense(m.down[e], m.intermediate, m.hidden)(activations[m.activation](g, u))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
def test_gradient_of_moe(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    """x and the routing weights, through mixed rates, biases and junk in the padding; a repeated expert counts
    twice."""
    m = ref.Experts(EXPERTS.gate, EXPERTS.up, EXPERTS.down, 200, 130, activation)
    for tokens, dtype, size in (
        (1, "float32", 1.0),
        (6, "float32", 4.0),
        (40, "float32", 1.0),
        (6, "bfloat16", 1.0),
        (6, "float16", 1.0),
    ):
        args = moe_args(backend, rng, (tokens,), dtype, activation)
        args[0] = (args[0] * size).requires_grad_()
        args[1].requires_grad_()
        args[2][0] = 3
        grad = backend.put(rng.normal(size=(tokens, 200)), dtype)
        ops.moe_trellis_swiglu(*args).backward(grad)
        x, weights = (a.detach().cpu().double().requires_grad_() for a in args[:2])
        dense_moe(x, weights, args[2].cpu(), m).backward(grad.cpu().double())
        assert args[0].grad.dtype == args[0].dtype
        assert args[1].grad.dtype == args[1].dtype
        close_gradient(args[0].grad, x.grad, 256, f"x, {tokens} tokens, {dtype}")
        close_gradient(args[1].grad, weights.grad, 256, f"weights, {tokens} tokens, {dtype}")


@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
@pytest.mark.parametrize("renormalize", [False, True], ids=["", "renormalize"])
def test_gradient_of_router(backend: Backend, rng: np.random.Generator, kind: str, renormalize: bool) -> None:
    """x, gate and correction, from gradients of the weights and of the logits; a correction that only selects has
    none."""
    for shape, corrected in (((), True), ((7,), True), ((2, 3), False)):
        args = router_args(backend, rng, shape, "float32", kind, corrected)
        args[5] = renormalize
        mine = [a.requires_grad_() for a in args[: 3 if corrected else 2]]
        weights, ids, logits = ops.router(*args)
        assert weights.requires_grad
        assert logits.requires_grad
        assert not ids.requires_grad
        grads = [backend.put(rng.normal(size=t.shape), "float32") for t in (weights, logits)]
        got = torch.autograd.grad((weights, logits), mine, grads, allow_unused=True)

        theirs = [a.detach().cpu().double().requires_grad_() for a in mine]
        their_logits = theirs[0] @ theirs[1].T
        corrected_logits = their_logits + (theirs[2] if corrected else 0)
        if kind == "topk_softmax":
            w = corrected_logits.gather(-1, ids.cpu()).softmax(-1)
        else:
            w = (their_logits.softmax(-1) if kind == "softmax_topk" else their_logits.sigmoid()).gather(-1, ids.cpu())
            w = w / w.sum(-1, keepdim=True) if renormalize else w
        wanted = torch.autograd.grad(
            (w * 1.5, their_logits), theirs, [g.cpu().double() for g in grads], allow_unused=True
        )
        for name, g, want in zip(("x", "gate", "correction"), got, wanted, strict=False):
            if want is None:
                assert g is None or not g.any(), f"{name} must have no gradient"
            else:
                close_gradient(g, want, 64, f"{name} {shape}")


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


# ---------------------------------------------------------------- profiler, GIL, threads


def test_profiler_names(device: Backend, rng: np.random.Generator) -> None:
    calls = [(name, OPS[name](device, rng)) for name in OPS]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for name, args in calls:
            getattr(ops, name)(*args)
    seen = {event.key for event in profile.key_averages()}
    assert {f"metal_marlin::{name}" for name in OPS} <= seen


@pytest.mark.parametrize("name", OPS)
def test_gil_is_released(device: Backend, rng: np.random.Generator, threads: None, name: str) -> None:
    """While a long call runs, another Python thread keeps ticking."""
    torch.set_num_threads(1)
    op, args, seconds = getattr(ops, name), OPS[name](device, rng), 0.0
    if name == "dequantize":
        big = ref.random_packed(rng, 128, 128, 4, "mul1")
        trellis, suh, svh = (
            device.put(np.tile(a, r)) for a, r in ((big.trellis, (24, 24, 1)), (big.suh, 24), (big.svh, 24))
        )
        args = [trellis, suh, svh, "mul1", 3072, 3072]
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        longest = 0.0
        for _ in range(20):  # repeat the tokens until the call is long enough
            begin = time.perf_counter()
            op(*args)
            end = time.perf_counter()
            seconds = end - begin
            if seconds > 0.1 or name == "dequantize":
                inside = [begin, *(t for t in ticks if begin < t < end), end]
                longest = max(b - a for a, b in itertools.pairwise(inside))
                if longest < seconds / 3:
                    break
            else:
                args = grown(name, args, 4)
    finally:
        stop.set()
        ticker.join()
    assert longest < seconds / 3, f"no other thread ran for {longest:.3f} s of a call of {seconds:.3f} s"


def test_thread_counts_give_the_same_bits(backend: Backend, rng: np.random.Generator, threads: None) -> None:
    """1, 2, 3 and 4 threads, each twice."""
    for name in OPS:
        for shape in ((1,), (2,), (45,)):
            args, results = OPS[name](backend, rng, shape), []
            for count in (1, 2, 3, 4, 4, 1):
                torch.set_num_threads(count)
                results.append(outputs(getattr(ops, name)(*args)))
            assert all(same_bits(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True)), (
                f"{name} {shape}"
            )


def test_concurrent_callers(backend: Backend, rng: np.random.Generator) -> None:
    """Six Python threads call every op at once with their own sizes; each gets what it gets alone."""
    calls = [(name, OPS[name](backend, rng, (1 + 7 * i,))) for i in range(6) for name in OPS]
    alone = [outputs(getattr(ops, name)(*args)) for name, args in calls]
    wrong: list[str] = []
    start = threading.Barrier(6)

    def work(first: int) -> None:
        start.wait()
        for round_ in range(5):
            for i in range(len(calls)):
                name, args = calls[(first * 7 + i) % len(calls)]
                got = outputs(getattr(ops, name)(*args))
                if not all(same_bits(a, b) for a, b in zip(got, alone[(first * 7 + i) % len(calls)], strict=True)):
                    wrong.append(f"{name} in thread {first}, round {round_}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
