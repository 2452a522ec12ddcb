"""`python -m benchmarks memory`: loading, resident bytes, hit rates, and speed with half of the experts in memory."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.memory import checkpoint, policies

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "tiny-moe"
PARTS = (0.25, 0.5, 0.75)
HALF_LIFE = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `memory`."""
    parser.add_argument("--only", nargs="+", choices=("load", "policies", "speed"), help="(default: all)")
    parser.add_argument("--gigabytes", type=float, default=1.0, metavar="GB", help="of the checkpoint (default: 1)")
    parser.add_argument(
        "--directory", metavar="DIR", help="make the checkpoint here and keep it, or use it if it is there"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each measurement (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of text (default: %(default)s)")
    parser.add_argument(
        "--part", type=float, default=0.5, metavar="P", help="of the experts in memory (default: %(default)s)"
    )
    parser.add_argument(
        "--disk", type=float, default=3.0, metavar="GB/S", help="simulated, for speed (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the ops, for speed (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write the figures too")


def drop(directory: Path) -> bool:
    """Asks the kernel to forget the files' pages; whether that can be asked here."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def load(directory: Path, rounds: int) -> dict[str, Any]:
    """Each way of loading, cold and warm, in turn; each in a process of its own."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for way in ("read", "ours", "copy"):
            for state in ("cold", "warm"):
                if state == "cold" and not drop(directory):
                    continue
                command = [sys.executable, "-m", "benchmarks.memory.worker", way, str(directory)]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
                runs.setdefault(f"{way} {state}", []).append(json.loads(done.stdout.splitlines()[-1]))
    print(f"load of {size / 1e9:.3f} GB, {rounds} rounds: median (least to most)")
    print(f"  {'':<12} {'seconds':>22} {'of reading once':>16} {'CPU s':>7} {'resident / file':>16} {'own / file':>11}")
    report: dict[str, Any] = {"file_bytes": size, "runs": runs, "medians": {}}
    for name, each in runs.items():
        seconds = sorted(run["seconds"] for run in each)
        median = statistics.median(seconds)
        base = statistics.median(run["seconds"] for run in runs[f"read {name.split()[1]}"])
        cpu = statistics.median(run["cpu"] for run in each)
        rss, own = (statistics.median(run[key] for run in each) / size for key in ("rss", "anonymous"))
        report["medians"][name] = {"seconds": median, "ratio": median / base, "cpu": cpu, "rss": rss, "anonymous": own}
        spread = f"{median:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        print(f"  {name:<12} {spread:>22} {median / base:>16.2f} {cpu:>7.2f} {rss:>16.3f} {own:>11.3f}")
    return report


def record(model: Any, ids: torch.Tensor) -> tuple[policies.Trace, policies.Trace]:
    """The routing of a text, int64 [tokens, layers, top_k], and routers' guesses from the layer before (-1: none)."""
    from metal_marlin.hf_memory import router_of

    paths = [path for path, module in model.named_modules() if type(module).__name__ == "TrellisExperts"]
    seen: list[dict[str, torch.Tensor]] = [{} for _ in paths]

    def keep(i: int) -> Any:
        return lambda module, arguments: seen[i].update(x=arguments[0], ids=arguments[1])

    hooks = [model.get_submodule(path).register_forward_pre_hook(keep(i)) for i, path in enumerate(paths)]
    with torch.inference_mode():
        model(ids)
        trace = torch.stack([one["ids"] for one in seen], dim=1).numpy()
        guess = np.full_like(trace, -1)
        for i in range(1, len(paths)):
            router = router_of(model, paths[i])
            assert router is not None
            guess[:, i] = router(seen[i - 1]["x"]).numpy()
    for hook in hooks:
        hook.remove()
    return trace, guess


def bundled(**loading: Any) -> Any:
    """The bundled model, in float32."""
    import transformers

    import metal_marlin.hf

    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with metal_marlin.hf.loading(**loading):
            return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def text_ids(tokens: int) -> torch.Tensor:
    """Held-out text, int64 [1, tokens]."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")[: 40 * tokens].replace("\0", "\n")
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    return ids


def rates(tokens: int) -> dict[str, Any]:
    """Hit rates on the bundled model's routing of text, and on made-up routing of a larger model."""
    model = bundled()
    trace, guess = record(model, text_ids(tokens))
    experts = model.config.num_experts
    previous = policies.previous_token(trace)
    guess[:, 0] = previous[:, 0]  # no layer comes before the first
    report: dict[str, Any] = {}
    large = policies.random_trace(max(16, tokens // 4), 24, 64, 8)
    sets = {
        f"tiny-moe on text, {trace.shape[0]} tokens, {trace.shape[1]} x {experts} experts, {trace.shape[2]} a token":
            (trace, experts, {"previous token": previous, "router": guess}),
        f"made up, {large.shape[0]} tokens, 24 x 64 experts, 8 a token":
            (large, 64, {"previous token": policies.previous_token(large)}),
    }  # fmt: skip
    for name, (routed, count, guesses) in sets.items():
        told = ", ".join(f"{way} {policies.accuracy(ahead, routed):.3f}" for way, ahead in guesses.items())
        print(f"\nhit rate (experts read for each use); {name}\n  guessed right: {told}")
        rows = {part: policies.table(routed, count, part, HALF_LIFE, guesses) for part in PARTS}
        print(f"  {'in memory':<26}" + "".join(f"{part:>18.0%}" for part in PARTS))
        for policy in rows[PARTS[0]]:
            cells = [f"{rows[part][policy].hits:.3f} ({rows[part][policy].reads:.3f})" for part in PARTS]
            print(f"  {policy:<26}" + "".join(f"{cell:>18}" for cell in cells))
        report[name] = {str(part): {k: [v.hits, v.reads] for k, v in row.items()} for part, row in rows.items()}
    return report


def decode(model: Any, ids: torch.Tensor) -> float:
    """Tokens/s of reading a text one token at a time, after an eighth of it at once."""
    import transformers

    prompt = max(1, ids.shape[1] // 8)
    with torch.inference_mode():
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        started = time.perf_counter()
        for i in range(prompt, ids.shape[1]):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    return (ids.shape[1] - prompt) / (time.perf_counter() - started)


def speed(tokens: int, part: float, disk: float, rounds: int) -> dict[str, Any]:
    """Decoding with a part of the experts in memory against all of them, in turn."""
    ids = text_ids(tokens)
    resident = bundled()
    experts = [module for module in resident.modules() if type(module).__name__ == "TrellisExperts"]
    each = sum(stack.shapes[0][0] * stack.shapes[0][1] * stack.shapes[0][2] * 2 for stack in
               (experts[0].gate_proj, experts[0].up_proj, experts[0].down_proj))  # fmt: skip
    budget = int(part * len(experts) * experts[0].num_experts) * each
    models = {"resident": resident}
    for way in ("router", "previous", "none"):
        models[f"cached, look-ahead {way}"] = bundled(cache_bytes=budget, look_ahead=way, bytes_per_second=disk * 1e9)
    for model in models.values():
        decode(model, ids)
    for model in list(models.values())[1:]:
        model.metal_marlin_cache.statistics(reset=True)
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append(decode(model, ids))
    print(f"\ndecode of {tokens} tokens of text, tiny-moe, {budget / 1e6:.2f} MB of experts in memory ({part:.0%}),")
    print(f"disk simulated at {disk:g} GB/s, {rounds} rounds, {torch.get_num_threads()} threads")
    head = f"  {'':<28} {'tokens/s':>26} {'of resident':>12} {'hits':>6} {'late':>6}"
    print(f"{head} {'MB/token':>9} {'stall ms/token':>15}")
    report: dict[str, Any] = {"budget": budget, "tokens_per_second": found, "ratio": {}, "statistics": {}}
    for name, values in found.items():
        ratios = [value / base for value, base in zip(values, found["resident"], strict=True)]
        median = statistics.median(values)
        spread = f"{median:.1f} ({min(values):.1f} to {max(values):.1f})"
        line = f"  {name:<28} {spread:>26} {statistics.median(ratios):>12.3f}"
        report["ratio"][name] = statistics.median(ratios)
        cache = getattr(models[name], "metal_marlin_cache", None)
        if cache is not None:
            s = cache.statistics()
            uses, count = s.hits + s.late + s.misses, rounds * tokens
            line += f" {s.hits / uses:>6.3f} {s.late / uses:>6.3f}"
            line += f" {s.bytes / count / 1e6:>9.3f} {s.stall_ns / count / 1e6:>15.3f}"
            report["statistics"][name] = {**vars(s), "hit_rate": s.hit_rate}
        print(line)
    return report


def run(arguments: argparse.Namespace) -> int:
    """Exit status 2: an argument that makes no sense."""
    fine = arguments.rounds >= 1 and arguments.tokens >= 16 and arguments.threads >= 0
    if not fine or not 0 < arguments.part <= 1 or not 0 < arguments.gigabytes <= 64:
        print("memory: expected at least 1 round and 16 tokens, a part of 0 to 1, and up to 64 GB", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    parts, report = arguments.only or ("load", "policies", "speed"), dict[str, Any]()
    if "load" in parts:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(arguments.directory or temporary)
            if not (directory / "model.safetensors").exists():
                checkpoint.write(directory, checkpoint.layers_for(int(arguments.gigabytes * 1e9)))
            report["load"] = load(directory, arguments.rounds)
    if "policies" in parts:
        report["policies"] = rates(arguments.tokens)
    if "speed" in parts:
        report["speed"] = speed(arguments.tokens, arguments.part, arguments.disk, arguments.rounds)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0
