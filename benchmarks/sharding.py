"""python -m benchmarks sharding: bytes of a rank, messages and bytes of a token, against docs/sharding.md's formulas.

Starts torchrun with 2 and 4 ranks on this machine, of which each runs `rank` below. Bytes on sockets are the kernel's
count (TCP_INFO, Linux); elsewhere they are left out. Seconds are of ranks that share one machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS = 32
PROMPT = 64
ANNOUNCEMENT = 5 * 8  # bytes of ExpertGroup.announce
GLOO_HEADER = 48  # bytes before each of gloo's messages (gloo/transport/tcp/pair.h: Op::preamble)
SEGMENTS, ACKED = 156, 120  # offsets in struct tcp_info of Linux: data_segs_out uint32, bytes_acked uint64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", default="models/tiny-moe", help="an EXL3 folder (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="R", help="(default: 2 4)")


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    print(f"{arguments.directory}: {PROMPT} tokens at once, then {TOKENS} one by one; every rank one thread")
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += ["-m", "benchmarks.sharding", arguments.directory, folder]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            report([json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)])
    return 0


def report(every: list[dict[str, Any]]) -> None:
    """One number of ranks."""
    ranks, first = len(every), every[0]
    layers, hidden, experts = first["layers"], first["hidden"], first["experts"]
    print(f"\n{ranks} ranks, {layers} sharded layers of {experts} experts, hidden size {hidden}")
    print(f"  logits of {PROMPT} tokens: {first['error']:.1e} of their size from one process's")
    print(
        f"  {'rank':>4} {'experts':>9} {'bytes of experts':>17} {'formula':>11} {'all bytes':>11} {'one process':>12}"
    )
    for rank, found in enumerate(every):
        formula = found["whole_experts"] * (found["own"][1] - found["own"][0]) / experts
        own = f"{found['own'][0]} to {found['own'][1] - 1}"
        print(
            f"  {rank:>4} {own:>9} {found['held_experts']:>17,} {formula:>11,.0f} {found['held']:>11,}"
            f" {found['whole']:>12,}"
        )
    payload = layers * 4 * (hidden + 1) + ANNOUNCEMENT
    print(f"  a token: {first['collectives']:g} collectives (formula {layers + 1}),", end=" ")
    print(f"{first['payload']:,.0f} bytes into them on each rank (formula {payload:,})")
    if first["sent"] is not None:
        messages = (12 * layers + 6) * (ranks - 1)
        ring = 2 * (ranks - 1) / ranks * layers * 4 * (hidden + 1) + (ranks - 1) * ANNOUNCEMENT
        sent = statistics.fmean(found["sent"] for found in every)
        packets = statistics.fmean(found["packets"] for found in every)
        print(f"           out of a rank's sockets, mean: {sent:,.0f} bytes", end=" ")
        print(f"(formula {ring + GLOO_HEADER * messages:,.0f}) in {packets:.0f} messages (formula {messages})")
    seconds = [1e3 * s for s in first["seconds"]]
    low, high = min(seconds), max(seconds)
    print(
        f"           {statistics.median(seconds):.1f} ms ({low:.1f} to {high:.1f}), {first['waiting']:.1f} ms in"
        f" collectives; one process alone {1e3 * first['alone']:.1f} ms"
    )


def sockets() -> tuple[int, int] | None:
    """Bytes and packets with data that this process's TCP sockets have sent, None where nobody counts them."""
    if not sys.platform.startswith("linux"):
        return None
    total, packets = 0, 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        total += struct.unpack_from("<Q", info, ACKED)[0]
        packets += struct.unpack_from("<I", info, SEGMENTS)[0]
    return total, packets


def rank(directory: str, folder: str) -> None:
    """What one rank does, started by torchrun."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import metal_marlin.hf as hf
    from metal_marlin.sharding import ExpertGroup, ShardedExperts

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = ExpertGroup()
    load = AutoModelForCausalLM.from_pretrained
    with hf.shard_experts(group):
        model = load(directory, dtype=torch.float32)
    ids = torch.randint(5, 200, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def decode(one: Any, count: int) -> tuple[Any, list[float]]:
        """Logits of the prompt, and the seconds of each of `count` tokens after it."""
        with torch.no_grad():
            out = one(ids, use_cache=True)
            logits, seconds = out.logits, []
            for _ in range(count):
                begin = time.monotonic()
                out = one(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
                seconds.append(time.monotonic() - begin)
        return logits, seconds

    decode(model, 4)
    with torch.no_grad():
        out = model(ids, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    time.sleep(0.2)  # until the last bytes are acknowledged
    before, sent = (group.collectives, group.nbytes, group.seconds), sockets()
    seconds = []
    with torch.no_grad():
        for _ in range(TOKENS):
            begin = time.monotonic()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            seconds.append(time.monotonic() - begin)
    time.sleep(0.2)
    after, now = (group.collectives, group.nbytes, group.seconds), sockets()
    collectives, payload, waiting = ((b - a) / TOKENS for a, b in zip(before, after, strict=True))
    logits, _ = decode(model, 0)
    dist.barrier()
    alone = load(directory, dtype=torch.float32)
    want, alone_seconds = decode(alone, TOKENS if dist.get_rank() == 0 else 0)  # the others leave it the machine
    dist.barrier()
    held, whole = ({n: t.nbytes for n, t in one.state_dict().items()} for one in (model, alone))
    layers = [module for module in model.modules() if isinstance(module, ShardedExperts)]
    result = {
        "layers": len(layers),
        "hidden": layers[0].hidden_dim,
        "experts": layers[0].total_experts,
        "own": (layers[0].own.start, layers[0].own.stop),
        "held": sum(held.values()),
        "whole": sum(whole.values()),
        "held_experts": sum(size for name, size in held.items() if ".experts." in name),
        "whole_experts": sum(size for name, size in whole.items() if ".experts." in name),
        "error": float((logits - want).abs().max() / want.std()),
        "collectives": collectives,
        "payload": payload,
        "waiting": 1e3 * waiting,
        "sent": None if sent is None or now is None else (now[0] - sent[0]) / TOKENS,
        "packets": None if sent is None or now is None else (now[1] - sent[1]) / TOKENS,
        "seconds": seconds,
        "alone": statistics.median(alone_seconds) if alone_seconds else 0.0,
    }
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank(*sys.argv[1:])
