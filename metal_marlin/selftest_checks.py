"""What the self-test asks of a backend besides agreeing with the reference on ordinary inputs.

A check gets the backend and returns what is wrong, or None. It may raise: that is reported like a wrong result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metal_marlin import ops
from metal_marlin.dispatch import dispatch_kernel
from metal_marlin.modules import TrellisLinear
from metal_marlin.selftest_cases import (
    FORMATS,
    MIXED,
    Mixture,
    Rounding,
    Sizes,
    mixture,
    moe_bound,
    moved,
    normal,
    random_matrix,
    rounding_error,
)

Results = tuple[Tensor, ...]


class Backend(Protocol):
    """Where ops run. `put` brings an input there; `run` calls, waits, and gives the results as CPU tensors."""

    @property
    def device(self) -> str: ...
    @property
    def rounding(self) -> Rounding: ...
    def put(self, tensor: Tensor) -> Tensor: ...
    def run(self, call: Callable[[], Results]) -> Results: ...


@dataclass(frozen=True)
class Check:
    name: str
    needs: str  # "cpu": anything will do; "gpu": Metal kernels; "mps": those and torch's own on the same stream
    function: Callable[[Backend, Backend, Sizes], str | None]


CHECKS: list[Check] = []


def check(name: str, needs: str = "cpu") -> Callable[[Callable[[Backend, Backend, Sizes], str | None]], Any]:
    def add(function: Callable[[Backend, Backend, Sizes], str | None]) -> Any:
        CHECKS.append(Check(name, needs, function))
        return function

    return add


def compare(name: str, got: Tensor, want: Tensor, bound: Tensor) -> tuple[str | None, float]:
    """What is wrong with `got` or None, and the largest error in units of what is allowed. NaN agrees with NaN only."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{name}: got {got.dtype} {list(got.shape)}; expected {want.dtype} {list(want.shape)}", float("inf")
    if not want.numel():
        return None, 0.0
    values, wanted = got.double(), want.double()
    agree = (values == wanted) | (values.isnan() & wanted.isnan())
    error = torch.where(agree, 0.0, (values - wanted).abs() / bound.double())
    error = torch.nan_to_num(error, torch.inf, torch.inf, torch.inf)
    worst = float(error.max())
    if worst <= 1:
        return None, worst
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"{name}: {int((error > 1).sum())} of {want.numel()} values are off; the worst at {list(place)}:"
        f" got {values[place]:.7g}, expected {wanted[place]:.7g} +- {float(bound[place]):.2g}"
    ), worst


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal to the bit; two NaNs of the same bits are equal, 0 and -0 are not."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_moe(backend: Backend, sizes: Sizes, inputs: Any, **options: Any) -> Tensor:
    there = moved(inputs, backend.put)
    (y,) = backend.run(lambda: (ops.moe_trellis_swiglu(*there, intermediate=sizes.intermediate, **options),))
    return y


def bound_of(backend: Backend, want: Tensor, sizes: Sizes) -> Tensor:
    """What a mixture's results on `backend` may be off by."""
    return moe_bound(want, sizes, rounding_error({"format": FORMATS[0], "rows": 1}, backend.rounding))


def agree(backend: Backend, reference: Backend, sizes: Sizes, inputs: Any) -> str | None:
    want = run_moe(reference, sizes, inputs)
    bound = bound_of(backend, want, sizes)
    return compare("y", run_moe(backend, sizes, inputs), want, bound)[0]


def with_ids(m: Mixture, ids: Tensor) -> tuple[Any, ...]:
    return (m.x, m.weights, ids, m.gate, m.up, m.down)


