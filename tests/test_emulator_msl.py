"""The Metal language as the emulator runs it, against NumPy: types, rounding, functions, vectors, simdgroups, atomics.

Integers, half, bfloat and float32's basic operations have to agree in every bit; float32 functions, for which Metal too
gives an error bound only, within 4 units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import emulator
import numpy as np
import pytest
import torch
from emulator import Library

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

HEADER = """#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;
"""
COUNT = 512
NUMPY: dict[str, Any] = {
    "float": np.float32, "half": np.float16, "bfloat": np.uint16, "bool": np.bool_, "char": np.int8, "uchar": np.uint8,
    "short": np.int16, "ushort": np.uint16, "int": np.int32, "uint": np.uint32, "long": np.int64, "ulong": np.uint64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    emulator.reset()
    yield
    emulator.reset()


def tensor(array: np.ndarray, name: str) -> torch.Tensor:
    """Over the same memory; bfloat arrays hold their bits."""
    if name == "bfloat":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def values(name: str, seed: int) -> np.ndarray:
    """Random and awkward values of a type."""
    rng = np.random.default_rng(seed)
    if name == "bool":
        return rng.integers(0, 2, COUNT).astype(bool)
    if name in ("float", "half"):
        dtype = NUMPY[name]
        found = rng.normal(size=COUNT) * 2.0 ** rng.integers(-4, 5, COUNT)
        array = found.astype(dtype)
        tiny, most = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
        odd = [
            0,
            -0.0,
            1,
            -1,
            0.5,
            tiny,
            -tiny,
            3 * tiny,
            np.finfo(dtype).tiny,
            most,
            -most,
            np.inf,
            -np.inf,
            np.nan,
            2,
            1.5,
        ]
        array[rng.permutation(COUNT)[: len(odd)]] = odd
        return array
    info = np.iinfo(NUMPY[name])
    array = rng.integers(info.min, info.max, COUNT, dtype=NUMPY[name], endpoint=True)
    odd = [0, 1, info.max, info.min, info.max // 2, 2, 3, 7]
    array[rng.permutation(COUNT)[: len(odd)]] = odd
    return array


def half_of(exact: Fraction) -> np.float16:
    """An exact number to half, rounded once to nearest even."""
    near = np.float16(float(exact))
    around = [np.nextafter(near, np.float16(-np.inf)), near, np.nextafter(near, np.float16(np.inf))]
    finite = [h for h in around if np.isfinite(h)]
    return min(finite, key=lambda h: (abs(Fraction(float(h)) - exact), int(h.view(np.uint16)) & 1))


def half_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    out = np.empty_like(a)
    for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            out[i] = np.float16(np.float64(x) * np.float64(y) + np.float64(z))
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if exact == 0 or abs(exact) >= 65520:
            out[i] = np.float16(np.float64(x) * np.float64(y) + np.float64(z))
        else:
            out[i] = half_of(exact)
    return out


def bfloat_bits(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(x, np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def bfloat_value(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits_of(x: np.ndarray, count: Callable[[str], int], width: int) -> np.ndarray:
    return np.array([count(f"{int(v) & ((1 << width) - 1):0{width}b}") for v in x])


def to_integer(x: np.ndarray) -> np.ndarray:
    """Towards zero, of values clamped to +-1000; a NaN loses against the lower bound."""
    return np.trunc(np.clip(np.nan_to_num(x.astype(np.float64), nan=-1000), -1000, 1000))


class Row(NamedTuple):
    expression: str  # of x, y, z
    inputs: str
    output: str
    expected: Callable[..., Any]
    ulps: float = 0  # 0: exact


F1: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "log10": np.log10, "sqrt": np.sqrt, "sin": np.sin,
    "cos": np.cos, "tanh": np.tanh, "sinh": np.sinh, "atan": np.arctan, "rsqrt": lambda x: 1 / np.sqrt(x),
    "floor": np.floor,
    "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "fabs": np.abs, "fast::exp": np.exp, "precise::exp": np.exp,
    "precise::tanh": np.tanh, "fast::rsqrt": lambda x: 1 / np.sqrt(x),
    "round": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "exp10": lambda x: 10.0**x, "sign": lambda x: np.where(x == 0, x, np.nan_to_num(np.sign(x))),
}  # fmt: skip
EXACT = {"floor", "ceil", "trunc", "rint", "fabs", "sign", "sqrt", "round"}
ROWS = [
    # half rounds after every operation, keeps subnormals, and fma rounds once
    Row("x + y", "half half", "half", lambda x, y: x + y),
    Row("x - y", "half half", "half", lambda x, y: x - y),
    Row("x * y", "half half", "half", lambda x, y: x * y),
    Row("x / y", "half half", "half", lambda x, y: x / y),
    Row("x * y + z", "half half half", "half", lambda x, y, z: x * y + z),
    Row("x * 0.5h + 0.25h", "half", "half", lambda x: x * np.float16(0.5) + np.float16(0.25)),
    Row("fma(x, y, z)", "half half half", "half", half_fma),
    Row("x * y", "half float", "float", lambda x, y: x.astype(np.float32) * y),
    Row("half(x)", "float", "half", lambda x: x.astype(np.float16)),
    Row("float(x)", "half", "float", lambda x: x.astype(np.float32)),
    Row("half(x)", "int", "half", lambda x: x.astype(np.float32).astype(np.float16)),
    Row("int(clamp(x, -1000.0h, 1000.0h))", "half", "int", to_integer),
    Row("int(clamp(x, -1000.0f, 1000.0f))", "float", "int", to_integer),
    Row("x < y", "half half", "bool", lambda x, y: x < y),
    Row("abs(x)", "half", "half", np.abs),
    Row("exp(min(x, 8.0h))", "half", "half", lambda x: np.exp(np.fmin(x, np.float16(8)).astype(np.float64)), 1),
    # bfloat: conversions, and bfloat with bfloat
    Row("bfloat(x)", "float", "bfloat", bfloat_bits),
    Row("float(x)", "bfloat", "float", bfloat_value),
    Row("x", "bfloat", "float", bfloat_value),
    Row("bfloat(x)", "short", "bfloat", lambda x: bfloat_bits(x.astype(np.float32))),
    Row("x * y", "bfloat bfloat", "bfloat", lambda x, y: bfloat_bits(bfloat_value(x) * bfloat_value(y))),
    Row("x + y", "bfloat float", "float", lambda x, y: bfloat_value(x) + y),
    # float32
    Row("x + y", "float float", "float", lambda x, y: x + y),
    Row("x / y", "float float", "float", lambda x, y: x / y),
    Row("x * 1.1 + y", "float float", "float", lambda x, y: x * np.float32(1.1) + y),
    Row("fma(x, y, z)", "float float float", "float", lambda x, y, z: x.astype(np.float64) * y + z, 1),
    Row("min(x, y)", "float float", "float", np.fmin),
    Row("max(x, y)", "float float", "float", np.fmax),
    Row("clamp(x, -1.0f, 1.0f)", "float", "float", lambda x: np.fmin(np.fmax(x, np.float32(-1)), np.float32(1))),
    Row("copysign(x, y)", "float float", "float", np.copysign),
    Row("fmod(x, 3.0f)", "float", "float", lambda x: np.fmod(x, np.float32(3))),
    Row("pow(abs(x), 1.5f)", "float", "float", lambda x: np.abs(x.astype(np.float64)) ** 1.5, 4),
    Row("select(x, y, x < y)", "float float", "float", lambda x, y: np.where(x < y, y, x)),
    Row("select(x, y, bool(z))", "float float bool", "float", lambda x, y, z: np.where(z, y, x)),
    Row("isnan(x)", "float", "bool", np.isnan),
    Row("isinf(x)", "half", "bool", np.isinf),
    Row("isfinite(x)", "float", "bool", np.isfinite),
    Row("signbit(x)", "float", "bool", np.signbit),
    Row("mix(x, y, 0.25f)", "float float", "float", lambda x, y: x + (y - x) * np.float32(0.25)),
    # the same bits as another type
    Row("as_type<uint>(x)", "float", "uint", lambda x: x.view(np.uint32)),
    Row("as_type<float>(x)", "uint", "float", lambda x: x.view(np.float32)),
    Row("as_type<ushort>(x)", "half", "ushort", lambda x: x.view(np.uint16)),
    Row("as_type<half>(x)", "ushort", "half", lambda x: x.view(np.float16)),
    Row("as_type<ushort>(x)", "bfloat", "ushort", lambda x: x),
    Row("as_type<half2>(x).y", "uint", "half", lambda x: x.view(np.float16)[1::2]),
    Row("as_type<uint>(half2(x, y))", "half half", "uint", lambda x, y: np.stack([x, y], 1).view(np.uint32)[:, 0]),
    Row("as_type<float>(int(x))", "long", "float", lambda x: x.astype(np.int32).view(np.float32)),
    # integers
    Row("x + y", "int int", "int", lambda x, y: x + y),
    Row("x * 89226354u + y", "uint uint", "uint", lambda x, y: x * np.uint32(89226354) + y),
    Row("x * y", "ulong ulong", "ulong", lambda x, y: x * y),
    Row("x / (y | 1)", "uint uint", "uint", lambda x, y: x // (y | np.uint32(1))),
    Row("x % 7", "int", "int", lambda x: np.fmod(x, 7)),
    Row("(x << 3) ^ (x >> 5)", "uint", "uint", lambda x: (x << np.uint32(3)) ^ (x >> np.uint32(5))),
    Row("x >> 3", "int", "int", lambda x: x >> 3),
    Row("ushort(x) + ushort(y)", "uint uint", "int", lambda x, y: (x & 0xFFFF).astype(np.int64) + (y & 0xFFFF)),
    Row("uchar(x)", "int", "uchar", lambda x: x.astype(np.uint8)),
    Row("long(x)", "int", "long", lambda x: x),
    Row("uint(x)", "ulong", "uint", lambda x: x.astype(np.uint32)),
    Row("float(x)", "uint", "float", lambda x: x.astype(np.float32)),
    Row("popcount(x)", "uint", "uint", lambda x: bits_of(x, lambda b: b.count("1"), 32)),
    Row("popcount(x)", "ulong", "ulong", lambda x: bits_of(x, lambda b: b.count("1"), 64)),
    Row("clz(x)", "uint", "uint", lambda x: bits_of(x, lambda b: len(b) - len(b.lstrip("0")), 32)),
    Row("ctz(x)", "ushort", "ushort", lambda x: bits_of(x, lambda b: len(b) - len(b.rstrip("0")), 16)),
    Row("reverse_bits(x)", "uint", "uint", lambda x: bits_of(x, lambda b: int(b[::-1], 2), 32)),
    Row("extract_bits(x, 5, 7)", "uint", "uint", lambda x: x >> np.uint32(5) & np.uint32(127)),
    Row("extract_bits(x, 3, 6)", "int", "int", lambda x: (x << np.int32(23)) >> np.int32(26)),
    Row("insert_bits(x, y, 4, 8)", "uint uint", "uint",
        lambda x, y: x & ~np.uint32(0xFF0) | (y & np.uint32(255)) << np.uint32(4)),
    Row("rotate(x, 9u)", "uint", "uint", lambda x: x << np.uint32(9) | x >> np.uint32(23)),
    Row("mulhi(x, y)", "uint uint", "uint", lambda x, y: x.astype(np.uint64) * y >> np.uint64(32)),
    Row("min(x, y)", "int int", "int", np.minimum),
    Row("max(x, y)", "ulong ulong", "ulong", np.maximum),
    Row("clamp(x, -5, 9)", "int", "int", lambda x: np.clip(x, -5, 9)),
    Row("abs(x)", "short", "short", lambda x: np.where(x < 0, -x, x)),
    Row("absdiff(x, y)", "uint uint", "uint", lambda x, y: np.where(x > y, x - y, y - x)),
    Row("addsat(x, y)", "short short", "short", lambda x, y: np.clip(x.astype(int) + y, -32768, 32767)),
    Row("x == y ? 1 : -1", "char char", "int", lambda x, y: np.where(x == y, 1, -1)),
    # vectors
    Row("dot(float4(x, y, z, 1), float4(2, 3, 4, 5))", "float float float", "float",
        lambda x, y, z: ((x * np.float32(2) + y * np.float32(3)) + z * np.float32(4)) + np.float32(5)),
    Row("float4(half4(x, y, x, y))[3]", "half half", "float", lambda x, y: y.astype(np.float32)),
    Row("(float2(x, y).yx * 2.0f + float2(1, 2)).x", "float float", "float",
        lambda x, y: y * np.float32(2) + np.float32(1)),
    Row("half4(float4(x)).zw[1]", "float", "half", lambda x: x.astype(np.float16)),
    Row("(uint4(x, y, x, y) >> uint4(1, 2, 3, 4)).w", "uint uint", "uint", lambda x, y: y >> np.uint32(4)),
    Row("any(int4(x, y, 0, 1) > int4(y, x, 1, 1))", "int int", "bool", lambda x, y: (x > y) | (y > x)),
    Row("all(float2(x, y) < float2(y, INFINITY))", "float float", "bool", lambda x, y: (x < y) & (y < np.inf)),
    Row("max(float4(x, y, 0, 0), 0.5f).y", "float float", "float", lambda x, y: np.fmax(y, np.float32(0.5))),
    Row("popcount(uint2(x, y)).y", "uint uint", "uint", lambda x, y: bits_of(y, lambda b: b.count("1"), 32)),
    Row("fma(half2(x), half2(y), half2(z)).y", "half half half", "half", half_fma),
    Row("float4(float2(x, y), float2(y, x)).w", "float float", "float", lambda x, y: x),
    Row("(-float3(x, y, x)).z", "float float", "float", lambda x, y: -x),
    Row("uint(simd_vote::vote_t(simd_vote(x)))", "ulong", "uint", lambda x: x.astype(np.uint32)),
    *[Row(f"{name}(x)", "float", "float", lambda x, f=f: f(x.astype(np.float64)), 0 if name in EXACT else 4)
      for name, f in F1.items()],
]  # fmt: skip


def row_kernel(index: int, row: Row) -> str:
    inputs = row.inputs.split()
    arguments = [f"device const {t}* in{k} [[buffer({k})]]" for k, t in enumerate(inputs)]
    loads = " ".join(f"{t} {'xyz'[k]} = in{k}[i];" for k, t in enumerate(inputs))
    return (
        f"kernel void row{index}({', '.join(arguments)}, device {row.output}* out [[buffer({len(inputs)})]], "
        f"uint i [[thread_position_in_grid]]) {{ {loads} out[i] = {row.expression}; }}\n"
    )


@pytest.fixture(scope="module")
def rows() -> Library:
    return Library(HEADER + "".join(row_kernel(i, row) for i, row in enumerate(ROWS)))


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[f"{row.output}-{row.expression}" for row in ROWS])
def test_expression(rows: Library, index: int) -> None:
    row = ROWS[index]
    types = row.inputs.split()
    arrays = [values(t, 10 * index + k) for k, t in enumerate(types)]
    if row.expression.startswith("fma") and types[0] == "half":  # what two roundings would get wrong
        a, b, c = (np.float16(v) for v in (1 + 2**-10, (1 - 2**-10) * 2**-11, 1 + 2**-10))
        for array, value in zip(arrays, (a, b, c), strict=True):
            array[:2] = value
    got = np.zeros(COUNT, NUMPY[row.output])
    bound = [tensor(array, t) for array, t in zip(arrays, types, strict=True)]
    rows.run(f"row{index}", [*bound, tensor(got, row.output)], COUNT, 128)
    with np.errstate(all="ignore"):
        want = np.asarray(row.expected(*arrays))
        if row.output == "bfloat":
            got, want = bfloat_value(got), bfloat_value(want)
        if row.ulps == 0:
            want = want.astype(got.dtype)
            differs = ~((got == want) | ((got != got) & (want != want)))
            if got.dtype.kind == "f":
                differs |= (np.signbit(got) != np.signbit(want)) & ~np.isnan(want)
        else:
            near = want.astype(got.dtype)
            unit = np.spacing(np.abs(near)).astype(np.float64)
            off = np.abs(got.astype(np.float64) - want) > row.ulps * unit
            differs = np.where(np.isfinite(near), off, ~((got == near) | (np.isnan(got) & np.isnan(near))))
    assert not differs.any(), [(*(a[i] for a in arrays), got[i], want[i]) for i in np.flatnonzero(differs)[:4]]


# ---- the language ----

LANGUAGE = """
#define CASES(X) X(0, 3) X(1, 5) X(2, 7)
enum kind { FIRST, SECOND, THIRD };
constant float table[] = {1.5, 2.5, 3.5, 4.5};
struct Pair { float a; int b; };
struct Holder {
  float4 v[2];
  thread float4& at(int i) thread { return v[i]; }
  float total() const thread { return v[0].x + v[1].w; }
};
template <int N, typename T = float> constexpr T cube() { return T(N * N * N); }
template <int KIND> inline uint code(uint v) {
  switch (KIND) {
#define X(id, factor) case id: return v * factor;
    CASES(X)
#undef X
  }
  return 0;
}
inline Pair make(device const float* x, uint i) { Pair p = {x[i], int(i)}; return p; }
inline void twice(thread float& v) { v *= 2; }
inline void twice(threadgroup float* v, uint i) { v[i] *= 2; }
template <typename T, int N> struct Sum {
  T parts[N];
  Sum() thread { for (int i = 0; i < N; i++) parts[i] = T(0); }
  void add(T v, int i) thread { parts[i % N] += v; }
  T all() const thread { T s = T(0); for (int i = 0; i < N; i++) s += parts[i]; return s; }
};

