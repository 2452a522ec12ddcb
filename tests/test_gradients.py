"""Gradients of x, the routing weights, the gate and the correction against float64 autograd over the dequantized
weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from conftest import DTYPES, Backend, assert_close, ops, same_bits
from samples import EXPERTS, LINEAR, OPS, linear_args, moe_args, outputs, router_args

import metal_marlin._C as _C
import metal_marlin.ops
from metal_marlin import mps_gradients

# A level that is not exact computes the pre-activations again, off by 2.1e-4 of their size in the root mean square;
# slopes of the activations and the limit of one enlarge that. The backward's own arithmetic is the exact levels' too.
INEXACT = 2e-2


def close_gradient(got: torch.Tensor, want: torch.Tensor, width: int, what: str, axis: int | None = -1) -> None:
    """A gradient runs through at most three chains of products (gate or up, down, and back), each off by 4 sqrt(width
    + 16) roundings of its Cauchy-Schwarz length, which for random data is sqrt(width) times the result's root mean
    square, over a row (axis -1) or, where a row has a few numbers only, over all (None); then its dtype's rounding."""
    want_array = want.detach().double().numpy()
    rms = np.sqrt((want_array**2).mean(axis=axis, keepdims=True))
    bound = 3 * 4 * np.sqrt((width + 16) * width) * ref.F32 * rms
    bound = bound + (INEXACT * rms if any(_C.cpu_input_limits()[_C.cpu_level()].values()) else 0)
    assert np.abs(want_array).max() > 0, f"{what}: this gradient tests nothing"
    assert_close(got, want_array, ref.rounded(bound, want_array, str(got.dtype).removeprefix("torch.")), what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_linear(cpu: Backend, rng: np.random.Generator, dtype: str) -> None:
    for shape in ((), (1,), (3, 5), (33,)):
        args = linear_args(cpu, rng, shape, dtype)
        x = args[0].requires_grad_()
        y = ops.trellis_linear(*args)
        grad = cpu.put(rng.normal(size=y.shape), dtype)
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
def test_gradient_of_moe(cpu: Backend, rng: np.random.Generator, activation: str) -> None:
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
        args = moe_args(cpu, rng, (tokens,), dtype, activation)
        args[0] = (args[0] * size).requires_grad_()
        args[1].requires_grad_()
        args[2][0] = 3
        grad = cpu.put(rng.normal(size=(tokens, 200)), dtype)
        ops.moe_trellis_swiglu(*args).backward(grad)
        x, weights = (a.detach().cpu().double().requires_grad_() for a in args[:2])
        dense_moe(x, weights, args[2].cpu(), m).backward(grad.cpu().double())
        assert args[0].grad.dtype == args[0].dtype
        assert args[1].grad.dtype == args[1].dtype
        close_gradient(args[0].grad, x.grad, 256, f"x, {tokens} tokens, {dtype}")
        close_gradient(args[1].grad, weights.grad, 256, f"weights, {tokens} tokens, {dtype}", axis=None)


def test_gradient_of_slots_without_an_expert(cpu: Backend, rng: np.random.Generator) -> None:
    """The gradients are those of the other slots alone; the slot's own weight has none."""
    m = ref.Experts(EXPERTS.gate, EXPERTS.up, EXPERTS.down, 200, 130, "silu")
    for tokens, dtype in ((5, "float32"), (40, "bfloat16")):
        args = moe_args(cpu, rng, (tokens,), dtype, "silu")
        nobody = torch.from_numpy(rng.uniform(size=args[2].shape) < 0.5)
        nobody[-1] = True
        grad = cpu.put(rng.normal(size=(tokens, 200)), dtype)
        dx, dweights = ops.moe_trellis_swiglu_backward(grad, *args[:2], args[2].masked_fill(nobody, -1), *args[3:])
        assert (dweights[nobody] == 0).all()
        assert (dx[-1] == 0).all()
        x = args[0].double().requires_grad_()
        weights = args[1].double().requires_grad_()
        dense_moe(x, weights.masked_fill(nobody, 0), args[2], m).backward(grad.double())
        close_gradient(dx, x.grad, 256, f"x, {tokens} tokens")
        close_gradient(dweights, weights.grad, 256, f"weights, {tokens} tokens", axis=None)
        on_mps = mps_gradients.moe_backward(grad, *args[:2], args[2].masked_fill(nobody, -1), *args[3:])
        assert (on_mps[1][nobody] == 0).all()
        close_gradient(on_mps[0], x.grad, 256, f"x, {tokens} tokens, the formulas for MPS")


@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
@pytest.mark.parametrize("renormalize", [False, True], ids=["", "renormalize"])
def test_gradient_of_router(cpu: Backend, rng: np.random.Generator, kind: str, renormalize: bool) -> None:
    """x, gate and correction, from gradients of the weights and of the logits; a correction that only selects has
    none."""
    for shape, corrected in (((), True), ((7,), True), ((2, 3), False)):
        args = router_args(cpu, rng, shape, "float32", kind, corrected)
        args[5] = renormalize
        mine = [a.requires_grad_() for a in args[: 3 if corrected else 2]]
        weights, ids, logits = ops.router(*args)
        assert weights.requires_grad
        assert logits.requires_grad
        assert not ids.requires_grad
        grads = [cpu.put(rng.normal(size=t.shape), "float32") for t in (weights, logits)]
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


def public(name: str, args: list[Any]) -> torch.Tensor:
    """The typed function of `metal_marlin.ops` with an op's arguments."""
    if name == "trellis_linear":
        return metal_marlin.ops.trellis_linear(*args[:5], codebook=args[5], out_features=args[6])
    if name == "router":
        return metal_marlin.ops.router(*args[:3], top_k=args[3], kind=args[4], scale=args[6])[0]
    names = ("trellis", "table", "suh", "svh", "bias")
    stacks = [SimpleNamespace(**dict(zip(names, args[i : i + 5], strict=True))) for i in (3, 8, 13)]
    return metal_marlin.ops.moe_trellis_swiglu(*args[:3], *stacks, intermediate=args[18])


@pytest.mark.parametrize(
    ("name", "inputs"), [("trellis_linear", (0,)), ("moe_trellis_swiglu", (0, 1)), ("router", (0, 1, 2))]
)
def test_a_function_goes_past_autograd_only_where_nobody_asks_it(
    cpu: Backend, rng: np.random.Generator, name: str, inputs: tuple[int, ...]
) -> None:
    args = OPS[name](cpu, rng)
    if name == "router":
        args[4] = "topk_softmax"  # whose correction has a gradient
    plain = public(name, args)
    assert not plain.requires_grad
    for asked in inputs:
        own = list(args)
        own[asked] = args[asked].clone().requires_grad_()
        result = public(name, own)
        assert same_bits(result.detach(), plain)
        (gradient,) = torch.autograd.grad(result.square().sum(), own[asked])
        assert gradient.any()
        with torch.no_grad():
            assert not public(name, own).requires_grad
        with torch.inference_mode():
            assert same_bits(public(name, own), plain)


@pytest.mark.parametrize("name", ["trellis_linear", "moe_trellis_swiglu", "router"])
def test_second_derivative_is_never_silently_wrong(device: Backend, rng: np.random.Generator, name: str) -> None:
    """The gradient of a gradient is either right, by central differences, or an error; not zeros."""
    args = OPS[name](device, rng)
    x, direction = args[0].requires_grad_(), device.put(rng.normal(size=args[0].shape), "float32")

    def gradient(at: torch.Tensor) -> torch.Tensor:
        y = outputs(getattr(ops, name)(at, *args[1:]))[0]
        (result,) = torch.autograd.grad(y.square().sum(), at, create_graph=True)
        return result

    try:
        (second,) = torch.autograd.grad((gradient(x) * direction).sum(), x)
    except (RuntimeError, NotImplementedError) as error:
        message = str(error)
        assert "backward" in message or "derivative" in message or "differentiable" in message
        return
    step = 2.0**-7
    numeric = ((gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)).detach()
    assert torch.allclose(second, numeric, rtol=0, atol=float(0.02 * numeric.abs().max()))
