"""`demo`: the bundled 2-bit mixture of experts, loaded through transformers, measured and writing.

Owns what the demo shows and in what order. Recorded figures come from the model folder's reference.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metal_marlin import _C
from metal_marlin._version import __version__
from metal_marlin.cli_run import load, resident_bytes, windows_of, write
from metal_marlin.mps import mps_problem
from metal_marlin.perplexity import perplexity
from metal_marlin.weights import Checkpoint

BUNDLED = Path("models") / "tiny-moe"
REFERENCE = "reference.json"
PROMPT = "/*\n * This function returns the number of"
NEW_TOKENS = 96
DECODE_TOKENS = 32
REPEATS, SECONDS = 9, 2.0
MB = 1e6


def bundled() -> Path:
    """The model folder of the repository around the caller or this package. FileNotFoundError: neither has one."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / BUNDLED / REFERENCE).is_file():
            return root / BUNDLED
    raise FileNotFoundError(
        f"there is no {BUNDLED / REFERENCE} here: run the demo in a clone of the repository, or name a folder"
    )


def describe(checkpoint: Checkpoint) -> str:
    """Rates and codebooks, the most common first: 2 bits a weight (mul1) in 312 matrices, 6 bits (mul1) in lm_head."""
    groups: dict[tuple[float, str], list[str]] = {}
    for prefix, group in checkpoint.groups.items():
        groups.setdefault((group.bits, group.codebook), []).append(prefix)
    parts: list[str] = []
    for (bits, codebook), prefixes in sorted(groups.items(), key=lambda item: -len(item[1])):
        where = f"{len(prefixes)} matrices" if len(prefixes) > 1 else prefixes[0]
        parts.append(f"{bits:g} bits{'' if parts else ' a weight'} ({codebook}) in {where}")
    return ", ".join(parts)


def speed(work: Callable[[], object], tokens: int) -> str:
    """Tokens per second of `work`: the median of 3 to REPEATS runs and their range, after one that does not count."""
    work()
    speeds: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(speeds) < 3 or (len(speeds) < REPEATS and time.perf_counter() < stop):
        began = time.perf_counter()
        work()
        speeds.append(tokens / (time.perf_counter() - began))
    return f"{statistics.median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f} in {len(speeds)} runs"


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> str:
    """The speed of reading ids, int64 [1, tokens], at once."""
    return speed(lambda: model(input_ids=ids, use_cache=True), ids.shape[1]) + f"; {ids.shape[1]} tokens at once)"


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor) -> str:
    """The speed of reading ids, int64 [1, tokens], one by one with a cache: a real text, so the routing is real too."""

    def work() -> None:
        cache = None
        for token in ids[0]:
            cache = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values

    return speed(work, ids.shape[1]) + f"; {ids.shape[1]} tokens, one by one)"


def show(name: str, value: str) -> None:
    print(f"{name:<12} {value}", flush=True)


def demo(arguments: argparse.Namespace) -> None:
    """`demo [DIR]`."""
    directory = Path(arguments.directory) if arguments.directory else bundled()
    file = directory / REFERENCE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the demo shows the figures recorded there; try generate or perplexity instead"
        )
    reference = json.loads(file.read_text(encoding="utf-8"))
    with Checkpoint(directory) as checkpoint:
        rates, file_bytes = describe(checkpoint), sum(path.stat().st_size for path in checkpoint.files)
        config = checkpoint.config

    show("metal_marlin", f"{__version__}, torch {torch.__version__}, {platform.system()} {platform.machine()}")
    shown = directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory
    experts, active = config.get("num_experts") or config.get("num_local_experts"), config.get("num_experts_per_tok")
    shape = f"{config.get('num_hidden_layers')} layers of {experts} experts, {active} of them for a token"
    show("model", f"{shown}: {config.get('model_type')}, {reference['weights'] / 1e6:.1f} M weights, {shape}")
    show("bits", rates)
    show(
        "device",
        f"cpu, {_C.cpu_level()} kernels, {torch.get_num_threads()} threads (Apple GPU: {mps_problem() or 'active'})",
    )

    model, tokenizer = load(directory, "auto")
    bf16 = reference["bf16"]
    sizes = (resident_bytes(model) / MB, file_bytes / MB, bf16["file_bytes"] / MB)
    show("bytes", "{:.1f} MB resident, {:.1f} MB file, {:.1f} MB as bf16".format(*sizes))

    text = reference["text"]
    excerpt = (directory / text["file"]).read_text(encoding="utf-8")
    windows = windows_of(excerpt, tokenizer, text["length"], text["windows"])
    result = perplexity(model, windows)
    what = f"{text['file']}, {result.targets:,} targets"
    show("perplexity", f"{result.perplexity:.2f}; the bf16 model has {bf16['perplexity']:.2f} ({what})")

    show("prefill", prefill(model, windows[:1]))
    show("decode", decode(model, windows[:1, :DECODE_TOKENS]))

    print("\nToo small to make sense, but trained on manual pages and kernel sources; it continues this comment:\n")
    torch.manual_seed(0)
    write(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.6, top_p=0.9, top_k=0)
