"""What run.py runs: every kernel with the arguments and grids that csrc/mps/ gives it, and what the oracle says.

A case is one kernel file, one variant (its #define lines) and a function that launches it and yields comparisons.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference as ref

Checks = Iterator[tuple[str, np.ndarray, np.ndarray, Any]]  # what, got, want, bound
DTYPES = ("float32", "float16", "bfloat16")
METAL = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
RATES = [(rate2, name) for name in ref.CODEBOOKS for rate2 in ref.rates2(name)]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")  # as in shared/activation.h
KINDS = ("softmax_topk", "topk_softmax", "sigmoid_topk")  # as in shared/router.h
HEADER = (Path(__file__).resolve().parents[2] / "csrc/shared/kernels.h").read_text(encoding="ascii")
N = {name: int(number) for name, number in re.findall(r"#define (\w+) (\d+)\b", HEADER)}  # slots and sizes


UNROUNDED = "mul1, unrounded"


def codebook(name: str) -> np.ndarray:
    """The oracle's, and mul1 as the decode kernels hold it: without the format's rounding of each weight to half."""
    if name != UNROUNDED:
        return rounded_codebook(name)
    product = (np.arange(65536, dtype=np.uint64) * 0x83DCD12D) % 2**32
    total = sum((product >> shift) % 256 for shift in (0, 8, 16, 24))
    scale, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
    return (1024.0 + total.astype(np.float64)) * scale + offset


rounded_codebook, ref.codebook = ref.codebook, codebook


def as_decoded(packed: list[ref.Packed]) -> tuple[list[ref.Packed], float]:
    """What the decode kernels multiply by, and how much wider the oracle's bounds have to be. They sum x times mul1's
    byte sums, and x itself, to scale them in the end: 3.6 and 3.5 times the root mean square of mul1's weights, which
    the bounds count; with the weights' own share, 8."""
    found = [replace(p, codebook=UNROUNDED) if p.codebook == "mul1" else p for p in packed]
    return found, 8.0 if any(p.codebook == UNROUNDED for p in found) else 1.0


@dataclass(frozen=True)
class Case:
    name: str
    source: str  # metal/SOURCE.metal
    prefix: dict[str, str]
    run: Callable[[Any], Checks]
    quick: bool  # also under the sanitizer


