"""`python -m benchmarks cpu`: every case at every SIMD level next to dense PyTorch. Owns that report."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cases import KINDS, RATES, ROWS
from benchmarks.machine import COPY_BYTES, copy_speed, describe
from benchmarks.timing import Timing, measure
from metal_marlin import _C

DENSE = {torch.float32: "torch f32", torch.bfloat16: "torch bf16"}


def run(kinds: list[str], levels: list[str]) -> list[dict[str, Any]]:
    """One entry for each case; each is checked at each level before anything is timed."""
    plan = [(kind, codebook, bits, rows) for kind in kinds for codebook, bits in RATES for rows in ROWS]
    results = []
    for kind, codebook, bits, rows in tqdm(plan, unit="case", leave=False):
        case = KINDS[kind](rows, codebook, bits)
        timings: dict[str, Timing] = {}
        for level in levels:
            _C.set_cpu_level(level)
            case.check()
            timings[level] = measure(case.ours)
        for dtype, work in case.dense.items():
            timings[DENSE[dtype]] = measure(work)
        results.append({"name": case.name, "rows": rows, "packed_bytes": case.packed_bytes, "timings": timings})
    return results


def show(results: list[dict[str, Any]], copy_bytes_per_second: float) -> None:
    """The table. The bandwidth is the packed weights' bytes over the time, a lower bound of what was read."""
    name = ""
    for result in results:
        if result["name"] != name:
            name = result["name"]
            columns = f"{'median ms':>10} {'middle half':>17} {'GB/s':>7} {'of a copy':>9} {'speed':>9}"
            print(f"\n{name}\n{'rows':>5}  {'by':<10} {columns}")
        base = result["timings"][DENSE[torch.float32]].median
        for by, timing in result["timings"].items():
            spread = f"{timing.low * 1e3:.3f} - {timing.high * 1e3:.3f}"
            line = f"{result['rows']:>5}  {by:<10} {timing.median * 1e3:>10.3f} {spread:>17}"
            if by in DENSE.values():
                line += f" {'':>7} {'':>9}"
            else:
                rate = result["packed_bytes"] / timing.median
                line += f" {rate / 1e9:>7.2f} {rate / copy_bytes_per_second:>9.1%}"
            print(f"{line} {base / timing.median:>7.2f} x")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cpu`."""
    parser.add_argument("--only", choices=tuple(KINDS), help="one op instead of all")
    parser.add_argument("--level", choices=_C.cpu_levels(), help="one SIMD level instead of all")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def main(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts: dict[str, Any] = dict(describe())
    copied = 2 * COPY_BYTES / copy_speed().median
    facts["copy"] = f"{copied / 1e9:.1f} GB/s read and written"
    with torch.inference_mode():
        levels = [arguments.level] if arguments.level else list(_C.cpu_levels())
        results = run([arguments.only] if arguments.only else list(KINDS), levels)
    if arguments.json:
        for result in results:
            result["timings"] = {by: vars(timing) for by, timing in result["timings"].items()}
        print(json.dumps({**facts, "results": results}, indent=2))
        return 0
    for fact, value in facts.items():
        print(f"{fact:<13} {value}")
    show(results, copied)
    return 0
