"""`python -m benchmarks dispatch`: options, progress, and where the report goes.

Owns what a user sees while it runs and when it goes wrong. Nothing is written until the run is over, so an interrupted
one leaves no file; it prints what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.dispatch import device as devices
from benchmarks.dispatch import files, plan, sizes, verdict
from benchmarks.dispatch.device import Device
from benchmarks.dispatch.result import Experiment, Plan, Progress, Refused, Report, Settings

INSTALL = "pip install 'metal_marlin[bench]'"
FORMATS = ("json", "csv", "png", "html")
REDRAW_SECONDS = 0.2
EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dispatch`."""
    keys = [p.key for p in plan.plans()]
    parser.add_argument("--device", choices=devices.KINDS, help="default: the accelerator that torch has, else the CPU")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds, about ten seconds: does it run?"
    )
    parser.add_argument("--only", nargs="+", choices=keys, metavar="KEY", help=f"some of: {', '.join(keys)}")
    parser.add_argument("--seconds", type=float, help="time for all experiments (default 90)")
    parser.add_argument("--repeats", type=int, help="rounds of every comparison, at most (default 100)")
    parser.add_argument("--threshold", type=float, help="improvement that would be worth a pipeline (default 0.15)")
    parser.add_argument("--timeout", type=float, help="seconds to wait for the device before giving up (default 60)")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default: torch's own choice)")
    parser.add_argument("--seed", type=int, help="of weights, tokens, order and resampling (default 0)")
    group = parser.add_argument_group(
        "sizes of a layer (default: the study's on a GPU, a quarter of its widths on a CPU)"
    )
    for name in ("batch", "hidden", "intermediate", "experts", "top-k", "layers"):
        group.add_argument(f"--{name}", type=int, metavar="N")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of activations and dense weights")
    group = parser.add_argument_group("where the report goes besides the terminal")
    for name in FORMATS:
        what = {"json": "; - for standard output, instead of tables", "html": ": one page with everything in it"}
        group.add_argument(f"--{name}", metavar="FILE", help=f"write {name.upper()}{what.get(name, '')}")
    group.add_argument("--report", metavar="FOLDER", help="write report.json, .csv, .png and .html into this folder")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Refused: a device that is not here."""
    kind = arguments.device or devices.default_kind()
    devices.check_kind(kind)
    names = {field.name for field in dataclasses.fields(Settings)} - {"device", "quick"}
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return Settings(**{**sizes.defaults(kind, arguments.quick), **given})


def describe(device: Device) -> dict[str, str]:
    """The machine's facts, as the report starts with them."""
    found = machine.describe()
    system = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.release()
    found["system"] = f"{platform.system()} {system}, Python {platform.python_version()}"
    found["device"] = f"{device.name} ({device.type})"
    if device.type == "cuda":
        found["device"] += f", CUDA {torch.version.cuda}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    busy = ": the machine was busy, so figures are noisier than they need be" if load > cores / 2 else ""
    found["load"] = f"{load:.1f} on {cores} cores before it began{busy}"
    return found


def targets(arguments: argparse.Namespace) -> dict[str, Path]:
    """Format: file. Refused: a folder that is not there or can't be written, or what is needed to draw is missing."""
    found = {name: Path(getattr(arguments, name)) for name in FORMATS if getattr(arguments, name) not in (None, "-")}
    if arguments.report:
        folder = Path(arguments.report)
        folder.mkdir(parents=True, exist_ok=True)
        found = {**{name: folder / f"report.{name}" for name in FORMATS}, **found}
    for name, path in found.items():
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise Refused(f"--{name} is {path}; expected a file in a folder that can be written")
    if {"png", "html"} & set(found):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise Refused(f"matplotlib, which draws the plots, is not installed: {INSTALL}") from None
    return found


