"""The test oracle: EXL3 decoding, linear layers, mixtures of experts and routers in plain NumPy float64.

Slow, short and written from docs/format.md alone: it shares no code with csrc/ or metal_marlin/, so that agreement
means something. It also makes the random weights the tests run on (every bit string is a legal trellis) and says how
far a float32 kernel may be off. Shapes: k = padded input width, n = padded output width, both multiples of 128; x is
[tokens, features].
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

CODEBOOKS = ("3inst", "mcg", "mul1")
BLOCK = 128  # one Hadamard block; layers are padded to a multiple of it
F32 = 2.0**-24  # unit roundoff: a float32 operation is off by at most this share of its result
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}  # spacing of the subnormals


def rates2(codebook: str) -> tuple[int, ...]:
    """Twice the bits per weight that a codebook allows: 1..8, and 1.5, 2.5, 3.5 for mul1."""
    return tuple(sorted((*range(2, 17, 2), *((3, 5, 7) if codebook == "mul1" else ()))))


def pad128(size: int) -> int:
    """The smallest multiple of 128 that is not below `size`."""
    return -(-size // BLOCK) * BLOCK


# ---------------------------------------------------------------- decoding


@cache
def codebook(name: str) -> np.ndarray:
    """float16 [65536]: the value of every state. float64 is exact here, so the cast is the format's one rounding."""
    return before_rounding(name).astype(np.float16)


