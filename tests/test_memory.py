"""Memory: nothing is read or written outside of a tensor, nothing is left behind by a call or an error."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import RATES, Backend, ops, rate_id, same_bits
from test_bad_input import becomes, call, good, outputs, put_at, strided


def guarded(t: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of t whose last (or first) byte touches a page that nobody may access."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    copy = torch.frombuffer(
        memory, dtype=t.dtype, count=t.numel(), offset=(pages + 1) * page - size if at_end else page
    )
    copy.copy_(t.reshape(-1))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for address in (start, start + (pages + 1) * page):
        assert protect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    return copy.reshape(t.shape)


def check_guarded(backend: Backend, op: str, args: list[Any]) -> None:
    want = outputs(getattr(ops, op)(*args))
    for at_end in (True, False):
        moved = [guarded(a, at_end) if isinstance(a, torch.Tensor) and a.numel() else a for a in args]
        assert all(same_bits(a, b) for a, b in zip(outputs(getattr(ops, op)(*moved)), want, strict=True))


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_matrices_between_guard_pages(cpu: Backend, rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """Every tensor of every op that takes a matrix begins or ends at the edge of what may be read."""
    p = ref.random_packed(rng, 100, 250, *rate, bias=True)
    packed = [*cpu.packed(p)]
    for dtype in ("float32", "bfloat16", "float16"):
        for rows in (1, 3, 11):
            x, grad = (cpu.put(rng.normal(size=(rows, size)), dtype) for size in (100, 250))
            check_guarded(cpu, "trellis_linear", [x, *packed, cpu.put(p.bias), p.codebook, 250])
            check_guarded(cpu, "trellis_linear_backward", [grad, *packed, p.codebook, 100])
    check_guarded(cpu, "dequantize", [*packed, p.codebook, 100, 250])
    check_guarded(cpu, "dequantize", [packed[0], cpu.put(None), cpu.put(None), p.codebook, 100, 250])


@pytest.mark.parametrize("op", ["moe_trellis_swiglu", "moe_trellis_swiglu_backward", "router"])
def test_layers_between_guard_pages(cpu: Backend, op: str) -> None:
    arguments = good(op, cpu)
    check_guarded(cpu, op, list(arguments.values()))
    tokens = [name for name in ("grad", "x", "weights", "ids") if name in arguments]
    check_guarded(cpu, op, [a.repeat(9, 1) if name in tokens else a for name, a in arguments.items()])


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_trellis_at_any_address(cpu: Backend, rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """A tensor may start at any element of its storage, as slices and files loaded in place do."""
    p = ref.random_packed(rng, 128, 128, *rate)
    trellis, suh, svh = cpu.packed(p)
    x = cpu.put(rng.normal(size=(3, 128)), "float32")
    bias = cpu.put(None)
    want = ops.trellis_linear(x, trellis, suh, svh, bias, p.codebook, 128)
    for offset in (1, 3, 8):
        moved = [torch.cat([t.new_zeros(offset), t.reshape(-1)])[offset:].view(t.shape) for t in (trellis, suh, svh)]
        assert same_bits(ops.trellis_linear(x, *moved, bias, p.codebook, 128), want), f"offset {offset}"


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def allocated_bytes() -> tuple[int, int]:
    """(bytes that C code holds, the leak per call to tell from noise): exact with glibc, the peak elsewhere."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, 50_000
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd, 500


def references(t: torch.Tensor) -> int:
    """How many C++ owners a tensor has, where PyTorch says."""
    return int(getattr(t, "_use_count", int)())


LEAKS = [
    ("trellis_linear", "svh", becomes(torch.zeros(7, dtype=torch.float16))),
    ("trellis_linear", "codebook", becomes("mul2" * 25_000)),
    ("moe_trellis_swiglu", "ids", put_at((-1, 1), 99)),
    ("moe_trellis_swiglu", "down_table", put_at((2, 0), 2**40)),
    ("moe_trellis_swiglu", "activation", becomes("relu" * 25_000)),
    ("moe_trellis_swiglu_backward", "ids", put_at((-1, 1), -2)),
    ("router", "topk_group", becomes(9)),
    ("dequantize", "out_features", becomes(1)),
    ("trellis_linear", "", None),
    ("trellis_linear_backward", "", None),
    ("moe_trellis_swiglu", "", None),
    ("moe_trellis_swiglu_backward", "", None),
    ("router", "", None),
    ("dequantize", "", None),
]


@pytest.mark.parametrize(("op", "argument", "change"), LEAKS, ids=[f"{op}-{name or 'good'}" for op, name, _ in LEAKS])
def test_no_leak(device: Backend, op: str, argument: str, change: Callable[[Any], Any] | None) -> None:
    """1000 errors, or 100 good calls, with strided inputs of 100 KB leave neither memory nor an owner of a tensor."""
    arguments = good(op, device)
    tokens = [name for name in ("grad", "x", "weights", "ids") if name in arguments]
    arguments.update({name: strided(arguments[name].repeat(32, 1)) for name in tokens})
    if change is not None:
        arguments[argument] = change(arguments[argument])
    tensors = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
    owners = list(map(references, tensors))
    calls = 100 if change is None else 1000
    for i in range(calls + 30):
        if i == 30:
            before, _ = allocated_bytes()
        if change is None:
            assert all(references(t) <= 1 for t in outputs(call(op, arguments)))
        else:
            with pytest.raises(RuntimeError):
                call(op, arguments)
    assert list(map(references, tensors)) == owners
    after, noise = allocated_bytes()
    assert after - before < calls * noise