template <typename T, int SCALE>
[[kernel, max_total_threads_per_threadgroup(256)]] void scaled(device const T* x [[buffer(0)]],
    device T* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  static_assert(sizeof(T) <= 4, "small types");
  constexpr T factor = T(SCALE);
  y[i] = x[i] * factor;
}
template [[host_name("scaled_float_3")]] [[kernel]] void scaled<float, 3>(device const float*, device float*, uint);
template [[host_name("scaled_half_2")]] [[kernel]] decltype(scaled<half, 2>) scaled<half, 2>;

kernel void language(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
    constant Pair& pair [[buffer(2)]], constant float* weights [[buffer(3)]], constant long& n [[buffer(4)]],
    constant uint& bits [[buffer(5)]], uint i [[thread_position_in_grid]], uint in [[thread_index_in_threadgroup]]) {
  threadgroup float one[32], two[4][8];
  alignas(16) threadgroup Pair pairs[32];
  one[in] = x[i];
  two[in / 8][in % 8] = x[i] + 1.0;
  pairs[in] = make(x, i);
  twice(one, in);
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  float4 v = *(threadgroup const float4*)(one + (in & ~3u));
  float4 w = 0.0f;
  w.xy = v.zw;
  w.z = v[1];
  w.wz += float2(1.0f, 0.5f);
  Holder h;
  h.at(0) = w;
  h.at(1) = float4(table[in & 3], make(x, i).a, 0, 1);
  float sum = h.total() + cube<2>() + float(code<THIRD>(i)) + pair.a * float(pair.b);
  twice(sum);
  Sum<float, 3> parts;
  for (ushort k = 0; k < 8; k++) parts.add(two[k % 4][in & 7], k);
  sum += parts.all() + weights[in & 1] + float(n) + as_type<float>(bits);
  float own[8] = {0};
  do { own[in & 7] += 1; } while (own[in & 7] < 3);
  y[i] = (in & 1) ? sum + own[in & 7] : -sum + float(pairs[31 - in].b);
}
"""


def language_expected(x: np.ndarray) -> np.ndarray:
    table, out = [1.5, 2.5, 3.5, 4.5], np.zeros_like(x)
    for i in range(len(x)):
        inside, first = i % 32, i - i % 32
        v = [2 * x[first + (inside & ~3) + k] for k in range(4)]
        w = [v[2], v[3], v[1] + 0.5, 1.0]
        total = 2 * (w[0] + 1 + 8 + 7 * i + 2.5 * 4)
        assert table[inside & 3] > 0
        parts = sum(x[first + k % 4 * 8 + (inside & 7)] + 1 for k in range(8))
        total += parts + [0.25, 0.75][inside & 1] + 5 + 2.0
        out[i] = total + 3 if inside & 1 else -total + (first + 31 - inside)
    return out


@pytest.mark.parametrize("check", [False, True])
def test_language(check: bool) -> None:
    """Templates, host names, macros, structs, methods, overloads, threadgroup arrays, swizzles, constant tables.
    Small integers and halves: every sum is exact in any order."""
    with emulator.configured(check=check):
        library = Library(HEADER + LANGUAGE)
        x = np.random.default_rng(1).integers(-8, 9, 64).astype(np.float32)
        y = np.zeros(64, np.float32)
        weights = torch.tensor([0.25, 0.75])
        pair = torch.tensor([int(np.float32(2.5).view(np.int32)), 4], dtype=torch.int32)
        two = int(np.float32(2.0).view(np.int32))
        library.run("language", [torch.from_numpy(x), torch.from_numpy(y), pair, weights, 5, two], 64, 32)
        assert np.array_equal(y, language_expected(x))
        for name, dtype, factor in (("scaled_float_3", torch.float32, 3), ("scaled_half_2", torch.float16, 2)):
            a, b = torch.arange(8, dtype=dtype), torch.zeros(8, dtype=dtype)
            library.run(name, [a, b], 8, 8)
            assert torch.equal(b, a * factor)


@pytest.mark.parametrize("prefix", ["#define FACTOR 2\n#define TYPE half\n", "#define FACTOR 5\n#define TYPE int\n"])
def test_variants_by_prefix(prefix: str) -> None:
    text = (
        "kernel void k(device TYPE* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n#if FACTOR > 4\n"
        "  y[i] = TYPE(i);\n#else\n  y[i] = TYPE(i * FACTOR);\n#endif\n}"
    )
    y = torch.zeros(8, dtype=torch.float16 if "half" in prefix else torch.int32)
    Library(prefix + HEADER + text).run("k", [y], 8, 8)
    assert y[3] == (6 if "half" in prefix else 3)


def test_positions() -> None:
    """Every built-in value, on a grid whose edge groups are smaller."""
    names = {
        "thread_position_in_grid": "uint3",
        "threadgroup_position_in_grid": "uint3",
        "thread_position_in_threadgroup": "ushort3",
        "thread_index_in_threadgroup": "uint",
        "thread_index_in_simdgroup": "uint",
        "simdgroup_index_in_threadgroup": "ushort",
        "threads_per_threadgroup": "uint3",
        "dispatch_threads_per_threadgroup": "uint3",
        "threads_per_grid": "uint3",
        "threadgroups_per_grid": "uint3",
        "threads_per_simdgroup": "uint",
        "simdgroups_per_threadgroup": "uint",
    }
    parameters = ", ".join(f"{t} v{k} [[{name}]]" for k, (name, t) in enumerate(names.items()))
    stores = "".join(
        f"o[{3 * k}] = v{k}{'.x' if '3' in t else ''}; "
        + (f"o[{3 * k + 1}] = v{k}.y; o[{3 * k + 2}] = v{k}.z; " if "3" in t else "")
        for k, t in enumerate(names.values())
    )
    width = 3 * len(names)
    text = (
        f"kernel void k(device uint* out [[buffer(0)]], {parameters}) {{ device uint* o = out + "
        f"(v0.x + 10 * (v0.y + 7 * v0.z)) * {width}; {stores} }}"
    )
    out = torch.zeros(3, 7, 10, len(names), 3, dtype=torch.int32)
    Library(HEADER + text).run("k", [out], (10, 7, 3), (4, 3, 2))
    grid, group = np.array([10, 7, 3]), np.array([4, 3, 2])
    for z, y, x in np.ndindex(3, 7, 10):
        at = np.array([x, y, z])
        size = np.minimum(group, grid - at // group * group)
        inside = at % group
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        threads = int(size.prod())
        want = [at, at // group, inside, [index, 0, 0], [index % 32, 0, 0], [index // 32, 0, 0], size, group, grid,
                -(-grid // group), [32, 0, 0], [-(-threads // 32), 0, 0]]  # fmt: skip
        assert out[z, y, x].tolist() == [list(map(int, w)) for w in want]


# ---- simdgroups ----

SIMD = [
    ("simd_sum(x)", "int", lambda x: np.full(32, x.sum(dtype=np.int32))),
    ("simd_sum(x)", "half", lambda x: np.full(32, sum(map(float, x)))),
    ("simd_max(x)", "float", lambda x: np.full(32, x.max())),
    ("simd_min(x)", "ushort", lambda x: np.full(32, x.min())),
    ("simd_product(x)", "uint", lambda x: np.full(32, np.multiply.reduce(x))),
    ("simd_and(x)", "uint", lambda x: np.full(32, np.bitwise_and.reduce(x))),
    ("simd_or(x)", "uint", lambda x: np.full(32, np.bitwise_or.reduce(x))),
    ("simd_xor(x)", "uint", lambda x: np.full(32, np.bitwise_xor.reduce(x))),
    ("simd_prefix_exclusive_sum(x)", "uint", lambda x: np.concatenate([[0], np.cumsum(x[:-1], dtype=np.uint32)])),
    ("simd_prefix_inclusive_sum(x)", "uint", lambda x: np.cumsum(x, dtype=np.uint32)),
    ("simd_shuffle(x, ushort((7 * lane + 3) & 31))", "float", lambda x: x[(7 * np.arange(32) + 3) % 32]),
    ("simd_shuffle_xor(x, 5)", "half", lambda x: x[np.arange(32) ^ 5]),
    ("simd_shuffle_down(x, 3)", "float", lambda x: np.concatenate([x[3:], x[-3:]])),
    ("simd_shuffle_up(x, 2)", "int", lambda x: np.concatenate([x[:2], x[:-2]])),
    ("simd_shuffle_rotate_down(x, 3)", "uint", lambda x: np.roll(x, -3)),
    ("simd_shuffle_and_fill_down(x, 9u, 2)", "uint", lambda x: np.concatenate([x[2:], [9, 9]])),
    ("simd_broadcast(x, 17)", "float", lambda x: np.full(32, x[17])),
    ("simd_broadcast_first(x)", "float", lambda x: np.full(32, x[0])),
    ("uint(ulong(simd_ballot(x > 5u)))", "uint", lambda x: np.full(32, sum(1 << i for i in range(32) if x[i] > 5))),
    ("simd_any(x == 77u)", "uint", lambda x: np.full(32, (x == 77).any())),
    ("simd_all(x < 4000000000u)", "uint", lambda x: np.full(32, (x < 4000000000).all())),
    ("simd_is_first()", "uint", lambda x: np.arange(32) == 0),
    ("simd_sum(half4(x)).z", "half", lambda x: np.full(32, sum(map(float, x)))),
    ("simd_shuffle_xor(uint2(x, lane), 1).y", "uint", lambda x: np.arange(32) ^ 1),
    ("quad_sum(x)", "uint", lambda x: np.repeat(x.reshape(8, 4).sum(1, dtype=np.uint32), 4)),
    ("quad_shuffle_xor(x, 1)", "uint", lambda x: x[np.arange(32) ^ 1]),
]


@pytest.mark.parametrize("order", [0, 1, 5, 99])
def test_simdgroup_functions(order: int) -> None:
    text = HEADER + "".join(
        f"kernel void f{k}(device const {t}* a [[buffer(0)]], device {t}* b [[buffer(1)]], "
        f"uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) "
        f"{{ {t} x = a[i]; b[i] = {e}; }}\n"
        for k, (e, t, _) in enumerate(SIMD)
    )
    library = Library(text)
    rng = np.random.default_rng(3)
    with emulator.configured(order=order):
        for k, (expression, name, expected) in enumerate(SIMD):
            x = rng.integers(0, 100, 64).astype(NUMPY[name])  # sums stay exact in every type
            got = np.zeros_like(x)
            library.run(f"f{k}", [tensor(x, name), tensor(got, name)], 64, 64)
            want = np.concatenate([expected(x[:32]), expected(x[32:])]).astype(x.dtype)
            assert np.array_equal(got, want), expression


def test_functions_of_a_partial_simdgroup() -> None:
    """In 40 threads the second simdgroup has 8 lanes."""
    text = """kernel void k(device uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  y[i] = simd_sum(i) + simd_max(1u);
}"""
    y = torch.zeros(40, dtype=torch.int32)
    Library(HEADER + text).run("k", [y], 40, 40)
    assert y.tolist() == [sum(range(32)) + 1] * 32 + [sum(range(32, 40)) + 1] * 8


# ---- matrices ----

MATRIX = """
template <typename T, typename A>
kernel void product(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device A* c [[buffer(2)]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup T tile[8 * 12];
  for (uint i = lane; i < 96; i += 32) tile[i] = a[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<T, 8, 8> x, y, z;
  simdgroup_load(x, tile + 2, 12);
  simdgroup_load(y, b, 16, ulong2(8, 1), true);
  simdgroup_matrix<A, 8, 8> sum = make_filled_simdgroup_matrix<A, 8, 8>(A(1.0f));
  simdgroup_multiply_accumulate(sum, x, y, sum);
  simdgroup_store(sum, c, 8);
  simdgroup_matrix<T, 8, 8> two(T(2.0f));
  simdgroup_matrix<A, 8, 8> zero = make_filled_simdgroup_matrix<A, 8, 8>(A(0.0f));
  simdgroup_multiply(z, x, two);
  simdgroup_multiply_accumulate(sum, z, y, zero);
  simdgroup_store(sum, c + 64, 8, ulong2(0, 0), true);
  simdgroup_store(x, (device T*)(c + 128), 8);
}
#define PRODUCT(T, A, name) \\
  template [[host_name(name)]] kernel void product<T, A>(device const T*, device const T*, device A*, uint);
PRODUCT(half, float, "half_float") PRODUCT(float, float, "float_float") PRODUCT(half, half, "half_half")
PRODUCT(bfloat, float, "bfloat_float")
"""


@pytest.mark.parametrize("check", [False, True])
def test_matrices(check: bool) -> None:
    """Loads with stride, origin and transpose, products with a wider sum, stores: exact, since numbers are small."""
    dtypes = {"half": torch.float16, "float": torch.float32, "bfloat": torch.bfloat16}
    rng = np.random.default_rng(2)
    with emulator.configured(check=check):
        library = Library(HEADER + MATRIX)
        for name in ("half_float", "float_float", "half_half", "bfloat_float"):
            element, sum_type = (dtypes[part] for part in name.split("_"))
            a, b = (torch.from_numpy(rng.integers(-3, 4, shape)).to(element) for shape in ((8, 12), (9, 16)))
            c = torch.zeros(192, dtype=sum_type)
            with emulator.configured(types=element == sum_type):  # the last store puts another type behind the sums
                library.run(name, [a, b, c], 32, 32)
            x, y = a.double()[:, 2:10], b.double()[1:9, 8:16].T
            assert torch.equal(c[:64].double().view(8, 8), x @ y + 1), name
            assert torch.equal(c[64:128].double().view(8, 8).T, 2 * x @ y), name


# ---- atomics ----

ATOMICS = """
kernel void k(device const int* x [[buffer(0)]], device int* tickets [[buffer(1)]], device atomic_int* a [[buffer(2)]],
    device atomic_uint* u [[buffer(3)]], device atomic_float* f [[buffer(4)]], uint i [[thread_position_in_grid]],
    uint in [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint local[2];
  if (in < 2) atomic_store_explicit(&local[in], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tickets[i] = atomic_fetch_add_explicit(&a[0], 1, memory_order_relaxed);
  atomic_fetch_max_explicit(&a[1], x[i], memory_order_relaxed);
  atomic_fetch_min_explicit(&a[2], x[i], memory_order_relaxed);
  atomic_fetch_sub_explicit(&a[3], x[i], memory_order_relaxed);
  atomic_fetch_or_explicit(&u[0], 1u << (i & 31), memory_order_relaxed);
  atomic_fetch_and_explicit(&u[1], ~(1u << (i & 15)), memory_order_relaxed);
  atomic_fetch_xor_explicit(&u[2], uint(i), memory_order_relaxed);
  atomic_fetch_add_explicit(&f[0], 0.5f, memory_order_relaxed);
  atomic_fetch_add_explicit(&local[in & 1], uint(in), memory_order_relaxed);
  int seen = atomic_load_explicit(&a[4], memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(&a[4], &seen, seen + 2, memory_order_relaxed, memory_order_relaxed)) {}
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (in != 0) return;
  uint odd = atomic_exchange_explicit(&local[1], 0u, memory_order_relaxed);
  atomic_fetch_add_explicit(&u[3], odd, memory_order_relaxed);
}
"""


@pytest.mark.parametrize("check", [False, True])
def test_atomics(check: bool) -> None:
    x = torch.from_numpy(np.random.default_rng(4).integers(-999, 999, 128).astype(np.int32))
    tickets, a = torch.zeros(128, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    u, f = torch.tensor([0, -1, 0, 0], dtype=torch.int32), torch.zeros(1)
    with emulator.configured(check=check):
        Library(HEADER + ATOMICS).run("k", [x, tickets, a, u, f], 128, 64)
    assert sorted(tickets.tolist()) == list(range(128))
    assert a.tolist() == [128, int(x.max()), int(x.min()), -int(x.sum()), 256]
    odd = sum(range(1, 64, 2))
    assert u.tolist() == [-1, -65536, int(np.bitwise_xor.reduce(np.arange(128))), 2 * odd]
    assert float(f) == 64


def test_ftz() -> None:
    """Subnormal float32 is kept, or flushed where a test wants to know whether it matters."""
    text = "kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]]) { y[0] = x[0] * 0.5f; }"
    library, x, y = Library(HEADER + text), torch.tensor([1.2e-38]), torch.zeros(1)
    library.run("k", [x, y], 1, 1)
    assert y[0] > 0
    with emulator.configured(ftz=True):
        library.run("k", [x, y], 1, 1)
    assert y[0] == 0
