"""The ops' bad inputs as one table: what is wrong, and what the message must say. Nothing crashes, leaks or returns
garbage.

Bad checkpoints and bad configurations are in test_weights.py and test_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import Backend, ops, same_bits

LINEAR = ref.random_packed(np.random.default_rng(1), 200, 300, 8, "mul1", bias=True)
EXPERTS = ref.random_experts(np.random.default_rng(2), 3, 200, 130, ((8, "mul1"), (12, "mcg")), bias=True)


def good(op: str, b: Backend) -> dict[str, Any]:
    """A call that works, by argument name."""
    rng = np.random.default_rng(3)
    trellis, suh, svh = b.packed(LINEAR)
    if op == "trellis_linear":
        x = b.put(rng.normal(size=(3, 200)), "float32")
        return {
            "x": x,
            "trellis": trellis,
            "suh": suh,
            "svh": svh,
            "bias": b.put(LINEAR.bias),
            "codebook": "mul1",
            "out_features": 300,
        }
    if op == "trellis_linear_backward":
        grad = b.put(rng.normal(size=(3, 300)), "float32")
        return {"grad": grad, "trellis": trellis, "suh": suh, "svh": svh, "codebook": "mul1", "in_features": 200}
    if op == "dequantize":
        return {"trellis": trellis, "suh": suh, "svh": svh, "codebook": "mul1", "in_features": 200, "out_features": 300}
    if op == "router":
        x, gate = b.put(rng.normal(size=(4, 200)), "float32"), b.put(rng.normal(size=(12, 200)), "float32")
        correction = b.put(rng.normal(size=12), "float32")
        options = {"top_k": 3, "kind": "sigmoid_topk", "renormalize": True, "scale": 1.0, "n_group": 4, "topk_group": 2}
        return dict(x=x, gate=gate, correction=correction, **options)
    x, weights = b.put(rng.normal(size=(4, 200)), "float32"), b.put(rng.uniform(size=(4, 2)), "float32")
    call = {"x": x, "weights": weights, "ids": b.put(np.array([[0, 1], [2, 0], [1, 2], [2, 1]]))}
    if op == "moe_trellis_swiglu_backward":
        call = dict(grad=b.put(rng.normal(size=(4, 200)), "float32"), **call)
    names = [
        f"{projection}_{part}"
        for projection in ("gate", "up", "down")
        for part in ("trellis", "table", "suh", "svh", "bias")
    ]
    names += ["intermediate", "activation", "alpha", "limit"]
    return {**call, **dict(zip(names, b.moe_args(EXPERTS), strict=True))}


@dataclass(frozen=True)
class Row:
    """In a good call of `op`, `argument` becomes `change` of its old value. Then the message must match every pattern
    of `says` and name the argument, or one of `names` where the fault is between two of them."""

    op: str
    argument: str
    change: Callable[[Any], Any]
    says: tuple[str, ...]
    names: str = ""
    raises: type[Exception] = RuntimeError

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{'-'.join(self.says)}"


def becomes(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.to(dtype)


def put_at(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[index] = value
        return t

    return change


def meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([t, t], dim=-1)[..., 0]


def rows_of_matrix(op: str) -> list[Row]:
    """What can be wrong with one packed matrix (256 x 384, 4 bits, mul1), in any op that takes one."""
    return [
        Row(op, "trellis", lambda t: t[0], ("2", "3|rank|dim")),
        Row(op, "trellis", cast(torch.int32), ("[Ii]nt32|[Ii]nt\\b", "int16")),
        Row(op, "trellis", cast(torch.float16), ("float16|[Hh]alf", "int16")),
        Row(op, "trellis", strided, ("contiguous",)),
        Row(op, "trellis", lambda t: t.transpose(0, 1), ("contiguous|24",)),
        Row(op, "trellis", meta, ("meta", "device|cpu")),
        Row(op, "trellis", lambda t: t[:, :, :60].contiguous(), ("60",)),
        Row(op, "trellis", lambda t: t[:, :, :0].contiguous(), ("\\b0\\b",)),
        Row(op, "trellis", lambda t: t[:, :, :8].contiguous(), ("\\b8\\b|0\\.5",)),
        Row(op, "trellis", lambda t: t.repeat(1, 1, 3)[:, :, :136].contiguous(), ("136|8\\.5",)),
        Row(op, "trellis", lambda t: t.repeat(1, 1, 3)[:, :, :144].contiguous(), ("144|9",)),
        Row(op, "trellis", lambda t: t.repeat(1, 1, 2)[:, :, :72].contiguous(), ("72|4\\.5",)),
        Row(op, "trellis", lambda t: t[:8].contiguous(), ("8|128", "16|200|256"), "trellis|suh"),
        Row(op, "trellis", lambda t: t[:15].contiguous(), ("15|240", "16|200|256|128")),
        Row(op, "trellis", lambda t: t[:, :16].contiguous(), ("16|256", "24|300|384"), "trellis|svh"),
        Row(op, "trellis", lambda t: t[:0].contiguous(), ("\\b0\\b", "16|200|256|128")),
        Row(op, "suh", strided, ("contiguous",)),
        Row(op, "svh", strided, ("contiguous",)),
        Row(op, "suh", lambda t: t[:255].clone(), ("255", "256")),
        Row(op, "suh", lambda t: t[None], ("2|1, 256", "1|rank|dim")),
        Row(op, "suh", cast(torch.float32), ("float32|[Ff]loat", "float16|[Hh]alf")),
        Row(op, "suh", cast(torch.bfloat16), ("bfloat16|BFloat16", "float16|[Hh]alf")),
        Row(op, "suh", meta, ("meta", "device|cpu")),
        Row(op, "suh", lambda t: t[:0], ("\\b0\\b", "256")),
        Row(op, "svh", lambda t: t[:300].clone(), ("300", "384")),
        Row(op, "svh", lambda t: t.reshape(3, 128), ("2|3, 128", "1|rank|dim")),
        Row(op, "svh", cast(torch.float32), ("float32|[Ff]loat", "float16|[Hh]alf")),
        Row(op, "svh", meta, ("meta", "device|cpu")),
        Row(op, "svh", lambda t: t[:0], ("\\b0\\b", "384")),
        Row(op, "codebook", becomes("mul2"), ("mul2", "mul1")),
        Row(op, "codebook", becomes(""), ("mul1",)),
        Row(op, "codebook", becomes("MUL1"), ("MUL1", "mul1")),
        Row(op, "codebook", becomes("mul1\0"), ("mul1",)),
    ]


def rows_of_tokens(op: str, name: str, width: int, wrong: int) -> list[Row]:
    """What can be wrong with the tensor that holds the tokens."""
    return [
        Row(op, name, lambda t: t[0, 0], ("\\b0\\b|scalar", "dim|rank|\\b1\\b")),
        Row(op, name, lambda t: t[:, :wrong].clone(), (str(wrong), f"{width}|{ref.pad128(width)}")),
        Row(op, name, lambda t: t[:, :0].clone(), ("\\b0\\b", f"{width}|empty")),
        Row(op, name, cast(torch.float64), ("float64|[Dd]ouble", "float32")),
        Row(op, name, cast(torch.int64), ("int64|[Ll]ong", "float32")),
        Row(op, name, cast(torch.bool), ("bool", "float32")),
        Row(op, name, cast(torch.complex64), ("float32",)),
        Row(op, name, meta, ("meta", "device|cpu")),
    ]


def half_rate(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, :40].contiguous()


TABLE = [
    *rows_of_tokens("trellis_linear", "x", 200, 120),
    *rows_of_matrix("trellis_linear"),
    Row("trellis_linear", "x", lambda t: t.repeat(1, 2)[:, :257].clone(), ("257", "256")),
    Row("trellis_linear", "bias", lambda t: t[:300].clone(), ("300", "384")),
    Row("trellis_linear", "bias", lambda t: t[None], ("2|1, 384", "1|rank|dim")),
    Row("trellis_linear", "bias", cast(torch.float32), ("float32|[Ff]loat", "float16|[Hh]alf")),
    Row("trellis_linear", "bias", strided, ("contiguous",)),
    Row("trellis_linear", "bias", meta, ("meta", "device|cpu")),
    Row("trellis_linear", "out_features", becomes(0), ("\\b0\\b",)),
    Row("trellis_linear", "out_features", becomes(-1), ("-1",)),
    Row("trellis_linear", "out_features", becomes(256), ("256", "384")),
    Row("trellis_linear", "out_features", becomes(385), ("385", "384")),
    Row("trellis_linear", "out_features", becomes(2**62), (str(2**62), "384")),
    Row("trellis_linear", "out_features", becomes(2**63 - 1), (str(2**63 - 1), "384")),
    *rows_of_tokens("trellis_linear_backward", "grad", 300, 250),
    *rows_of_matrix("trellis_linear_backward"),
    Row("trellis_linear_backward", "in_features", becomes(0), ("\\b0\\b",)),
    Row("trellis_linear_backward", "in_features", becomes(128), ("128", "256")),
    Row("trellis_linear_backward", "in_features", becomes(257), ("257", "256")),
    *rows_of_matrix("dequantize"),
    Row("dequantize", "in_features", becomes(0), ("\\b0\\b",)),
    Row("dequantize", "in_features", becomes(-5), ("-5",)),
    Row("dequantize", "in_features", becomes(128), ("128", "256")),
    Row("dequantize", "out_features", becomes(2**62), (str(2**62), "384")),
    Row("dequantize", "out_features", becomes(256), ("256", "384")),
]


def rows_of_foreign_ids(op: str) -> list[Row]:
    """ids that are neither an expert nor -1: 3 experts, int64 or int32."""
    return [
        Row(op, "ids", put_at((2, 1), 3), ("\\b3\\b", "2|5")),
        Row(op, "ids", put_at((0, 0), -2), ("-2", "0")),
        Row(op, "ids", put_at((3, 1), 2**62), (str(2**62), "3")),
        Row(op, "ids", put_at((3, 1), -(2**63)), (str(-(2**63)),)),
        Row(op, "ids", put_at((3, 1), 2**32), (str(2**32),)),  # is 0 when cut to 32 bits
        Row(op, "ids", lambda t: put_at((1, 1), -2)(t.int()), ("-2",)),
        Row(op, "ids", lambda t: put_at((1, 1), 2**31 - 1)(t.int()), (str(2**31 - 1),)),
    ]


def rows_of_moe(op: str) -> list[Row]:
    """What can be wrong with a mixture: 3 experts, 200 -> 130 -> 200, padded to 256 and 256."""
    rows = [
        *rows_of_tokens(op, "x", 200, 120),
        Row(op, "weights", lambda t: t[:3].clone(), ("3", "4")),
        Row(op, "weights", lambda t: t[:, :1].clone(), ("1", "2")),
        Row(op, "weights", lambda t: t[0].clone(), ("weights",)),
        Row(op, "weights", lambda t: t[None].clone(), ("weights",)),
        Row(op, "weights", cast(torch.float64), ("float64|[Dd]ouble", "float32")),
        Row(op, "weights", cast(torch.int32), ("int32|[Ii]nt", "float32")),
        Row(op, "weights", meta, ("meta", "device|cpu")),
        Row(op, "ids", lambda t: t[:3].clone(), ("3", "4")),
        Row(op, "ids", lambda t: t[0].clone(), ("ids",)),
        Row(op, "ids", lambda t: t[:, :0].clone(), ("\\b0\\b",)),
        Row(op, "ids", cast(torch.float32), ("float32|[Ff]loat", "int64")),
        Row(op, "ids", cast(torch.int16), ("int16|[Ss]hort", "int64")),
        Row(op, "ids", cast(torch.uint8), ("uint8|[Bb]yte", "int64")),
        Row(op, "ids", meta, ("meta", "device|cpu")),
        Row(op, "activation", becomes("relu"), ("relu", "silu")),
        Row(op, "activation", becomes(""), ("silu",)),
        Row(op, "intermediate", becomes(0), ("\\b0\\b",)),
        Row(op, "intermediate", becomes(-130), ("-130",)),
        Row(op, "intermediate", becomes(128), ("128", "256")),
        Row(op, "intermediate", becomes(257), ("257", "256")),
        Row(op, "intermediate", becomes(2**62), (str(2**62),)),
    ]
    for p in ("gate", "up", "down"):
        rows += [
            Row(op, f"{p}_trellis", lambda t: t.reshape(2, -1), ("2", "1|rank|dim|flat")),
            Row(op, f"{p}_trellis", cast(torch.int32), ("[Ii]nt32|[Ii]nt\\b", "int16")),
            Row(op, f"{p}_trellis", strided, ("contiguous",)),
            Row(op, f"{p}_trellis", meta, ("meta", "device|cpu")),
            Row(op, f"{p}_trellis", lambda t: t[:-1].clone(), ("table|trellis",)),
            Row(op, f"{p}_trellis", lambda t: t[:0].clone(), ("\\b0\\b",)),
            Row(op, f"{p}_table", lambda t: t[:, :2].clone(), ("2", "3")),
            Row(op, f"{p}_table", lambda t: t.reshape(-1), ("1|9", "3|rank|dim")),
            Row(op, f"{p}_table", lambda t: t[:2].clone(), ("2", "3"), f"{p}_(table|suh)"),
            Row(op, f"{p}_table", lambda t: t[:0].clone(), ("\\b0\\b",)),
            Row(op, f"{p}_table", cast(torch.int32), ("int32|[Ii]nt", "int64")),
            Row(op, f"{p}_table", meta, ("meta", "device|cpu")),
            Row(op, f"{p}_table", put_at((1, 0), -16), ("-16",)),
            Row(op, f"{p}_table", put_at((2, 0), 10**9), (str(10**9),)),
            Row(op, f"{p}_table", put_at((2, 0), 2**63 - 8), (str(2**63 - 8),)),
            Row(op, f"{p}_table", put_at((1, 0), -1), ("-1",)),
            Row(op, f"{p}_table", put_at((2, 1), 0), ("\\b0\\b",)),
            Row(op, f"{p}_table", put_at((2, 1), -4), ("-4",)),
            Row(op, f"{p}_table", put_at((2, 1), 17), ("17|8\\.5",)),
            Row(op, f"{p}_table", put_at((2, 1), 9), ("9|4\\.5",)),
            Row(op, f"{p}_table", put_at((2, 1), 2**40 + 4), (str(2**40 + 4),)),
            Row(op, f"{p}_table", put_at((2, 1), 16), ("16|8",)),  # the last tiles would end behind the buffer
            Row(op, f"{p}_table", put_at((1, 2), 3), ("\\b3\\b",)),
            Row(op, f"{p}_table", put_at((1, 2), -1), ("-1",)),
            Row(op, f"{p}_table", lambda t: put_at((1, 1), 5)(put_at((1, 2), 0)(t)), ("2\\.5|\\b5\\b", "mul1|3inst")),
            Row(op, f"{p}_table", lambda t: put_at((1, 1), 5)(put_at((1, 2), 1)(t)), ("2\\.5|\\b5\\b", "mul1|mcg")),
            Row(op, f"{p}_suh", lambda t: t[:, :128].clone(), ("128", "256")),
            Row(op, f"{p}_suh", lambda t: t[:2].clone(), ("2", "3")),
            Row(op, f"{p}_suh", lambda t: t[0].clone(), ("1|256", "2|rank|dim")),
            Row(op, f"{p}_suh", cast(torch.float32), ("float32|[Ff]loat", "float16|[Hh]alf")),
            Row(op, f"{p}_suh", meta, ("meta", "device|cpu")),
            Row(op, f"{p}_svh", lambda t: t[:, :200].clone(), ("200", "256")),
            Row(op, f"{p}_svh", lambda t: t[:1].clone(), ("1", "3")),
            Row(op, f"{p}_svh", cast(torch.bfloat16), ("bfloat16|BFloat16", "float16|[Hh]alf")),
            Row(op, f"{p}_svh", meta, ("meta", "device|cpu")),
            Row(op, f"{p}_bias", lambda t: t[:, :130].clone(), ("130", "256")),
            Row(op, f"{p}_bias", lambda t: t[:2].clone(), ("2", "3")),
            Row(op, f"{p}_bias", lambda t: t[0].clone(), ("1|256", "2|rank|dim")),
            Row(op, f"{p}_bias", cast(torch.float32), ("float32|[Ff]loat", "float16|[Hh]alf")),
        ]
    return rows


TABLE += [
    *rows_of_moe("moe_trellis_swiglu"),
    *rows_of_moe("moe_trellis_swiglu_backward"),
    *rows_of_foreign_ids("moe_trellis_swiglu_backward"),
    Row("moe_trellis_swiglu_backward", "grad", lambda t: t[:3].clone(), ("3", "4")),
    Row("moe_trellis_swiglu_backward", "grad", lambda t: t[:, :100].clone(), ("100", "200")),
    Row("moe_trellis_swiglu_backward", "grad", lambda t: t[None].clone(), ("grad",)),
    Row("moe_trellis_swiglu_backward", "grad", cast(torch.float64), ("float64|[Dd]ouble", "float32")),
    *rows_of_tokens("router", "x", 200, 120),
    Row("router", "gate", lambda t: t[0].clone(), ("1|200", "2|rank|dim")),
    Row("router", "gate", lambda t: t[:, :100].clone(), ("100", "200")),
    Row("router", "gate", lambda t: t[:0].clone(), ("\\b0\\b",)),
    Row("router", "gate", lambda t: t.repeat(43, 1)[:513], ("513", "512")),
    Row("router", "gate", cast(torch.float64), ("float64|[Dd]ouble", "float32")),
    Row("router", "gate", cast(torch.int8), ("int8|[Cc]har", "float32")),
    Row("router", "gate", meta, ("meta", "device|cpu")),
    Row("router", "correction", lambda t: t[:11].clone(), ("11", "12")),
    Row("router", "correction", lambda t: t[None].clone(), ("2|1, 12", "1|rank|dim")),
    Row("router", "correction", cast(torch.int32), ("int32|[Ii]nt", "float32")),
    Row("router", "correction", meta, ("meta", "device|cpu")),
    Row("router", "top_k", becomes(0), ("\\b0\\b",)),
    Row("router", "top_k", becomes(-1), ("-1",)),
    Row("router", "top_k", becomes(13), ("13", "12")),
    Row("router", "top_k", becomes(2**40), (str(2**40),)),
    Row("router", "kind", becomes("softmax"), ("softmax", "softmax_topk")),
    Row("router", "kind", becomes(""), ("softmax_topk",)),
    Row("router", "n_group", becomes(5), ("\\b5\\b", "12")),
    Row("router", "n_group", becomes(0), ("\\b0\\b",)),
    Row("router", "n_group", becomes(-4), ("-4",)),
    Row("router", "n_group", becomes(24), ("24", "12")),
    Row("router", "topk_group", becomes(0), ("\\b0\\b",)),
    Row("router", "topk_group", becomes(5), ("\\b5\\b", "4")),
    Row("router", "topk_group", becomes(-1), ("-1",)),
]


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(ops, op)(**arguments)


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(row: Row, arguments: dict[str, Any]) -> None:
    """The call fails, and the message names the argument and says the rest."""
    with pytest.raises(row.raises) as caught:
        call(row.op, arguments)
    message = str(caught.value)
    for pattern in (rf"\b({row.names or row.argument})\b", *row.says):
        assert re.search(pattern, message), f"the message does not say {pattern!r}: {message}"


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_table(either: Backend, row: Row) -> None:
    arguments = good(row.op, either)
    before = outputs(call(row.op, arguments))
    check(row, {**arguments, row.argument: row.change(arguments[row.argument])})
    after = outputs(call(row.op, arguments))
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True)), "a good call after the bad one"


@pytest.mark.parametrize("row", rows_of_foreign_ids("moe_trellis_swiglu"), ids=str)
def test_foreign_ids(either: Backend, row: Row) -> None:
    """The CPU refuses them. A GPU's caller could only be told by waiting for it: there the token becomes NaN, and no
    other changes."""
    arguments = good(row.op, either)
    foreign = {**arguments, "ids": row.change(arguments["ids"])}
    if not either.emulated:
        check(row, foreign)
        return
    y, clean = call(row.op, foreign), call(row.op, arguments)
    spoiled = (foreign["ids"] != arguments["ids"]).any(dim=1)
    assert spoiled.sum() == 1
    assert y[spoiled].isnan().all()
    assert same_bits(y[~spoiled], clean[~spoiled])


# two arguments at once
PAIRS = [
    ("trellis_linear", {"trellis": half_rate, "codebook": becomes("mcg")}, ("mcg", "2\\.5|40|half")),
    ("trellis_linear", {"trellis": half_rate, "codebook": becomes("3inst")}, ("3inst", "2\\.5|40|half")),
    ("dequantize", {"trellis": half_rate, "codebook": becomes("mcg")}, ("mcg", "2\\.5|40|half")),
    ("dequantize", {"suh": lambda t: t[:0], "svh": lambda t: t[:128].clone()}, ("suh|svh",)),
    (
        "router",
        {"top_k": becomes(33), "gate": lambda t: t.repeat(4, 1), "correction": lambda t: t.repeat(4)},
        ("top_k", "33", "32"),
    ),
    ("router", {"kind": becomes("softmax_topk"), "n_group": becomes(7)}, ("n_group", "7", "12")),
    (
        "moe_trellis_swiglu",
        {"weights": lambda t: t.repeat(1, 17)[:, :33], "ids": lambda t: t.repeat(1, 17)[:, :33]},
        ("33", "32"),
    ),
    ("router", {"n_group": becomes(12), "topk_group": becomes(2)}, ("top_k", "3", "2")),
    (
        "moe_trellis_swiglu",
        {"weights": lambda t: t[:, :0], "ids": lambda t: t[:, :0]},
        ("ids|weights|top_k", "\\b0\\b"),
    ),
]


@pytest.mark.parametrize(("op", "changes", "says"), PAIRS)
def test_pairs(either: Backend, op: str, changes: dict[str, Callable[[Any], Any]], says: tuple[str, ...]) -> None:
    arguments = good(op, either)
    with pytest.raises(RuntimeError) as caught:
        call(op, {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}})
    assert all(re.search(pattern, str(caught.value)) for pattern in says), str(caught.value)


def test_too_many_experts(either: Backend) -> None:
    arguments = good("moe_trellis_swiglu", either)
    for p in ("gate", "up", "down"):
        for part in ("table", "suh", "svh", "bias"):
            old = arguments[f"{p}_{part}"]
            arguments[f"{p}_{part}"] = old.repeat(171, 1)
    assert len(arguments["gate_table"]) == 513
    with pytest.raises(RuntimeError, match=r"gate_table.*513.*512|512.*gate_table.*513"):
        call("moe_trellis_swiglu", arguments)
    arguments = {name: a[:512] if re.search("table|suh|svh|bias", name) else a for name, a in arguments.items()}
    call("moe_trellis_swiglu", arguments)


def test_wrong_python_types(either: Backend) -> None:
    """PyTorch's own check of the schema answers."""
    for op, argument, value in (
        ("trellis_linear", "x", [1.0, 2.0]),
        ("trellis_linear", "bias", None),
        ("trellis_linear", "codebook", 2),
        ("trellis_linear", "out_features", 300.5),
        ("router", "top_k", "3"),
        ("moe_trellis_swiglu", "alpha", "1.7"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=argument):
            call(op, {**good(op, either), argument: value})