def save(report: Report, where: dict[str, Path]) -> dict[Path, str | None]:
    """Writes the report in each format, whole files only. File: None, or why it could not be written; one that fails,
    a drawing say, costs none of the others."""

    def png() -> bytes:
        from benchmarks.dispatch import plots

        return plots.png(report)

    def html() -> str:
        from benchmarks.dispatch import page

        return page.html(report)

    makers: dict[str, Callable[[], str | bytes]] = {
        "json": report.to_json,
        "csv": lambda: files.to_csv(report),
        "png": png,
        "html": html,
    }
    outcome: dict[Path, str | None] = {}
    for name, path in where.items():
        try:
            files.write(path, makers[name]())
            outcome[path] = None
        except Exception as error:
            outcome[path] = f"{type(error).__name__}: {error}"
    return outcome


@contextlib.contextmanager
def showing_progress(chosen: list[Plan]) -> Iterator[tuple[Callable[[Plan], Progress], Callable[[Experiment], None]]]:
    """(progress_of, finished) for plan.run_all: bars on a terminal, a line for each experiment elsewhere."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from benchmarks.dispatch import terminal

    err = terminal.console(stderr=True)
    if not err.is_terminal:
        count = 0

        def say(experiment: Experiment) -> None:
            nonlocal count
            count += 1
            what = f"not run: {experiment.absent}" if experiment.absent else f"{experiment.seconds:.1f} s"
            print(f"[{count}/{len(chosen)}] {experiment.title}: {what}", file=sys.stderr, flush=True)

        yield (lambda _: lambda fraction, what: None), say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    # drawn by hand, between timings: a thread that draws would take Python's lock in the middle of one
    with Bars(*columns, console=err, transient=True, auto_refresh=False) as bars:
        drawn = time.monotonic()
        whole = bars.add_task("all", total=len(chosen), what="")
        tasks: dict[str, Any] = {}

        def progress_of(one: Plan) -> Progress:
            tasks[one.key] = task = bars.add_task(one.title[:38], total=1.0, what="")

            def report(fraction: float, what: str) -> None:
                nonlocal drawn
                bars.update(task, completed=min(fraction, 1.0), what=what[:24])
                if time.monotonic() - drawn > REDRAW_SECONDS:
                    drawn = time.monotonic()
                    bars.refresh()

            return report

        def finished(experiment: Experiment) -> None:
            if experiment.key in tasks:
                bars.remove_task(tasks.pop(experiment.key))
            bars.advance(whole)
            bars.refresh()

        yield progress_of, finished


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0; 1 if an experiment failed; 2 if nothing was run; 130 if interrupted; 3 from the watch."""
    try:
        from benchmarks.dispatch import terminal
    except ImportError as error:
        print(f"dispatch: {error.name}, which draws the tables, is not installed: {INSTALL}", file=sys.stderr)
        return EXIT_REFUSED
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        settings, where = settings_of(arguments), targets(arguments)
        device = Device(settings.device, settings.timeout)
        sizes.check(settings, device)
    except Refused as error:
        print(f"dispatch: {error}", file=sys.stderr)
        return EXIT_REFUSED
    facts = describe(device)
    device.close()
    chosen = [p for p in plan.plans() if not arguments.only or p.key in arguments.only]
    out = terminal.console(stderr=arguments.json == "-")
    finished: list[Experiment] = []

    def late(message: str) -> None:
        partial = Report(settings, facts, tuple(finished), verdict.decide(settings, finished), interrupted=True)
        terminal.show(out, partial)
        print(f"\ndispatch: {message}. Nothing was written.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(devices.EXIT_LATE)

    devices.late = late
    with showing_progress(chosen) as (progress_of, done):
        report = plan.run_all(settings, facts, chosen, progress_of, done, finished)
    if report.interrupted:
        terminal.show(out, report)
        print("\ndispatch: interrupted; the tables hold what was finished, and nothing was written.", file=sys.stderr)
        return EXIT_INTERRUPTED
    saved = save(report, where)  # before anything is shown: a pipe that closes early costs no report
    if arguments.json == "-":
        print(report.to_json(), end="")
    else:
        terminal.show(out, report)
    for path, problem in saved.items():
        print(f"dispatch: {path} was not written: {problem}" if problem else f"wrote {path}", file=sys.stderr)
    failed = [e for e in report.experiments if (e.absent or "").startswith(plan.FAILED)]
    for experiment in failed:
        print(f"dispatch: {experiment.title} {experiment.absent}", file=sys.stderr)
    return EXIT_FAILED if failed or any(saved.values()) else 0
