"""python -m benchmarks NAME: the ops on a CPU, the dispatch investigation, comparing its reports, memory, sharding."""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks import sharding
from benchmarks.cpu import command as cpu
from benchmarks.dispatch import command, compare
from benchmarks.memory import command as memory
from benchmarks.quality import command as quality


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module, run, what in (
        ("cpu", cpu, cpu.run, "every op at every SIMD level, next to the other libraries here (docs/cpu.md)"),
        ("dispatch", command, command.run, "does queueing MoE layers pay? about two minutes (docs/dispatch.md)"),
        ("memory", memory, memory.run, "loading, resident bytes, a cache of experts (docs/memory.md)"),
        ("sharding", sharding, sharding.run, "bytes and messages of experts spread over processes (docs/sharding.md)"),
        ("quality", quality, quality.run, "perplexity against bytes, and weight errors (docs/quantize.md)"),
        ("compare", compare, compare.run, "what changed between two reports of dispatch --json"),
    ):
        one = names.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        module.add_arguments(one)
        one.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
