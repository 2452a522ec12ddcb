"""`inspect`: what an EXL3 folder holds, read from the headers alone, and which of our ops would run each part.

Owns how tensors are grouped for reading: names that differ in numbers only share a row, as long as shape, rate and
codebook agree. Opening and checking the folder is left to weights.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from metal_marlin import _C
from metal_marlin.safetensors_header import parse_json
from metal_marlin.weights import REPORT_FILE, Checkpoint

MB = 1e6


@dataclass(frozen=True)
class Tensor:
    """One quantized matrix with everything that belongs to it, or one plain tensor (bits None: stored as `stored`)."""

    name: str
    kind: str
    shape: tuple[int, ...]  # a matrix: inputs, outputs
    bits: float | None
    stored: str  # codebook, or the dtype of a plain tensor
    nbytes: int
    runs: str

    @property
    def weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Row:
    """Tensors whose names differ in numbers only."""

    name: str
    kind: str
    count: int
    shape: tuple[int, ...]
    bits: float | None
    stored: str
    nbytes: int
    runs: str


def kind_of(name: str, quantized: bool) -> str:
    """The part of the model that a tensor belongs to, judged by its name."""
    if re.search(r"(^|\.)experts\.(\d+\.|gate_up_proj|down_proj)", name) and "correction_bias" not in name:
        return "experts"
    if "lm_head" in name:
        return "head"
    if "norm" in name.rsplit(".", 2)[-2:][0] or "norm" in name.rsplit(".", 1)[-1]:
        return "norms"
    if re.search(r"(\.|_)(router|gate)(\.|$)|shared_expert_gate|correction_bias|expert_bias", name):
        return "routers"
    if "shared_expert" in name:
        return "shared experts"
    if "attn" in name or "attention" in name:
        return "attention"
    if "embed" in name:
        return "embeddings"
    return "dense layers" if quantized else "other"


def tensors(checkpoint: Checkpoint) -> list[Tensor]:
    """Everything in the folder, in the order of its files."""
    owner = {name: group for group in checkpoint.groups.values() for name in group.names.values()}
    seen: set[str] = set()
    found = []
    for name, stored in checkpoint.tensors.items():
        group = owner.get(name)
        if group is None:
            kind = kind_of(name, False)
            runs = (
                "router, or torch" if kind == "routers" else "torch"
            )  # hf_routers.py has the classes that the op knows
            found.append(Tensor(name, kind, stored.shape, None, stored.dtype, stored.nbytes, runs))
        elif group.prefix not in seen:
            seen.add(group.prefix)
            kind = kind_of(group.prefix, True)
            op = "moe_trellis_swiglu" if kind == "experts" else "trellis_linear"
            found.append(Tensor(group.prefix, kind, (group.k, group.n), group.bits, group.codebook, group.nbytes, op))
    return found


def rows(found: Iterable[Tensor]) -> list[Row]:
    """The table: sorted by kind (largest first) and name."""
    grouped: dict[tuple[Any, ...], list[Tensor]] = {}
    kinds: dict[str, int] = {}
    for tensor in found:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tensor.name)
        grouped.setdefault((tensor.kind, pattern, tensor.bits, tensor.stored, tensor.shape, tensor.runs), []).append(
            tensor
        )
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + tensor.nbytes
    table = [
        Row(pattern, kind, len(members), shape, bits, stored, sum(m.nbytes for m in members), runs)
        for (kind, pattern, bits, stored, shape, runs), members in grouped.items()
    ]
    return sorted(table, key=lambda row: (-kinds[row.kind], row.kind, row.name, row.bits or 0))


def totals(found: Iterable[Tensor]) -> dict[str, dict[str, Any]]:
    """Per kind and for `all`: tensors, weights, bytes and bytes * 8 / weights (scales and markers included)."""
    sums: dict[str, list[int]] = {}
    for tensor in found:
        for kind in (tensor.kind, "all"):
            total = sums.setdefault(kind, [0, 0, 0])
            for i, value in enumerate((1, tensor.weights, tensor.nbytes)):
                total[i] += value
    order = sorted(sums, key=lambda kind: (kind == "all", -sums[kind][2]))
    return {
        kind: {
            "tensors": n,
            "weights": weights,
            "bytes": nbytes,
            "bits_per_weight": round(8 * nbytes / max(weights, 1), 4),
        }
        for kind in order
        for n, weights, nbytes in [sums[kind]]
    }


def report(checkpoint: Checkpoint, every: bool) -> dict[str, Any]:
    """What `inspect --json` prints. ValueError if the folder holds nothing quantized."""
    if not checkpoint.groups:
        raise ValueError(
            f"{checkpoint.directory} is not an EXL3 model: none of its {len(checkpoint.tensors)} tensors is a .trellis"
        )
    found = tensors(checkpoint)
    text = checkpoint.config.get("text_config")
    quantization = checkpoint.config.get("quantization_config") or (text or {}).get("quantization_config")
    result: dict[str, Any] = {
        "directory": str(checkpoint.directory),
        "model_type": checkpoint.config.get("model_type"),
        "architectures": checkpoint.config.get("architectures"),
        "quantization_config": quantization,
        "written_by": _written_by(checkpoint, quantization or {}),
        "files": [file.name for file in checkpoint.files],
        "bytes": checkpoint.nbytes,
        "runs": {"device": "cpu", "level": _C.cpu_level()},
        "totals": totals(found),
        "groups": [asdict(row) for row in rows(found)],
    }
    if every:
        result["tensors"] = [asdict(tensor) for tensor in found]
    return result


def _written_by(checkpoint: Checkpoint, quantization: dict[str, Any]) -> str | None:
    """Who made the folder; config.json names the version of exllamav3 whose format it has."""
    file = checkpoint.directory / REPORT_FILE
    if file.is_file():
        return str(parse_json(file, file.read_bytes()).get("quantizer"))
    return f"exllamav3 {quantization['version']}" if "version" in quantization else None


def line(
    name: str, count: int, shape: tuple[int, ...], bits: float | None, stored: str, nbytes: int, runs: str, width: int
) -> str:
    size = " x ".join(map(str, shape)) or "scalar"
    rate = "" if bits is None else f"{bits:g}"
    return f"  {name:<{width}} {count:>6} {size:>14} {rate:>5} {stored:<6} {nbytes / MB:>10,.3f}  {runs}"


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the table and its totals, or JSON."""
    with Checkpoint(arguments.directory) as checkpoint:
        found = report(checkpoint, arguments.all)
        if arguments.json:
            print(json.dumps(found, indent=2))
            return
        table = rows(tensors(checkpoint)) if not arguments.all else [
            Row(t.name, t.kind, 1, t.shape, t.bits, t.stored, t.nbytes, t.runs) for t in tensors(checkpoint)
        ]  # fmt: skip
    quantization = found["quantization_config"] or {}
    maker = f", written by {found['written_by']}" if found["written_by"] else ""
    average = f" at {quantization['bits']:g} bits" if isinstance(quantization.get("bits"), (int, float)) else ""
    files = f"{len(found['files'])} file{'s' if len(found['files']) > 1 else ''}"
    print(f"{found['directory']}: {found['model_type'] or 'no config.json'}, EXL3{average}{maker}")
    where = f"would run on {found['runs']['device']} with {found['runs']['level']} kernels"
    print(f"{found['bytes'] / MB:,.3f} MB of tensors in {files}; {where}\n")
    width = max(len(row.name) for row in table)
    print(f"  {'':<{width}} {'count':>6} {'in x out':>14} {'bits':>5} {'stored':<6} {'MB':>10}  runs as")
    kind = ""
    for row in table:
        if row.kind != kind and not arguments.all:
            kind = row.kind
            print(kind)
        print(line(row.name, row.count, row.shape, row.bits, row.stored, row.nbytes, row.runs, width))
    print(f"\n{'total':<16} {'tensors':>8} {'weights':>16} {'MB':>12} {'bits each':>10}")
    for name, total in found["totals"].items():
        count, weights, nbytes, bits = total.values()
        print(f"{name:<16} {count:>8,} {weights:>16,} {nbytes / MB:>12,.3f} {bits:>10.3f}")
