"""Safetensors headers: what is in a file, without reading its tensors.

Owns the checks that make a header trustworthy: its length, its JSON, known dtypes, byte ranges that cover the data
exactly once. Reading tensors is left to the safetensors library (weights.py). A file is a uint64, the length of the
header (little-endian), the header as JSON {name: {dtype, shape, data_offsets}}, and the data. Source:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
DTYPES_BY_BITS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
BITS = {dtype: bits for bits, dtypes in DTYPES_BY_BITS.items() for dtype in dtypes}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header says; `dtype` in safetensors' spelling, such as BF16; `begin`: its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int


def parse_json(file: Path, text: bytes) -> Any:
    """JSON that names no key twice. ValueError names the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: malformed JSON: {error}") from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """{tensor name: TensorInfo} of one file, in its order. ValueError names the file, the expectation and the value."""
    size = file.stat().st_size
    most = max(0, min(size - 8, MAX_HEADER_BYTES))
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > most:
            raise ValueError(
                f"{file}: the header's length is {length}; expected at most {most} in a file of {size} bytes: "
                "truncated, or no safetensors file"
            )
        header = parse_json(file, stream.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is a {type(header).__name__}; expected an object")
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        infos[name] = _entry(file, name, entry, 8 + length)
        ranges.append((infos[name].begin - 8 - length, infos[name].begin - 8 - length + infos[name].nbytes, name))
    _check_cover(file, sorted(ranges), size - 8 - length)
    return infos


def _entry(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header; `data` is where the file's data begins."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{file}: {name}: is {str(entry)[:80]} in the header; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{file}: {name}: dtype is {dtype!r}; expected one of {', '.join(BITS)}")
    if not sizes(shape):
        raise ValueError(f"{file}: {name}: shape is {shape!r}; expected a list of sizes")
    if not sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{file}: {name}: data_offsets is {offsets!r}; expected [begin, end]")
    nbytes = math.prod(shape) * BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{file}: {name}: data_offsets is {offsets}; expected {nbytes} bytes for {dtype} {shape}")
    return TensorInfo(file, dtype, tuple(shape), nbytes, data + offsets[0])


def _check_cover(file: Path, ranges: list[tuple[int, int, str]], available: int) -> None:
    """The tensors must lie back to back, without holes or overlaps, and end where the file ends."""
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise ValueError(f"{file}: {name}: data_offsets begin at {begin}, which {kind}; expected {position}")
        position = end
    if position != available:
        kind = "the file is truncated" if available < position else "bytes follow the last tensor"
        raise ValueError(f"{file}: has {available} bytes of data; its header describes {position}: {kind}")
