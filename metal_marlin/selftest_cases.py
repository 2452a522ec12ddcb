"""What the self-test runs: for every op its axes of variation, inputs for one combination of them, and how far two
correct implementations may differ on it.

The axes come from the lists of the C extension, so a codebook, rate, activation or router that is added there is
tested here. How cases are run, timed and reported is in selftest.py.
"""

from __future__ import annotations

import enum
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metal_marlin import _C, ops
from metal_marlin.packed import TrellisStack, trellis_shape
from metal_marlin.trellis import TrellisTensor, pad128

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rows that a decode kernel is compiled for: powers of two up to MM_DECODE_ROWS of csrc/shared/kernels.h.
DECODE_ROWS = (1, 2, 4, 8)
PREFILL = "prefill"
ROWS = (*DECODE_ROWS, PREFILL)
FORMATS = tuple((codebook, rate2) for codebook in _C.CODEBOOKS for rate2 in _C.RATES2[codebook])
MIXED = "mixed"  # every format in one layer
PROJECTIONS = ("gate", "up", "down")
BIASES = tuple(tuple(c) for n in range(4) for c in itertools.combinations(PROJECTIONS, n))
IDS = (torch.int32, torch.int64)
ALPHA, LIMIT = 1.702, 1.0  # a limit that a good part of the activations exceeds

# ---- how far apart two correct results may be ----
#
# Both sides compute in float32 and differ in the order of additions and in the rounding of exp and division. Model:
# every rounding is off by an independent amount of up to U of the number at hand. A value that n roundings went into is
# then off by about U * sqrt(n) times the size of the numbers along the way; that size is the row's, since the rotations
# spread every input over all of it. Eight of these for each side leave no room for chance in the millions of values of
# a run. One wrong weight out of n moves a column of the rotated product by 1 / sqrt(n) of that size, and the 128
# columns of its block by 1 / sqrt(128) of this: for 640 inputs by 3e-3; float32 is allowed 2e-5 (a mixture: 1.5e-4).
U = 2.0**-24
SIDES_AND_SPREAD = 2 * 8
ROTATIONS = 2 * 9  # seven additions, one scale of the transform, one of suh or svh: before and after a product
# exp within 4 ulp and a division within 2.5 (Metal's tables for precise maths), the polynomial of erf within 2, and the
# products around them; the slope of an activation passes errors of g on, enlarged by less than 3
ACTIVATION, SLOPE = 16.0, 3.0
# Metal's decode kernels (mul1 only) and the CPU's 16-bit levels leave out a weight's rounding to binary16, worth 2.1e-4
# of a weight's size (the root mean square over a codebook that is near normal with deviation 1: up to 2**-11 from 1
# to 2, half of that below, ...). Over a product it stays 2.1e-4 of the result's size; eight of these, and on one side
# only. Inputs of 16 bits add a sixth of that at most.
UNROUNDED = 8 * 2.0**-12 / (SIDES_AND_SPREAD * U)
# Inputs of 8 bits are off by at most 1/254 of their block's largest, evenly spread: with a largest of four times the
# root mean square, by 0.9 percent of it. Beside that the rounding of 3inst's and mcg's weights to 2**-12 is nothing.
BYTES = 8 * 0.01 / (SIDES_AND_SPREAD * U)
#: What the last rounding, to the result's dtype, may add on either side, relative to the value.
LAST = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = 2.0**-24  # float16 has nothing finer near 0


def product_error(inputs: int, rounding: float = 0.0) -> float:
    """Of one rotated product with so many inputs, relative to the size of the result's row, in U; `rounding` as
    rounding_error gives it."""
    return math.sqrt(inputs + ROTATIONS) + rounding


class Rounding(enum.Enum):
    """Where a side may multiply with weights as they are before their rounding to binary16, or rounds inputs."""

    EXACT = "nowhere"
    UNROUNDED_DECODE = "mul1 up to 8 rows"
    UNROUNDED = "everywhere"
    BYTES = "everywhere, and with inputs of 8 bits"


def rounding_error(values: Mapping[str, Any], rounding: Rounding) -> float:
    """What this combination's product may be off by for that, in U."""
    form, few = values["format"], values["rows"] != PREFILL
    if rounding is Rounding.BYTES:
        return BYTES
    if rounding is Rounding.UNROUNDED_DECODE and not (few and (form == MIXED or form[0] == "mul1")):
        return 0.0
    return 0.0 if rounding is Rounding.EXACT else UNROUNDED