def before_rounding(name: str) -> np.ndarray:
    """The same in float64, without it."""
    state = np.arange(65536, dtype=np.uint64)
    if name == "mul1":
        product = (state * 0x83DCD12D) % 2**32
        total = sum((product >> shift) % 256 for shift in (0, 8, 16, 24))
        scale, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        return np.asarray((1024.0 + total.astype(np.float64)) * scale + offset)
    product = (state * 89226354 + 64248484 if name == "3inst" else state * 0xCBAC1FED) % 2**32
    pair = (product & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = ((pair >> shift).astype(np.uint16).view(np.float16).astype(np.float64) for shift in (0, 16))
    return np.asarray(low + high)


def last_bit(rate2: int) -> np.ndarray:
    """int [256]: the stream position just after the newest bit of each weight, e(t) = floor((t + 1) * rate2 / 2)."""
    return np.array([(t + 1) * rate2 // 2 for t in range(256)])


def states(trellis: np.ndarray) -> np.ndarray:
    """int16 [..., 8 * rate2] packed tiles -> int64 [..., 256]: the 16 stream bits up to each weight's newest bit."""
    words = np.ascontiguousarray(trellis).view("<u4").astype(np.int64)
    bits = np.stack([(words >> (31 - b)) & 1 for b in range(32)], axis=-1).reshape(*trellis.shape[:-1], -1)
    end, total = last_bit(trellis.shape[-1] // 8), bits.shape[-1]
    state = np.zeros((*trellis.shape[:-1], 256), np.int64)
    for b in range(16):
        state = 2 * state + bits[..., (end - 16 + b) % total]  # circular: a tile bites its own tail
    return state


def pack(state: np.ndarray, rate2: int) -> np.ndarray:
    """The inverse of `states` for a tail-biting sequence [..., 256]: int16 [..., 8 * rate2]."""
    end = last_bit(rate2)
    bits = np.zeros((*state.shape[:-1], 128 * rate2), np.int64)
    for t in range(256):
        for back in range(end[t] - (end[t - 1] if t else 0)):
            bits[..., end[t] - 1 - back] = (state[..., t] >> back) & 1
    words = (bits.reshape(*state.shape[:-1], -1, 32) << np.arange(31, -1, -1)).sum(-1)
    return words.astype("<u4").view("<i2")


def position(t: int) -> tuple[int, int]:
    """(row, column) inside a 16x16 tile of its t-th weight."""
    lane, j = divmod(t, 8)
    return 2 * (lane % 4) + j % 2 + 8 * (j // 2 % 2), lane // 4 + 8 * (j // 4)


def rotated(trellis: np.ndarray, name: str, of_states: np.ndarray | None = None) -> np.ndarray:
    """float64 [k, n]: the weight between the two Hadamard rotations; its values are exactly the codebook's, or those of
    `of_states` [65536]."""
    values = (codebook(name) if of_states is None else of_states)[states(trellis)].astype(np.float64)
    out = np.empty((trellis.shape[0] * 16, trellis.shape[1] * 16))
    for t in range(256):
        row, column = position(t)
        out[row::16, column::16] = values[:, :, t]
    return out


@cache
def hadamard() -> np.ndarray:
    """float64 [128, 128]: (-1)^popcount(a & b) / sqrt(128)."""
    return np.array([[(-1.0) ** bin(a & b).count("1") for b in range(BLOCK)] for a in range(BLOCK)]) / math.sqrt(BLOCK)


def rotate(a: np.ndarray) -> np.ndarray:
    """Multiplies every block of 128 along the last axis by the Hadamard matrix, which is its own inverse."""
    return (a.reshape(*a.shape[:-1], -1, BLOCK) @ hadamard()).reshape(a.shape)


def dequantize(trellis: np.ndarray, suh: np.ndarray, svh: np.ndarray, name: str) -> np.ndarray:
    """float64 [k, n]: the weight W, so that y = x @ W."""
    return rotated_back(rotated(trellis, name), suh, svh)


def rotated_back(what: np.ndarray, suh: np.ndarray, svh: np.ndarray) -> np.ndarray:
    """diag(suh) H What H diag(svh)."""
    weight = rotate(rotate(what).T).T
    return suh.astype(np.float64)[:, None] * weight * svh.astype(np.float64)


# ---------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantized matrix: trellis int16 [k/16, n/16, 8 * rate2], suh float16 [k], svh and bias float16 [n]."""

    trellis: np.ndarray
    suh: np.ndarray
    svh: np.ndarray
    codebook: str
    bias: np.ndarray | None = None

    @property
    def rate2(self) -> int:
        return self.trellis.shape[-1] // 8

    @cached_property
    def rotated(self) -> np.ndarray:
        return rotated(self.trellis, self.codebook)

    @cached_property
    def dense(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return rotated_back(self.rotated, self.suh, self.svh)

    @property
    def hoisted(self) -> float:
        """What a kernel adds to every weight only after it has summed the products."""
        return 0.0

    @property
    def input_steps(self) -> int:
        """How many steps a kernel's rotated inputs have up to their block's largest; 0: they are float32."""
        return 0


class Unrounded(Packed):
    """The same matrix as the Metal decode kernels multiply by: mul1's values without their rounding to binary16. They
    sum the products of the byte sums alone: the scale and the constant, about -3.4, follow once a sum."""

    @cached_property
    def rotated(self) -> np.ndarray:
        exact = rotated(self.trellis, self.codebook)
        if self.codebook != "mul1":
            return self.of_pairs(exact)
        scale, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        total = np.round((exact - offset) / scale) - 1024  # the rounding moved no value by half a step
        return (1024.0 + total) * scale + offset

    @staticmethod
    def of_pairs(exact: np.ndarray) -> np.ndarray:
        """3inst's and mcg's."""
        return exact

    @property
    def hoisted(self) -> float:
        scale, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        return float(1024.0 * scale + offset) if self.codebook == "mul1" else 0.0


@dataclass(frozen=True, eq=False)
class Integer(Unrounded):
    """A codebook as levels in integers multiply it: mul1 unrounded, the others rounded to multiples of 2^-12, every
    rotated input to a multiple of 1 / `limit` of its block's largest. The integer sums are exact."""

    limit: int = 0

    @staticmethod
    def of_pairs(exact: np.ndarray) -> np.ndarray:
        return np.rint(exact * 4096) / 4096  # both to even in the middle

    @property
    def hoisted(self) -> float:
        return 0.0

    @property
    def input_steps(self) -> int:
        return self.limit


class BeforeRounding(Packed):
    """3inst and mcg without the rounding of a pair's sum to binary16."""

    @cached_property
    def rotated(self) -> np.ndarray:
        return rotated(self.trellis, self.codebook, before_rounding(self.codebook))


def before(p: Packed) -> Packed:
    return BeforeRounding(p.trellis, p.suh, p.svh, p.codebook, p.bias)


def unrounded(p: Packed) -> Packed:
    return Unrounded(p.trellis, p.suh, p.svh, p.codebook, p.bias)


def integer(p: Packed, limit: int) -> Packed:
    return Integer(p.trellis, p.suh, p.svh, p.codebook, p.bias, limit)


def linear(x: np.ndarray, p: Packed, out_features: int) -> np.ndarray:
    """x [tokens, in] -> float64 [tokens, out]. What belongs to padding, in rows or columns of W, takes no part."""
    y = x @ p.dense[: x.shape[-1], :out_features]
    return y if p.bias is None else y + p.bias[:out_features].astype(np.float64)


def activate(kind: str, g: np.ndarray, u: np.ndarray, alpha: float = 1.702, limit: float = 7.0) -> np.ndarray:
    """What enters the down projection, from the gate's and the up projection's outputs."""
    with np.errstate(over="ignore"):
        if kind == "silu":
            return g / (1 + np.exp(-g)) * u
        if kind == "gelu":
            return 0.5 * g * (1 + np.vectorize(math.erf, otypes=[float])(g / math.sqrt(2))) * u
        if kind == "gelu_tanh":
            return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
        if kind == "swiglu_oai":
            g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
            return g / (1 + np.exp(-alpha * g)) * (u + 1)
    raise ValueError(kind)


@dataclass(frozen=True, eq=False)
class Experts:
    """The three projections of every expert and how they are joined."""

    gate: list[Packed]
    up: list[Packed]
    down: list[Packed]
    hidden: int
    intermediate: int
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0


def moe(x: np.ndarray, weights: np.ndarray, ids: np.ndarray, m: Experts) -> np.ndarray:
    """x [tokens, hidden], weights and ids [tokens, top_k] -> float64 [tokens, hidden]."""
    y = np.zeros((len(x), m.hidden))
    for t, slot in np.ndindex(ids.shape):
        e, row = ids[t, slot], x[t : t + 1]
        g, u = linear(row, m.gate[e], m.intermediate), linear(row, m.up[e], m.intermediate)
        y[t] += weights[t, slot] * linear(activate(m.activation, g, u, m.alpha, m.limit), m.down[e], m.hidden)[0]
    return y


@dataclass
class Routing:
    """weights, ids [tokens, top_k], logits [tokens, experts], margin [tokens]: the closest of a token's decisions."""

    weights: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    margin: np.ndarray


def ranked(scores: np.ndarray) -> list[int]:
    """Indices by descending score; equal scores by ascending index; NaN above everything."""
    return sorted(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), -np.nan_to_num(scores[i]), i))


def router(
    x: np.ndarray,
    gate: np.ndarray,
    correction: np.ndarray | None,
    top_k: int,
    kind: str,
    renormalize: bool = False,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
) -> Routing:
    """x [tokens, hidden], gate [experts, hidden], correction [experts] or None, all float64."""
    result = Routing(
        np.empty((len(x), top_k)), np.empty((len(x), top_k), np.int64), x @ gate.T, np.full(len(x), np.inf)
    )
    bias = np.zeros(len(gate)) if correction is None else correction
    for t, logits in enumerate(result.logits):

        def choose(scores: np.ndarray, count: int, t: int = t) -> list[int]:
            order = ranked(scores)
            with np.errstate(invalid="ignore"):
                gaps = [scores[a] - scores[b] for a, b in itertools.pairwise(order[: count + 1])]
            result.margin[t] = min([result.margin[t], *gaps])
            return order[:count]

        if kind == "sigmoid_topk":
            p = 1 / (1 + np.exp(-logits))
        else:
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        score = (logits if kind == "topk_softmax" else p) + bias
        if n_group > 1:
            groups = score.reshape(n_group, -1)
            kept = choose(np.sort(groups, axis=1)[:, -2:].sum(axis=1), topk_group)
            score = np.where(np.isin(np.arange(n_group), kept)[:, None], groups, -np.inf).reshape(-1)
        ids = choose(score, top_k)
        w = p[ids]
        if kind == "topk_softmax":
            w = np.exp(score[ids] - score[ids].max())
        if renormalize or kind == "topk_softmax":
            w = w / (w.sum() + (1e-20 if kind == "sigmoid_topk" else 0))
        result.ids[t], result.weights[t] = ids, w * scale
    return result


# ---------------------------------------------------------------- how far float32 may be off


def chain_bound(x: np.ndarray, before: np.ndarray, weight: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of ((x * before) H weight) H * after, for x [tokens, k] and weight [k, n] in the rotated domain.

    Every partial sum is at most S = |x * before|_2 |column|_2 (Cauchy-Schwarz; H keeps lengths), so each of the k + 16
    roundings (k sums, two rotations of 7 sums and a scaling) is at most F32 * S. They do not conspire: together they
    stay within 4 sqrt(k + 16) of one. The output rotation spreads a block's errors over its 128 columns, so S takes
    the block's root mean square column.
    """
    columns = (weight**2).sum(axis=0).reshape(-1, BLOCK).mean(axis=1).repeat(BLOCK) ** 0.5
    length = ((x * before[: x.shape[-1]]) ** 2).sum(axis=-1, keepdims=True) ** 0.5
    bound: np.ndarray = 4 * math.sqrt(weight.shape[0] + 16) * F32 * length * columns * np.abs(after)
    return bound


def linear_bound(x: np.ndarray, p: Packed, out_features: int) -> np.ndarray:
    """Of `linear`: the chain, and 4 roundings for the product with svh and the sum with the bias.

    A hoisted constant makes the chain's partial sums those of the weights without it, and takes the sum of the rotated
    inputs, which is off by at most 16 roundings of the sum of their sizes: the same in all columns of a block, which is
    what the output rotation gathers in the block's first column.

    Rounded inputs are each off by an even share of +- half a step, step / sqrt(12) in the mean square; 6 times that
    bounds their sum, by the argument of `chain_bound`.
    """
    suh, svh = p.suh.astype(np.float64), p.svh.astype(np.float64)
    bias = 0.0 if p.bias is None else np.abs(p.bias[:out_features].astype(np.float64))
    y = np.abs(linear(x, p, out_features))
    bound = chain_bound(x, suh, p.rotated - p.hoisted, svh)[:, :out_features] + 4 * F32 * (y + bias)
    if not len(x):
        return bound
    inputs = np.zeros((len(x), len(suh)))
    inputs[:, : x.shape[1]] = x * suh[: x.shape[1]]
    inputs = rotate(inputs)
    if p.input_steps:
        step = np.abs(inputs).reshape(len(x), -1, BLOCK).max(axis=2) / p.input_steps  # [tokens, blocks of k]
        k, n = p.rotated.shape
        power = (p.rotated**2).reshape(k // BLOCK, BLOCK, n // BLOCK, BLOCK).sum(axis=1).mean(axis=2)  # of a column
        bound += (6 / math.sqrt(12) * (step**2 @ power) ** 0.5).repeat(BLOCK, axis=1)[:, :out_features] * np.abs(
            svh[:out_features]
        )
    if p.hoisted:
        total = np.abs(inputs).sum(axis=1, keepdims=True)
        first = np.arange(0, out_features, BLOCK)
        bound[:, first] += 16 * F32 * abs(p.hoisted) * total * math.sqrt(BLOCK) * np.abs(svh[first])
    return bound


def moe_bound(x: np.ndarray, weights: np.ndarray, ids: np.ndarray, m: Experts) -> np.ndarray:
    """Of `moe`: gate's and up's errors through the activation (at the corners of their box), then through down as the
    root of squares of independent errors; down's own; a rounding per summed expert. 16 F32: exp, division, products."""
    bound = np.zeros((len(x), m.hidden))
    for t, slot in np.ndindex(ids.shape):
        e, row = ids[t, slot], x[t : t + 1]
        g, u = linear(row, m.gate[e], m.intermediate), linear(row, m.up[e], m.intermediate)
        dg, du = linear_bound(row, m.gate[e], m.intermediate), linear_bound(row, m.up[e], m.intermediate)
        a = activate(m.activation, g, u, m.alpha, m.limit)
        corners = [activate(m.activation, g + i * dg, u + j * du, m.alpha, m.limit) for i in (-1, 1) for j in (-1, 1)]
        da = np.abs(np.array(corners) - a).max(axis=0) + 16 * F32 * (np.abs(a) + np.abs(g) + np.abs(u))
        y = linear(a, m.down[e], m.hidden)
        through = (da**2 @ m.down[e].dense[: m.intermediate, : m.hidden] ** 2) ** 0.5
        own = linear_bound(a, m.down[e], m.hidden) + (ids.shape[1] + 1) * F32 * np.abs(y)
        bound[t] += (abs(weights[t, slot]) * (through + own))[0]
    return bound


def logits_bound(x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """Of the router's product, by the argument of `chain_bound` without the rotations."""
    return 4 * math.sqrt(x.shape[-1]) * F32 * np.outer((x**2).sum(-1) ** 0.5, (gate**2).sum(-1) ** 0.5)


def rounded(bound: np.ndarray, y: np.ndarray, dtype: str) -> np.ndarray:
    """Adds the one rounding of the result `y` to its dtype."""
    return bound + ROUNDOFF[dtype] * (np.abs(y) + bound) + SMALLEST[dtype]


# ---------------------------------------------------------------- random weights


def random_packed(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    rate2: int,
    name: str,
    bias: bool = False,
    junk: bool = False,
) -> Packed:
    """A random matrix with outputs of about the size of its inputs. junk: padding holds NaN, Inf and huge scales
    instead of zeros."""
    k, n = pad128(in_features), pad128(out_features)
    trellis = rng.integers(-(2**15), 2**15, (k // 16, n // 16, 8 * rate2), dtype=np.int16)
    suh = rng.choice([-1.0, 1.0], k) * rng.uniform(0.5, 1.5, k) / math.sqrt(in_features)
    svh = rng.choice([-1.0, 1.0], n) * rng.uniform(0.5, 1.5, n)
    shift = rng.normal(size=n)
    poison = np.array([np.nan, np.inf, -np.inf, 65504.0, -65504.0]) if junk else np.zeros(1)
    suh[in_features:] = rng.choice(poison, k - in_features)
    svh[out_features:] = rng.choice(poison, n - out_features)
    shift[out_features:] = rng.choice(poison, n - out_features)
    return Packed(
        trellis, suh.astype(np.float16), svh.astype(np.float16), name, shift.astype(np.float16) if bias else None
    )


def random_experts(
    rng: np.random.Generator,
    count: int,
    hidden: int,
    intermediate: int,
    rates: tuple[tuple[int, str], ...] = ((4, "mul1"),),
    bias: bool = False,
    junk: bool = False,
    **joined: object,
) -> Experts:
    """`count` experts; projection i of expert e takes entry 3e + i of `rates` (rate2, codebook), cyclically."""
    sizes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    made: list[list[Packed]] = [[], [], []]
    for e in range(count):
        for i, (size_in, size_out) in enumerate(sizes):
            rate2, name = rates[(3 * e + i) % len(rates)]
            made[i].append(random_packed(rng, size_in, size_out, rate2, name, bias, junk))
    return Experts(*made, hidden, intermediate, **joined)  # type: ignore[arg-type]
