"""`python -m benchmarks compare A.json B.json`: what changed between two reports, as ratios with intervals."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.dispatch.result import Report, Series
from benchmarks.dispatch.spread import Interval, bootstrap
from benchmarks.report_json import BadReport

SAME = "same"


@dataclass(frozen=True)
class Change:
    """One series in both reports: B over A, of the medians, with its interval."""

    experiment: str
    key: str
    name: str
    unit: str
    a: float
    b: float
    ratio: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """ "lower" or "higher" when the interval does not hold 1, else "same"."""
        return "lower" if self.high < 1 else "higher" if self.low > 1 else SAME


def changes(a: Report, b: Report) -> list[Change]:
    """All series that both reports measured. The reports' rounds have nothing to do with each other, so samples are
    resampled separately. Emulated series, and those whose unit or zero median allows no ratio, are left out."""
    found = []
    for experiment in a.experiments:
        other = b.find(experiment.key)
        for series in experiment.measured() if other else ():
            twin = other.find(series.key) if other else None
            if twin is None or twin.emulated or twin.unit != series.unit or not series.median:
                continue
            if len(series.samples) == len(twin.samples) == 1 and series.samples == twin.samples:
                continue  # worked out, not measured
            ratio = _ratio(series, twin, a.settings.seed)
            workload = f"{series.facts['workload']}: " if series.x is None and "workload" in series.facts else ""
            where = f", {series.x:g} {experiment.x_label.split()[0]}" if series.x is not None else ""
            what = f"{workload}{series.name}{where}"
            found.append(Change(experiment.key, series.key, what, series.unit, series.median, twin.median, *ratio))
    return found


def _ratio(a: Series, b: Series, seed: int) -> Interval:
    return bootstrap(lambda x, y: y / x, a.measured, b.measured, paired=False, seed=seed)


def differences(a: Report, b: Report) -> list[str]:
    """Why the two may not be comparable: machines and settings that differ."""
    found = []
    for name in sorted(set(a.machine) | set(b.machine) - {"load"}):
        if name != "load" and a.machine.get(name) != b.machine.get(name):
            found.append(f"{name}: {a.machine.get(name, 'unknown')} | {b.machine.get(name, 'unknown')}")
    ours, theirs = asdict(a.settings), asdict(b.settings)
    found += [f"{name}: {ours[name]} | {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    parser.add_argument("a", metavar="A.json", help="a report: dispatch --json FILE")
    parser.add_argument("b", metavar="B.json", help="another one; ratios are B / A")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def load(path: str) -> Report:
    """BadReport, with the file's name."""
    try:
        return Report.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadReport(f"{path}: {error}") from None
    except BadReport as error:
        raise BadReport(f"{path}: {error}") from None


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0, or 2 if a file is no report or nothing can be compared."""
    try:
        a, b = load(arguments.a), load(arguments.b)
    except BadReport as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    found = changes(a, b)
    if arguments.json:
        found_json = [{**asdict(change), "word": change.word} for change in found]
        print(json.dumps({"differences": differences(a, b), "changes": found_json}, indent=1))
        return 0
    try:
        _show(arguments.a, arguments.b, a, b, found)
    except ImportError as error:
        print(f"compare: {error.name} is not installed: pip install 'metal_marlin[bench]'", file=sys.stderr)
        return 2
    if not found:
        print("compare: the reports have no series in common", file=sys.stderr)
        return 2
    return 0


def _show(name_a: str, name_b: str, a: Report, b: Report, found: list[Change]) -> None:
    from rich.table import Table
    from rich.text import Text

    from benchmarks.dispatch import terminal, wording

    out = terminal.console()
    out.print(Text(f"A: {name_a} ({a.began}, {a.verdict.outcome})"))
    out.print(Text(f"B: {name_b} ({b.began}, {b.verdict.outcome})"))
    for difference in differences(a, b):
        out.print(Text(f"differs  {difference}", style="yellow"))
    experiment = ""
    table = Table.grid()
    for change in found:
        if change.experiment != experiment:
            if experiment:
                out.print(table)
            experiment = change.experiment
            title = next(e.title for e in a.experiments if e.key == experiment)
            out.print()
            out.print(Text(title, style="bold"))
            table = terminal.table("", "A", "B", "B / A", "95 % interval", "")
        values = [wording.with_unit(value, change.unit) for value in (change.a, change.b)]
        spread = f"{wording.number(change.low)} – {wording.number(change.high)}"
        table.add_row(Text(change.name), *values, wording.number(change.ratio), spread, change.word)
    if found:
        out.print(table)