def allowed(want: Tensor, relative: float, size: Tensor | None = None) -> Tensor:
    """The bound for each value of `want`; `relative` is in U, `size` that of its row (default: the row's largest)."""
    values = torch.nan_to_num(want.double(), 0.0, 0.0, 0.0).abs()
    rows = values.amax(-1, keepdim=True) if size is None else size
    return 2 * LAST[want.dtype] * values + SIDES_AND_SPREAD * U * relative * rows + SMALLEST


def exact(want: Tensor) -> Tensor:
    return torch.zeros(want.shape, dtype=torch.float64)


# ---- cases ----


@dataclass(frozen=True)
class Sizes:
    """Widths that are no multiples of 128 and, packed, of more blocks than a threadgroup takes in one turn."""

    hidden: int = 600
    intermediate: int = 700
    experts: int = 64  # of the router


@dataclass(frozen=True)
class Prepared:
    """`call(inputs)` runs the op; `bounds(the reference's results, how the other side rounds)` says what that
    side may differ by."""

    inputs: Any
    call: Callable[[Any], tuple[Tensor, ...]]
    bounds: Callable[[tuple[Tensor, ...], Rounding], tuple[Tensor, ...]]
    outputs: tuple[str, ...] = ("y",)


@dataclass(frozen=True)
class Op:
    """One op: the values of every axis, and the inputs of one combination."""

    name: str
    axes: Mapping[str, tuple[Any, ...]]
    prepare: Callable[[Mapping[str, Any], torch.Generator, Sizes], Prepared]
    #: Axes that the compiled kernel doesn't depend on.
    not_compiled: tuple[str, ...] = ()

    @property
    def variants(self) -> int:
        """Combinations that are compiled as kernels of their own."""
        return math.prod(len(values) for name, values in self.axes.items() if name not in self.not_compiled)


@dataclass(frozen=True)
class Case:
    op: Op
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.op.name}: " + ", ".join(f"{axis} {spell(value)}" for axis, value in self.values.items())

    def prepare(self, sizes: Sizes) -> Prepared:
        """The same inputs for the same name, whatever else runs."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return self.op.prepare(self.values, generator, sizes)


def spell(value: Any) -> str:
    """A value of an axis in a case's name: torch.float16 as float16, ("mul1", 5) as mul1-2.5, () as none."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int):
        return f"{value[0]}-{value[1] / 2:g}"
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class Stack:
    """The tensors of a TrellisStack, which the ops take as well."""

    trellis: Tensor
    table: Tensor
    suh: Tensor
    svh: Tensor
    bias: Tensor | None
    formats: int


