"""`python -m benchmarks cpu`: options, progress, and where the report goes.

Owns what a user sees. Nothing is written until the run is over; an interrupted one prints what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cpu import race, yardstick
from benchmarks.cpu.processes import Gone, Worker
from benchmarks.cpu.race import Race
from benchmarks.cpu.result import Report, Settings
from benchmarks.cpu.roster import ENTRIES, PEERS
from benchmarks.cpu.shapes import OPS, SHAPES
from benchmarks.dispatch import files
from benchmarks.dispatch.command import EXIT_INTERRUPTED, EXIT_REFUSED, INSTALL
from benchmarks.dispatch.result import Refused
from metal_marlin import _C

EXIT_FAILED = 1
FORMATS = ("json", "png", "markdown")
SWEEP = tuple(range(1, 65))
QUICK: dict[str, Any] = {
    "shapes": ("T", "L2048", "R32"), "tokens": (1, 16), "bits": (2.0,), "rounds": 5, "seconds": 2.0,
    "cold_bytes": 2**24,
}  # fmt: skip


def numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of "1,4,16"."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "list"
    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cpu`."""
    s = Settings()
    levels, own = _C.cpu_levels(), _C.cpu_level()
    group = parser.add_argument_group("what is measured")
    group.add_argument("--ops", nargs="+", choices=OPS, metavar="OP", help=f"some of {', '.join(OPS)} (default: all)")
    group.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="KEY", help=f"some of {', '.join(SHAPES)}")
    group.add_argument("--tokens", type=numbers(int), metavar="N,N", help="(default 1,4,16,128,512)")
    group.add_argument("--bits", type=numbers(float), metavar="B,B", help="our rates (default 2,3,4)")
    group.add_argument("--codebooks", nargs="+", choices=s.codebooks, help="(default: all)")
    group.add_argument(
        "--levels", nargs="+", choices=levels, help=f"our SIMD levels (default: all but scalar; {own} runs by itself)"
    )
    peers = f"some of {', '.join(PEERS)}; with no name after it, only ours"
    group.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER", help=peers)
    group.add_argument("--match", metavar="REGEX", help="only variants whose name, 'torch, loop bf16', has this")
    group.add_argument(
        "--baseline", metavar="NAME", help="what ratios are taken to (default: ours at about equal bits)"
    )
    group.add_argument("--scaling", action="store_true", help="also our default level with one thread")
    group.add_argument(
        "--sweep", action="store_true", help="every token count from 1 to 64: are there cliffs? ours alone"
    )
    group.add_argument("--quick", action="store_true", help="one small shape of each op, few rounds: does it run?")
    group = parser.add_argument_group("how")
    group.add_argument("--threads", type=int, help="of every contender (default: torch's own choice)")
    group.add_argument("--rounds", type=int, help=f"at most (default {s.rounds}); no fewer than {race.FEWEST}")
    group.add_argument("--seconds", type=float, help=f"for a shape at one token count (default {s.seconds:g})")
    group.add_argument(
        "--slowest", type=float, help=f"seconds of a call that leave a contender out (default {s.slowest:g})"
    )
    group.add_argument("--timeout", type=float, help=f"seconds to wait for a contender (default {s.timeout:g})")
    group.add_argument(
        "--cold", type=float, metavar="MIB", help=f"layers are cycled over (default {s.cold_bytes >> 20})"
    )
    group.add_argument("--memory", type=float, help=f"part of the free memory for weights (default {s.memory})")
    group.add_argument("--seed", type=int, help="of tokens, routing and order (default 0)")
    group.add_argument(
        "--spin", action="store_true", help="let the active contender's threads wait as they do by default"
    )
    group.add_argument(
        "--python", action="append", default=[], metavar="PEER=FILE", help="the interpreter that a peer is installed in"
    )
    group.add_argument(
        "--library",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="ik: libggml.so; ggml: the folder of its two",
    )
    group = parser.add_argument_group("where the report goes besides the terminal")
    group.add_argument("--json", metavar="FILE", help="write JSON; - for standard output, instead of tables")
    group.add_argument("--png", "--plot", dest="png", metavar="FILE", help="write a plot")
    group.add_argument("--markdown", metavar="FILE", help="write the tables as in docs/cpu.md")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Refused: numbers that cannot be meant."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in names and value is not None
    }
    base: dict[str, Any] = {"threads": torch.get_num_threads(), "peers": PEERS, **(QUICK if arguments.quick else {})}
    if arguments.sweep:
        base |= {"tokens": SWEEP, "peers": (), "ops": ("moe",), "codebooks": ("mul1",), "levels": (_C.cpu_level(),)}
        base |= {"seconds": 120.0}
    if arguments.cold is not None:
        given["cold_bytes"] = int(arguments.cold * 2**20)
    made = Settings(**{**base, **given})
    if made.shapes and "ops" not in given:
        made = dataclasses.replace(made, ops=tuple(op for op in OPS if any(SHAPES[k].op == op for k in made.shapes)))
    if not made.levels:
        every = _C.cpu_levels()
        made = dataclasses.replace(made, levels=tuple(level for level in every if level != "scalar") or every)
    for name in ("threads", "rounds", "seconds", "slowest", "timeout", "memory", "cold_bytes"):
        if getattr(made, name) <= 0:
            raise Refused(f"--{name} is {getattr(made, name):g}; expected more than 0")
    if min(made.tokens) < 1:
        raise Refused(f"--tokens has {min(made.tokens)}; expected at least 1")
    known = sorted({rate / 2 for rates in _C.RATES2.values() for rate in rates})
    for bits in made.bits:
        if bits not in known:
            raise Refused(f"--bits has {bits:g}; expected some of {', '.join(f'{b:g}' for b in known)}")
    try:
        re.compile(made.match)
    except re.error as error:
        raise Refused(f"--match is {made.match!r}, which is no regular expression: {error}") from None
    return made