def encode(a: np.ndarray, dtype: str) -> np.ndarray:
    """The array as the GPU holds it; bfloat16 as its bits."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(a, dtype)
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(a: np.ndarray, dtype: str) -> np.ndarray:
    """float64 of what `encode` made."""
    return ((a.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else a).astype(np.float64)


def raw(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def slots(prefix: str, **values: Any) -> dict[int, Any]:
    """{slot: value} for names of shared/kernels.h without their prefix."""
    return {N[f"{prefix}_{name.upper()}"]: value for name, value in values.items()}


def smallest_power(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def truth(value: Any) -> str:
    return "true" if value else "false"


def formats(rates: Any) -> str:
    pairs = sorted({(ref.CODEBOOKS.index(name), rate2) for rate2, name in rates})
    return "".join(f" X({codebook}, {rate2})" for codebook, rate2 in pairs)


# ---------------------------------------------------------------- trellis_linear


def linear(gpu: Any, rate: tuple[int, str], dtype: str, all_rows: tuple[int, ...], bias: bool) -> Checks:
    for rows, (k, n) in itertools.product(all_rows, ((200, 300), (1024, 128), (641, 1))):
        rng = np.random.default_rng([rows, k, rate[0]])
        p = ref.random_packed(rng, k, n, *rate, bias=bias, junk=True)
        x = encode(rng.normal(size=(rows, k)), dtype)
        y = gpu.empty((rows, n), raw(dtype))
        svh = gpu.put(p.svh)
        sizes, tensors = {"rows": rows, "in": k, "out": n}, {"x": x, "trellis": p.trellis, "suh": p.suh}
        arguments = slots("LINEAR", y=y, svh=svh, bias=gpu.put(p.bias) if bias else svh, **sizes)
        arguments |= slots("LINEAR", **{name: gpu.put(array) for name, array in tensors.items()})
        columns, strips = ref.pad128(n) // 128, -(-rows // N["MM_PREFILL_ROWS"])
        if rows <= N["MM_DECODE_ROWS"]:
            gpu.launch("linear_decode", arguments, (columns, 1), N["MM_DECODE_THREADS"])
        else:
            gpu.launch("linear_prefill", arguments, (columns, strips), N["MM_PREFILL_THREADS"])
        values = decode(x, dtype)
        (used,), wider = as_decoded([p]) if rows <= N["MM_DECODE_ROWS"] else ([p], 1.0)
        want = ref.linear(values, used, n)
        bound = ref.rounded(wider * ref.linear_bound(values, used, n), want, dtype)
        yield f"{rows} x {k} x {n}", decode(gpu.get(y), dtype), want, bound


def linear_cases() -> Iterator[Case]:
    for i, (rate, dtype) in enumerate(itertools.product(RATES, DTYPES)):
        most, bias = (1, 2, 4, 8)[i % 4], i % 5 < 2
        decode_rows = {1: (1,), 2: (2,), 4: (3, 4), 8: (5, 8)}[most]
        for kind, rows, variant in (("decode", decode_rows, most), ("prefill", (9, 70), 1)):
            prefix = {"MM_T": METAL[dtype], "MM_ROWS": str(variant), "MM_HAS_BIAS": truth(bias),
                      "MM_CASES(X)": formats([rate])}  # fmt: skip
            run = partial(linear, rate=rate, dtype=dtype, all_rows=rows, bias=bias)
            name = f"linear_{kind} {rate[1]} {rate[0] / 2:g} {dtype} rows<={max(rows)}"
            yield Case(name, "linear", prefix, run, i in (4, 38, 53, 75))


# ---------------------------------------------------------------- dequantize


def dequantize(gpu: Any, rate: tuple[int, str]) -> Checks:
    for rows, columns in ((200, 300), (256, 384), (1, 129)):
        p = ref.random_packed(np.random.default_rng(rows), rows, columns, *rate, junk=True)
        k, n = p.rotated.shape
        out, scratch, trellis = gpu.empty((rows, columns), "float32"), gpu.empty((k, n), "float32"), gpu.put(p.trellis)
        crop, size = slots("DEQUANTIZE", out=out, columns=columns, n=n, **{"in": rows}), N["MM_DEQUANTIZE_THREADS"]
        gpu.launch("dequantize_rotated", crop | slots("DEQUANTIZE", trellis=trellis), (n // 128, k // 16), size)
        yield f"rotated {rows} x {columns}", gpu.get(out), p.rotated[:rows, :columns], 0.0
        first = slots("DEQUANTIZE", trellis=trellis, svh=gpu.put(p.svh), scratch=scratch, n=n)
        gpu.launch("dequantize_columns", first, (n // 128, k // 16), size)
        out = gpu.empty((rows, columns), "float32")
        second = crop | slots("DEQUANTIZE", scratch=scratch, suh=gpu.put(p.suh), out=out)
        gpu.launch("dequantize_rows", second, (n // 16, k // 128), size)
        # 18 roundings (two rotations of 7 sums and a scaling, two scales), each of about the block's root mean square
        blocks = p.rotated.reshape(k // 128, 128, n // 128, 128)
        rms = np.sqrt((blocks**2).mean(axis=(1, 3), keepdims=True)).repeat(128, 1).repeat(128, 3).reshape(k, n)
        bound = 4 * 18 * ref.F32 * np.abs(p.suh.astype(np.float64))[:, None] * rms * np.abs(p.svh.astype(np.float64))
        yield f"{rows} x {columns}", gpu.get(out), p.dense[:rows, :columns], bound[:rows, :columns]


def dequantize_cases() -> Iterator[Case]:
    for i, rate in enumerate(RATES):
        prefix = {"MM_T": "float", "MM_CASES(X)": formats([rate])}
        name, run = f"dequantize {rate[1]} {rate[0] / 2:g}", partial(dequantize, rate=rate)
        yield Case(name, "dequantize", prefix, run, i == 17)


# ---------------------------------------------------------------- moe_trellis_swiglu


@dataclass(frozen=True)
class Moe:
    tokens: int
    top_k: int
    sizes: tuple[int, int]  # hidden, intermediate
    rates: tuple[tuple[int, str], ...]
    dtype: str
    weights_dtype: str
    wide: bool  # int64 ids
    bias: bool
    activation: str
    count: int = 5
    chunk: int = 1024  # tokens of a prefill chunk
    routing: str = "distinct"  # or "repeated": a token may choose an expert twice; "bad": two ids are out of range

    def prefix(self) -> dict[str, str]:
        rows = smallest_power(self.tokens) if self.tokens <= N["MM_DECODE_ROWS"] else 1
        biases = {f"MM_HAS_{name}_BIAS": truth(self.bias) for name in ("GATE", "UP", "DOWN")}
        return {"MM_T": METAL[self.dtype], "MM_W": METAL[self.weights_dtype], "MM_ID": "long" if self.wide else "int",
                "MM_ROWS": str(rows), "MM_ACTIVATION": str(ACTIVATIONS.index(self.activation)), **biases,
                "MM_CASES(X)": formats(self.rates)}  # fmt: skip


def stack(gpu: Any, name: str, experts: list[ref.Packed]) -> dict[int, Any]:
    starts = itertools.accumulate((p.trellis.size for p in experts[:-1]), initial=0)
    table = [(start, p.rate2, ref.CODEBOOKS.index(p.codebook)) for start, p in zip(starts, experts, strict=True)]
    svh = gpu.put(np.stack([p.svh for p in experts]))
    bias = svh if experts[0].bias is None else gpu.put(np.stack([p.bias for p in experts]))
    flat = gpu.put(np.concatenate([p.trellis.reshape(-1) for p in experts]))
    tensors = (flat, gpu.put(np.array(table, np.int64)), gpu.put(np.stack([p.suh for p in experts])), svh, bias)
    return {N[name] + i: tensor for i, tensor in enumerate(tensors)}


def moe(gpu: Any, t: Moe) -> Checks:
    rng = np.random.default_rng([t.tokens, t.top_k, *t.sizes])
    hidden, inner = t.sizes
    m = ref.random_experts(rng, t.count, hidden, inner, t.rates, t.bias, True, activation=t.activation)
    x, weights = encode(2 * rng.normal(size=(t.tokens, hidden)), t.dtype), rng.uniform(size=(t.tokens, t.top_k))
    weights = encode(weights, t.weights_dtype)
    ids = np.array([rng.permutation(t.count)[: t.top_k] for _ in range(t.tokens)])
    if t.routing == "repeated":
        ids = rng.integers(0, t.count, (t.tokens, t.top_k))
    given = ids.astype(np.int64 if t.wide else np.int32)
    if t.routing == "bad":
        given[0, 0], given[-1, -1] = -1, t.count
    y = gpu.empty((t.tokens, hidden), raw(t.dtype))
    second = stack(gpu, "DOWN_STACK", m.down)
    suh, sizes = second[N["DOWN_STACK"] + N["STACK_SUH"]], {"top_k": t.top_k, "hidden": hidden, "intermediate": inner}
    first = stack(gpu, "MOE_GATE", m.gate) | stack(gpu, "MOE_UP", m.up)
    first |= slots("MOE", x=gpu.put(x), down_suh=suh, alpha=m.alpha, limit=m.limit, **sizes)
    second |= slots("DOWN", weights=gpu.put(weights), y=y, **sizes)
    wider = 1.0
    if t.tokens <= N["MM_DECODE_ROWS"]:
        moe_decode(gpu, t, first, second, gpu.put(given))
        (gate, a), (up, b), (down, c) = (as_decoded(packed) for packed in (m.gate, m.up, m.down))
        m, wider = replace(m, gate=gate, up=up, down=down), max(a, b, c)
    else:
        moe_prefill(gpu, t, first, second, gpu.put(given))
    values, w = decode(x, t.dtype), decode(weights, t.weights_dtype)
    want = ref.moe(values, w, ids, m)
    bound = ref.rounded(wider * ref.moe_bound(values, w, ids, m), want, t.dtype)
    want[((given < 0) | (given >= t.count)).any(axis=1)] = np.nan
    yield f"{t.tokens} tokens, top {t.top_k}", decode(gpu.get(y), t.dtype), want, bound


def moe_decode(gpu: Any, t: Moe, first: dict[int, Any], second: dict[int, Any], ids: Any) -> None:
    pairs, (k, n), size = t.tokens * t.top_k, map(ref.pad128, t.sizes), N["MM_DECODE_THREADS"]
    act = gpu.empty((pairs, n), "float32")
    first |= slots("MOE", ids=ids, act=act, tokens=t.tokens, experts=t.count)
    second |= slots("DOWN", ids=ids, act=act, tokens=t.tokens, experts=t.count)
    gpu.launch("moe_gate_up_decode", first, (n // 128, pairs), size)
    gpu.launch("moe_down_decode", second, (k // 128, 1), size)


def moe_prefill(gpu: Any, t: Moe, first: dict[int, Any], second: dict[int, Any], ids: Any) -> None:
    (hidden, _), (k, n), size = t.sizes, map(ref.pad128, t.sizes), N["MM_PREFILL_THREADS"]
    pairs = min(t.chunk, t.tokens) * t.top_k
    order, y = gpu.empty((pairs,), "int32"), second[N["DOWN_Y"]]
    tiles = gpu.empty((pairs // N["MM_PREFILL_ROWS"] + t.count, N["MM_TILE_ENTRY"]), "int32")
    act, parts = gpu.empty((pairs, n), "float32"), gpu.empty((pairs, hidden), "float32")
    for start in range(0, t.tokens, t.chunk):
        tokens = min(t.chunk, t.tokens - start)
        most = tokens * t.top_k // N["MM_PREFILL_ROWS"] + t.count
        lists, common = {"order": order, "tiles": tiles}, {"ids": ids, "experts": t.count}
        sort = slots("SORT", pairs=tokens * t.top_k, most_tiles=most, first=start * t.top_k, **common, **lists)
        gpu.launch("moe_sort", sort, (1, 1), N["MM_SORT_THREADS"])
        gpu.launch("moe_gate_up_prefill", first | slots("MOE", act=act, first=start, **lists), (n // 128, most), size)
        down = second | slots("DOWN", act=act, y=parts, first=start, **lists)
        gpu.launch("moe_down_prefill", down, (k // 128, most), size)
        combine = slots("COMBINE", parts=parts, y=y, top_k=t.top_k, hidden=hidden, first=start, **common)
        gpu.launch("moe_combine", combine, (hidden, tokens), min(hidden, 256), threads=True)


def moe_cases() -> Iterator[Case]:
    sizes = ((200, 300), (640, 130), (1100, 257), (128, 128))
    for kind, all_tokens, spread in (("decode", (1, 3, 8, 2), 16), ("prefill", (70, 300, 9), 12)):
        for i in range(spread):
            t = Moe(
                tokens=all_tokens[i % len(all_tokens)],
                top_k=(3, 4, 1, 2)[i // 2 % 4],
                sizes=sizes[(i // 3 + i) % 4],
                rates=tuple(RATES[i % 9 :: 9]),
                dtype=DTYPES[i % 3],
                weights_dtype=DTYPES[i // 3 % 3],
                wide=i % 2 == 0,
                bias=i // 2 % 2 == 1,
                activation=ACTIVATIONS[(i // 4 + i) % 4],
                chunk=128 if i % 4 == 1 else 1024,
                routing=("distinct", "distinct", "repeated", "bad")[(i + i // 4) % 4],
            )
            what = f"{t.tokens} tokens top {t.top_k} {t.dtype} {t.weights_dtype} {t.activation} {t.routing}"
            yield Case(f"moe_{kind} {what} #{i}", f"moe_{kind}", t.prefix(), partial(moe, t=t), i in (1, 2, 3))
    wide = Moe(3, 8, (128, 128), ((4, "mul1"),), "float32", "float32", True, False, "silu", count=512)
    for t in (wide, Moe(**{**vars(wide), "tokens": 40})):
        kind = "decode" if t.tokens <= N["MM_DECODE_ROWS"] else "prefill"
        yield Case(f"moe_{kind} {t.tokens} tokens 512 experts", f"moe_{kind}", t.prefix(), partial(moe, t=t), False)


# ---------------------------------------------------------------- router


@dataclass(frozen=True)
class Router:
    kind: str
    count: int
    top_k: int
    groups: tuple[int, int]  # n_group, topk_group
    dtypes: tuple[str, str, str]  # x, gate, correction
    corrected: bool
    renormalize: bool
    ties: bool = False  # small integers: logits are exact and often equal

    def prefix(self) -> dict[str, str]:
        a, b, c = (METAL[dtype] for dtype in self.dtypes)
        return {"MM_T": a, "MM_G": b, "MM_C": c if self.corrected else b, "MM_HAS_CORRECTION": truth(self.corrected),
                "MM_ROUTER": str(KINDS.index(self.kind)), "MM_RENORMALIZE": truth(self.renormalize)}  # fmt: skip


def router(gpu: Any, t: Router) -> Checks:
    for tokens, hidden in ((5, 200), (1, 31), (33, 128)):
        rng = np.random.default_rng([tokens, t.count])
        x, gate = rng.normal(size=(tokens, hidden)), rng.normal(size=(t.count, hidden)) / np.sqrt(hidden)
        if t.ties:
            x, gate = np.sign(np.round(x)), np.sign(np.round(gate * np.sqrt(hidden) / 2))
        stored = [encode(a, d) for a, d in zip((x, gate, rng.uniform(0, 0.5, t.count)), t.dtypes, strict=True)]
        x, gate, correction = (decode(a, d) for a, d in zip(stored, t.dtypes, strict=True))
        buffers = [gpu.put(a) for a in stored]
        weights, logits = gpu.empty((tokens, t.top_k), "float32"), gpu.empty((tokens, t.count), "float32")
        ids, scale = gpu.empty((tokens, t.top_k), "int64"), 1.5
        arguments = slots("ROUTER", x=buffers[0], gate=buffers[1], correction=buffers[2 if t.corrected else 1])
        arguments |= slots("ROUTER", weights=weights, ids=ids, logits=logits, hidden=hidden, experts=t.count)
        arguments |= slots("ROUTER", top_k=t.top_k, scale=scale, n_group=t.groups[0], topk_group=t.groups[1])
        gpu.launch("route", arguments, (tokens, 1), N["MM_ROUTER_THREADS"])
        extra = correction if t.corrected else None
        want = ref.router(x, gate, extra, t.top_k, t.kind, t.renormalize, scale, *t.groups)
        bound = ref.logits_bound(x, gate)
        yield f"{tokens} x {hidden} logits", gpu.get(logits), want.logits, 0.0 if t.ties else bound
        # As tests/test_router.py: a logit's error moves a sigmoid by a quarter of it, a softmax by at most 2 p of it.
        largest = np.exp(want.logits - np.logaddexp.reduce(want.logits, axis=1, keepdims=True)).max(axis=1)
        slope = {"topk_softmax": np.ones(tokens), "sigmoid_topk": np.full(tokens, 0.25), "softmax_topk": 2 * largest}
        size = np.abs(want.logits).max(axis=1) if t.kind == "topk_softmax" else 4 * slope[t.kind]
        noise = slope[t.kind] * bound.max(axis=1) + 8 * ref.F32 * (size + (0.5 if t.corrected else 0))
        clear = want.margin > 2 * noise
        if t.ties:  # nothing is rounded before the choice
            clear[:] = True
        yield "share of clear tokens", np.array(clear.mean()), np.array(1.0), 0.75
        yield f"{tokens} x {hidden} ids", gpu.get(ids)[clear], want.ids[clear], 0.0
        relative = 4 * bound.max(axis=1, keepdims=True) + (32 + t.count) * ref.F32
        yield "weights", gpu.get(weights)[clear], want.weights[clear], (relative * np.abs(want.weights) + 1e-37)[clear]


def router_cases() -> Iterator[Case]:
    plain = [(count, top_k, (1, 1)) for count, top_k in ((8, 2), (37, 4), (128, 8), (512, 32), (1, 1))]
    shapes = [*plain[:3], (64, 6, (8, 3)), (256, 8, (8, 4)), *plain[3:]]
    for i, ((count, top_k, groups), kind) in enumerate(itertools.product(shapes, KINDS)):
        if groups != (1, 1) and kind == "topk_softmax":
            continue
        dtypes = (DTYPES[i % 3], DTYPES[i // 3 % 3], DTYPES[(i + 1) % 3])
        t = Router(kind, count, top_k, groups, dtypes, i % 2 == 0, i // 2 % 2 == 0)
        name = f"router {kind} {top_k} of {count} groups {groups[0]}/{groups[1]} {dtypes[0]} {dtypes[1]}"
        yield Case(name, "router", t.prefix(), partial(router, t=t), i in (1, 9, 12, 17))
    t = Router("topk_softmax", 300, 17, (1, 1), ("float32", "float16", "float32"), False, False, ties=True)
    yield Case("router ties", "router", t.prefix(), partial(router, t=t), True)


def all_cases() -> list[Case]:
    return [*linear_cases(), *dequantize_cases(), *moe_cases(), *router_cases()]