def moved(value: Any, put: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it replaced by put(tensor)."""
    if isinstance(value, Tensor):
        return put(value)
    if isinstance(value, Stack):
        trellis, table, suh, svh = (put(tensor) for tensor in (value.trellis, value.table, value.suh, value.svh))
        return Stack(trellis, table, suh, svh, None if value.bias is None else put(value.bias), value.formats)
    if isinstance(value, (tuple, list)):
        return tuple(moved(item, put) for item in value)
    return value


# ---- random inputs ----


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def random_matrix(generator: torch.Generator, k: int, n: int, form: tuple[str, int], bias: bool) -> TrellisTensor:
    """Any tile is legal; scales of both signs, of a size that keeps results around 1."""
    codebook, rate2 = form
    k, n = pad128(k), pad128(n)
    tiles = torch.randint(-(2**15), 2**15, trellis_shape(k, n, rate2 / 2, codebook), generator=generator)
    suh, svh = ((0.5 + torch.rand(size, generator=generator)) * normal(generator, size).sign() for size in (k, n))
    values = normal(generator, n).half() if bias else None
    return TrellisTensor(tiles.to(torch.int16), suh.half(), (svh / math.sqrt(k)).half(), codebook, values)


def random_stack(generator: torch.Generator, k: int, n: int, forms: list[tuple[str, int]], bias: bool) -> Stack:
    stack = TrellisStack.from_experts([random_matrix(generator, k, n, form, bias) for form in forms])
    return Stack(stack.trellis, stack.table, stack.suh, stack.svh, stack.bias, stack.formats)


def random_rows(generator: torch.Generator, rows: int | str) -> int:
    """A count that this variant is chosen for: for decode, one that needs not fill it."""
    low, high = (33, 49) if rows == PREFILL else (int(rows) // 2 + 1, int(rows) + 1)
    return int(torch.randint(low, high, (), generator=generator))


def random_ids(generator: torch.Generator, tokens: int, top_k: int, experts: int) -> Tensor:
    """Different experts for one token, so that some are shared between tokens and some not."""
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


# ---- the ops ----


def prepare_linear(values: Mapping[str, Any], generator: torch.Generator, sizes: Sizes) -> Prepared:
    w = random_matrix(generator, sizes.hidden, sizes.intermediate, values["format"], values["bias"])
    x = normal(generator, random_rows(generator, values["rows"]), sizes.hidden).to(values["dtype"])
    outputs = sizes.intermediate

    def call(inputs: Any) -> tuple[Tensor, ...]:
        return (ops.trellis_linear(*inputs, codebook=w.codebook, out_features=outputs),)

    def bounds(want: tuple[Tensor, ...], rounding: Rounding) -> tuple[Tensor, ...]:
        return (allowed(want[0], product_error(sizes.hidden, rounding_error(values, rounding))),)

    return Prepared((x, w.trellis, w.suh, w.svh, w.bias), call, bounds)


def prepare_dequantize(values: Mapping[str, Any], generator: torch.Generator, sizes: Sizes) -> Prepared:
    w = random_matrix(generator, sizes.hidden, sizes.intermediate, values["format"], False)
    scales = (None, None) if values["domain"] == "rotated" else (w.suh, w.svh)

    def call(inputs: Any) -> tuple[Tensor, ...]:
        trellis, suh, svh = inputs
        rows, columns = sizes.hidden, sizes.intermediate
        return (ops.dequantize(trellis, suh, svh, codebook=w.codebook, in_features=rows, out_features=columns),)

    def bounds(want: tuple[Tensor, ...], rounding: Rounding) -> tuple[Tensor, ...]:
        """The codebook's values are defined bit by bit; two rotations of them are sums like any other."""
        rotated = values["domain"] == "rotated"
        return (exact(want[0]) if rotated else allowed(want[0], math.sqrt(ROTATIONS), want[0].abs().max().double()),)

    return Prepared((w.trellis, *scales), call, bounds)


@dataclass(frozen=True)
class Mixture:
    """Random experts and a routing."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    gate: Stack
    up: Stack
    down: Stack

    @property
    def inputs(self) -> tuple[Any, ...]:
        return (self.x, self.weights, self.ids, self.gate, self.up, self.down)


def mixture(
    generator: torch.Generator,
    sizes: Sizes,
    tokens: int,
    form: tuple[str, int] | str = FORMATS[0],
    bias: tuple[str, ...] = (),
    top_k: int = 3,
) -> Mixture:
    """`form` MIXED: the three projections' experts have every format between them."""
    experts = -(-len(FORMATS) // len(PROJECTIONS))
    every = list(itertools.islice(itertools.cycle(FORMATS), experts * len(PROJECTIONS)))
    stacks = {}
    for i, name in enumerate(PROJECTIONS):
        k, n = (sizes.intermediate, sizes.hidden) if name == "down" else (sizes.hidden, sizes.intermediate)
        forms = every[i::3] if form == MIXED else [form] * experts
        stacks[name] = random_stack(generator, k, n, forms, name in bias)  # type: ignore[arg-type]
    x = normal(generator, tokens, sizes.hidden)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return Mixture(x, weights, random_ids(generator, tokens, top_k, experts), **stacks)


def moe_bound(want: Tensor, sizes: Sizes, rounding: float = 0.0) -> Tensor:
    """An activation's error is that of gate and up, passed on, and its own; down's product spreads and adds to it."""
    first, second = (product_error(inputs, rounding) for inputs in (sizes.hidden, sizes.intermediate))
    return allowed(want, SLOPE * (first + ACTIVATION) + second)


def prepare_moe(values: Mapping[str, Any], generator: torch.Generator, sizes: Sizes) -> Prepared:
    tokens = random_rows(generator, values["rows"])
    m = mixture(generator, sizes, tokens, values["format"], values["bias"])
    x, weights, ids = m.x.to(values["dtype"]), m.weights.to(values["weights"]), m.ids.to(values["ids"])

    def call(inputs: Any) -> tuple[Tensor, ...]:
        options = {"activation": values["activation"], "alpha": ALPHA, "limit": LIMIT}
        return (ops.moe_trellis_swiglu(*inputs, intermediate=sizes.intermediate, **options),)

    def bounds(want: tuple[Tensor, ...], rounding: Rounding) -> tuple[Tensor, ...]:
        return (moe_bound(want[0], sizes, rounding_error(values, rounding)),)

    return Prepared((x, weights, ids, m.gate, m.up, m.down), call, bounds)


ROUTER_TOKENS, ROUTER_TOP_K = 5, 6


def prepare_router(values: Mapping[str, Any], generator: torch.Generator, sizes: Sizes) -> Prepared:
    experts, grouped = sizes.experts, values["groups"]
    options: dict[str, Any] = {
        "top_k": ROUTER_TOP_K,
        "kind": values["kind"],
        "renormalize": values["renormalize"],
        "scale": 1.7,
        "n_group": 8 if grouped else 1,
        "topk_group": 3 if grouped else 1,
    }
    gate = (normal(generator, experts, sizes.hidden) / math.sqrt(sizes.hidden)).to(values["gate"])
    kind = values["correction"]
    correction = None if kind is None else (0.1 * normal(generator, experts)).to(kind)
    x = normal(generator, 16 * ROUTER_TOKENS, sizes.hidden).to(values["dtype"])

    # Two experts with nearly the same score may change places by rounding, rightly: keep tokens whose choice stands
    # although the gate is off by 1e-4, far more than rounding does.
    full = (x.float(), gate.float(), None if correction is None else correction.float())
    chosen = ops.router(*full, **options)[1]
    steady = torch.ones(len(x), dtype=torch.bool)
    for _ in range(4):
        other = full[1] * (1 + 1e-4 * normal(generator, *gate.shape))
        steady &= (ops.router(full[0], other, full[2], **options)[1] == chosen).all(-1)
    x = x[steady][:ROUTER_TOKENS]

    def call(inputs: Any) -> tuple[Tensor, ...]:
        return tuple(ops.router(*inputs, **options, return_logits=True))

    def bounds(want: tuple[Tensor, ...], rounding: Rounding) -> tuple[Tensor, ...]:
        """exp turns a logit's absolute error into a relative one of each weight and of the sum it is divided by."""
        weights, ids, logits = want
        # a sum of `hidden` products, with partial sums no larger than the row's largest logits
        logit = SIDES_AND_SPREAD * U * math.sqrt(sizes.hidden) * logits.double().abs().amax(-1, keepdim=True)
        relative = 2 * logit + SIDES_AND_SPREAD * U * ACTIVATION
        return relative * weights.double().abs() + SMALLEST * U, exact(ids), logit.expand(logits.shape)

    return Prepared((x, gate, correction), call, bounds, ("weights", "ids", "logits"))


OPS = (
    Op(
        "trellis_linear",
        {"rows": ROWS, "format": FORMATS, "dtype": DTYPES, "bias": (False, True)},
        prepare_linear,
    ),
    Op(
        "moe_trellis_swiglu",
        {
            "rows": ROWS,
            "format": (*FORMATS, MIXED),
            "dtype": DTYPES,
            "weights": DTYPES,
            "ids": IDS,
            "activation": _C.ACTIVATIONS,
            "bias": BIASES,
        },
        prepare_moe,
    ),
    Op(
        "router",
        {
            "kind": _C.ROUTERS,
            "dtype": DTYPES,
            "gate": DTYPES,
            "correction": (None, *DTYPES),
            "renormalize": (True, False),
            "groups": (False, True),
        },
        prepare_router,
        not_compiled=("groups",),
    ),
    Op("dequantize", {"format": FORMATS, "domain": ("original", "rotated")}, prepare_dequantize),
)

# ---- which combinations ----


def every_value(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """As few combinations as hold every value of every axis."""
    for i in range(max(map(len, axes.values()))):
        yield {name: values[i % len(values)] for name, values in axes.items()}


def every_pair(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Combinations that hold every value of every axis together with every value of every other; few more than needed.

    Greedy: begin with a pair that is not held yet, then give every other axis the value that adds most new pairs.
    """
    names = list(axes)
    left = {
        (a, i, b, j): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def pair(a: str, i: int, b: str, j: int) -> tuple[str, int, str, int]:
        return (a, i, b, j) if names.index(a) < names.index(b) else (b, j, a, i)

    turn = 0
    while left:
        a, i, b, j = next(iter(left))
        chosen = {a: i, b: j}
        for name in sorted(axes, key=lambda n: -len(axes[n])):
            if name not in chosen:
                count = len(axes[name])
                # equal gains: another value each time, or one value would be in nearly all of them
                order = [(turn + step) % count for step in range(count)]
                gains = [sum(pair(name, v, other, w) in left for other, w in chosen.items()) for v in order]
                chosen[name] = order[gains.index(max(gains))]
        for one, two in itertools.combinations(names, 2):
            left.pop((one, chosen[one], two, chosen[two]), None)
        turn += 1
        yield {name: axes[name][chosen[name]] for name in names}


def every_combination(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*axes.values()):
        yield dict(zip(axes, combination, strict=True))


AMOUNTS: dict[str, Callable[[Mapping[str, tuple[Any, ...]]], Iterator[dict[str, Any]]]] = {
    "every value": every_value,
    "every pair of values": every_pair,
    "every combination": every_combination,
}


def cases_of(amount: str) -> list[Case]:
    return [Case(op, values) for op in OPS for values in AMOUNTS[amount](op.axes)]