@check("a layer twice, router and experts, gives the same bits: 1, 8 and 40 tokens")
def layer_twice(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    m = mixture(generator(), sizes, 40, MIXED)
    gate = backend.put(normal(generator(1), len(m.gate.table), sizes.hidden))
    stacks = moved((m.gate, m.up, m.down), backend.put)
    for tokens in (1, 8, 40):
        x = backend.put(m.x[:tokens])

        def layer(x: Tensor = x) -> Results:
            weights, ids, *_ = ops.router(x, gate, top_k=3)
            return (ops.moe_trellis_swiglu(x, weights, ids, *stacks, intermediate=sizes.intermediate),)

        first, second = backend.run(layer), backend.run(layer)
        if not same_bits(first[0], second[0]):
            return f"{tokens} tokens: {int((first[0] != second[0]).sum())} of {first[0].numel()} values differ"
    return None


@check("a NaN in x stays in its own row")
def nan_stays(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    w = random_matrix(generator(), sizes.hidden, sizes.intermediate, ("mul1", 4), False)
    for rows in (4, 40):
        m = mixture(generator(1), sizes, rows)
        broken = m.x.clone()
        broken[2, 5] = float("nan")
        parts = moved((w.trellis, w.suh, w.svh), backend.put)
        found: dict[str, list[Tensor]] = {"trellis_linear": [], "moe_trellis_swiglu": []}
        for x in (m.x, broken):
            there = backend.put(x)

            def call(there: Tensor = there, parts: Any = parts) -> Results:
                return (ops.trellis_linear(there, *parts, codebook=w.codebook, out_features=sizes.intermediate),)

            found["trellis_linear"] += backend.run(call)
            found["moe_trellis_swiglu"].append(run_moe(backend, sizes, (x, *m.inputs[1:])))
        others = [row for row in range(rows) if row != 2]
        for name, (clean, dirty) in found.items():
            numbers = int((~dirty[2].isnan()).sum())
            if numbers:
                return f"{name}, {rows} rows: {numbers} values of row 2 are numbers; expected NaN"
            if not same_bits(clean[others], dirty[others]):
                return f"{name}, {rows} rows: rows without NaN have changed"
    return None


@check("ids as int32 and as int64 give the same bits")
def id_types(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    for tokens in (3, 40):
        m = mixture(generator(), sizes, tokens)
        narrow, wide = (run_moe(backend, sizes, with_ids(m, m.ids.to(t))) for t in (torch.int32, torch.int64))
        if not same_bits(narrow, wide):
            return f"{tokens} tokens: {int((narrow != wide).sum())} of {wide.numel()} values differ"
    return None


@check("x, weights and ids with strides give the same bits as contiguous ones")
def strides(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    m = mixture(generator(), sizes, 5)
    there = moved(m.inputs, backend.put)
    strided = tuple(backend.put(t.T.contiguous()).T for t in m.inputs[:3])

    def call(first: Any) -> Callable[[], Results]:
        return lambda: (ops.moe_trellis_swiglu(*first, *there[3:], intermediate=sizes.intermediate),)

    plain, other = backend.run(call(there[:3]))[0], backend.run(call(strided))[0]
    return None if same_bits(plain, other) else f"{int((plain != other).sum())} of {plain.numel()} values differ"


@check("experts that a token names twice, and one that all tokens name")
def repeated_ids(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    for tokens in (1, 8, 40):
        m = mixture(generator(), sizes, tokens)
        ids = m.ids.clone()
        ids[:, 0] = 4
        ids[0] = 4
        problem = agree(backend, reference, sizes, with_ids(m, ids))
        if problem:
            return f"{tokens} tokens: {problem}"
    return None


@check("more tokens than a chunk of prefill holds: 1100")
def two_chunks(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    small = Sizes(130, 130, sizes.experts)
    return agree(backend, reference, small, mixture(generator(), small, 1100, top_k=2).inputs)


@check("no tokens, and leading dimensions")
def shapes(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    m = mixture(generator(), sizes, 6)
    for lead in ((0,), (2, 3), (1, 6, 1)):
        tokens = math.prod(lead)
        first = [tensor[:tokens].reshape(*lead, tensor.shape[-1]) for tensor in m.inputs[:3]]
        y = run_moe(backend, sizes, (*first, m.gate, m.up, m.down))
        if y.shape != (*lead, sizes.hidden):
            return f"y has shape {list(y.shape)}; expected {[*lead, sizes.hidden]}"
    return None


@check("gradients of x and of the routing weights")
def gradients(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    """A backward product is a forward one with inputs and outputs exchanged; there are two of them and the activation's
    slope, so twice the forward's bound."""
    m = mixture(generator(), sizes, 6)
    w = random_matrix(generator(), sizes.hidden, sizes.intermediate, ("mul1", 4), False)
    names, found = ("x of moe_trellis_swiglu", "weights", "x of trellis_linear"), []
    for side in (backend, reference):
        x, weights, *rest = moved(m.inputs, side.put)
        parts = moved((w.trellis, w.suh, w.svh), side.put)

        def call(x: Tensor = x, weights: Tensor = weights, rest: Any = rest, parts: Any = parts) -> Results:
            a, b, c = (t.detach().requires_grad_() for t in (x, weights, x))
            ops.moe_trellis_swiglu(a, b, *rest, intermediate=sizes.intermediate).sum().backward()
            ops.trellis_linear(c, *parts, codebook=w.codebook, out_features=sizes.intermediate).sum().backward()
            return tuple(t.grad for t in (a, b, c) if t.grad is not None)

        found.append(side.run(call))
    bound = bound_of(backend, found[1][0], sizes)
    for name, got, want in zip(names, *found, strict=True):
        size = want.double().abs().amax(-1, keepdim=True)
        if name == "weights":  # sums over a whole row of results of the forward, signs mixed
            size = size + torch.tensor(float(sizes.hidden) ** 0.5)
        wide = 2 * size * float(bound.max()) / max(float(found[1][0].abs().max()), 1e-30)
        problem, _ = compare(name, got, want, wide.expand(want.shape))
        if problem:
            return problem
    return None


@check("modules that are moved keep their dtypes and values")
def modules(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    w = random_matrix(generator(), sizes.hidden, sizes.intermediate, ("mcg", 6), True)
    module = TrellisLinear.from_tensor(w, sizes.hidden, sizes.intermediate)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module.to(backend.device).to(torch.bfloat16)
    for name, tensor in module.named_buffers():
        if tensor.device.type != backend.device:
            return f"{name} is on {tensor.device}; expected {backend.device}"
        if not same_bits(tensor.cpu().reshape(-1), before[name].reshape(-1)):
            return f"{name} has changed: {tensor.dtype}; expected {before[name].dtype} and the same bits"
    return None


@check("ids out of range: NaN for their tokens, the others unharmed", "gpu")
def ids_out_of_range(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    """The others may differ by rounding: decode adds experts in the order in which the call first names them."""
    for tokens in (4, 40):
        m = mixture(generator(), sizes, tokens)
        for bad in (-2, len(m.gate.table)):
            ids = m.ids.clone()
            ids[1, 1] = bad
            clean, y = run_moe(backend, sizes, m.inputs), run_moe(backend, sizes, with_ids(m, ids))
            others = [token for token in range(tokens) if token != 1]
            if not y[1].isnan().all():
                return f"{tokens} tokens, id {bad}: {int((~y[1].isnan()).sum())} values are numbers; expected NaN"
            bound = bound_of(backend, clean[others], sizes)
            problem, _ = compare("y of the other tokens", y[others], clean[others], bound)
            if problem:
                return f"{tokens} tokens, id {bad}: {problem}"
    return None


@check("id -1, a slot without an expert, adds nothing", "gpu")
def nobody(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    for tokens in (4, 40):
        m = mixture(generator(), sizes, tokens)
        ids = m.ids.clone()
        ids[0, 1] = ids[1:3] = -1
        problem = agree(backend, reference, sizes, with_ids(m, ids))
        if problem:
            return f"{tokens} tokens: {problem}"
    return None


SCALE = """#include <metal_stdlib>
using namespace metal;
kernel void scale(device float* y [[buffer(0)]], constant float& factor [[buffer(1)]],
                  constant long& count [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  if (long(i) < count) y[i] *= factor;
}
"""


@check("dispatch_kernel: a kernel of the user's own", "gpu")
def own_kernel(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    y = backend.put(torch.arange(100.0).clone())

    def call() -> Results:
        dispatch_kernel(SCALE, "scale", [y, 2.5, 90], 128, 64)
        return (y,)

    (got,) = backend.run(call)
    want = torch.arange(100.0)
    want[:90] *= 2.5
    return compare("y", got, want, torch.full((100,), 1e-30, dtype=torch.float64))[0]


@check("ordered with torch's own kernels, without waiting between them", "mps")
def stream_order(backend: Backend, reference: Backend, sizes: Sizes) -> str | None:
    m = mixture(generator(), sizes, 4)
    found = []
    for side in (backend, reference):
        x, *rest = moved(m.inputs, side.put)

        def call(x: Tensor = x, rest: Any = rest) -> Results:
            for _ in range(20):
                y = ops.moe_trellis_swiglu(2 * x - x, *rest, intermediate=sizes.intermediate) + 0.5
            return (y,)

        found.append(side.run(call)[0])
    bound = bound_of(backend, found[1], sizes)
    return compare("y", found[0], found[1], bound)[0]