def pairs(option: str, given: list[str]) -> dict[str, str]:
    """PEER=VALUE options. Refused: no such peer, or no value."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in ENTRIES or not value:
            raise Refused(f"--{option} is {text!r}; expected PEER=PATH with one of {', '.join(ENTRIES)}")
        found[name] = str(Path(value).expanduser())
    return found


def targets(arguments: argparse.Namespace) -> dict[str, Path]:
    """Format: file. Refused: a folder that is not there or can't be written, or what is needed to draw is missing."""
    found = {name: Path(getattr(arguments, name)) for name in FORMATS if getattr(arguments, name) not in (None, "-")}
    for name, path in found.items():
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise Refused(f"--{name} is {path}; expected a file in a folder that can be written")
    if "png" in found:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise Refused(f"matplotlib, which draws the plot, is not installed: {INSTALL}") from None
    return found


def save(report: Report, where: dict[str, Path]) -> list[str]:
    """Writes whole files only; sentences on what was not written. One that fails costs none of the others."""
    problems = []
    for name, path in where.items():
        try:
            if name == "json":
                content: str | bytes = report.to_json()
            elif name == "png":
                from benchmarks.cpu import plots

                content = plots.png(report)
            else:
                from benchmarks.cpu import terminal

                content = terminal.markdown(report)
            files.write(path, content)
        except Exception as error:
            problems.append(f"{path} was not written: {type(error).__name__}: {error}")
    return problems


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Being terminated is being interrupted: the workers, of which some may be stopped, must not stay behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def showing_progress() -> Iterator[Callable[[float, str], None]]:
    """A function (fraction, what): a bar on a terminal, lines elsewhere. Drawn between turns, never by a thread."""
    if not sys.stderr.isatty():
        yield lambda fraction, what: print(f"[{fraction:4.0%}] {what}", file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, transient=True, auto_refresh=False, redirect_stdout=False) as bars:
        task = bars.add_task("all", total=1.0, what="")

        def report(fraction: float, what: str) -> None:
            bars.update(task, completed=fraction, what=what)
            bars.refresh()

        yield report


def measure(settings: Settings, pythons: dict[str, str], libraries: dict[str, str]) -> Report:
    """The run. KeyboardInterrupt ends it early, with what it has."""
    began, clock, interrupted = datetime.now(timezone.utc), time.monotonic(), False
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    facts = machine.describe()
    facts["torch"] = torch.__version__
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    facts["load"] = f"{load:.1f} on {os.cpu_count()} cores before it began"
    if load > (os.cpu_count() or 1) / 2:
        facts["load"] += ": the machine was busy, so figures are noisier than they need be"
    runner = Race(settings, lambda text: print(f"cpu: {text}", file=sys.stderr, flush=True))
    try:
        with ended_like_ctrl_c(), showing_progress() as progress:
            progress(0.0, "the machine's own speed")
            before = yardstick.ask(settings.threads)
            progress(0.0, "starting the contenders")
            started = []
            for entry, who, options in race.entrants(settings, settings.levels, _C.cpu_level()):
                if entry in libraries:
                    options["library"] = libraries[entry]
                try:
                    started.append((entry, who, Worker(who.name, options, python=pythons.get(entry, ""))))
                except Gone as gone:
                    runner.absence(entry, str(gone))
            runner.start(started)
            runner.run(progress)
            progress(1.0, "the machine's own speed, again")
            after = yardstick.ask(settings.threads)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        runner.close()
    return Report(
        settings, facts, tuple(runner.contestants), tuple(runner.absent), tuple(runner.excluded), tuple(runner.series),
        before, after, began.isoformat(timespec="seconds"), time.monotonic() - clock, interrupted,
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0; 1 if nothing was measured or a file could not be written; 2 refused; 130 interrupted."""
    try:
        from benchmarks.cpu import terminal
        from benchmarks.dispatch.terminal import console
    except ImportError as error:
        print(f"cpu: {error.name}, which draws the tables, is not installed: {INSTALL}", file=sys.stderr)
        return EXIT_REFUSED
    try:
        settings, where = settings_of(arguments), targets(arguments)
        pythons, libraries = pairs("python", arguments.python), pairs("library", arguments.library)
    except Refused as error:
        print(f"cpu: {error}", file=sys.stderr)
        return EXIT_REFUSED
    report = measure(settings, pythons, libraries)
    out = console(stderr=arguments.json == "-")
    if report.interrupted:
        terminal.show(out, report)
        print("\ncpu: interrupted; the tables hold what was finished, and nothing was written.", file=sys.stderr)
        return EXIT_INTERRUPTED
    problems = save(report, where)
    if arguments.json == "-":
        print(report.to_json(), end="")
    else:
        terminal.show(out, report)
    for problem in problems:
        print(f"cpu: {problem}", file=sys.stderr)
    return EXIT_FAILED if problems or not report.series else 0
