"""The report in a terminal: tables and wrapped text, through rich. Without a terminal, the same in plain text."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from benchmarks.dispatch import verdict, wording
from benchmarks.dispatch.result import Experiment, Figure, Report, Verdict

STYLES = {verdict.WORTH: "green", verdict.NOT_WORTH: "red", verdict.OPEN: "yellow", verdict.NOT_APPLICABLE: "blue"}


def console(stderr: bool = False) -> Console:
    """Text is never taken for markup, and numbers are not coloured."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def table(*columns: str) -> Table:
    """A table whose first column wraps and whose others are figures."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
    made.add_column(columns[0], overflow="fold", ratio=1)
    for column in columns[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in wording.facts(report).items():
        table.add_row(name, Text(value))
    return table


def _series(experiment: Experiment) -> Table:
    swept = any(series.x is not None for series in experiment.series)
    units = {series.unit for series in experiment.series}
    unit = f" {wording.UNITS.get(min(units), min(units))}" if len(units) == 1 else ""
    columns = [f"median{unit}", "middle half", "runs"]
    if any(series.study for series in experiment.series):
        columns.append("study")
    rows = table("", *([experiment.x_label.split()[0]] if swept else []), *columns)
    last = ""
    for series in (
        sorted(experiment.series, key=lambda s: (s.group, s.x if s.x is not None else 0))
        if swept
        else experiment.series
    ):
        workload = str(series.facts.get("workload", ""))
        if not swept and workload and workload != last:
            rows.add_row(Text(workload, style="italic"))
        last = workload
        name = Text(("  " if workload and not swept else "") + series.name)
        cells = [f"{series.x:g}" if series.x is not None else ""] if swept else []
        if series.emulated:
            cells += [wording.EMULATED, "", str(len(series.samples))]
        else:
            low, median, high = series.quartiles
            spread = f"{wording.number(low)} – {wording.number(high)}" if len(series.samples) > 1 else ""
            cells += [wording.number(median), spread, str(len(series.samples)) if len(series.samples) > 1 else ""]
        rows.add_row(name, *cells, *([wording.study(series.study, series.unit)] if len(columns) > 3 else []))
    return rows


def _figures(figures: tuple[Figure, ...]) -> Table:
    intervals, studied = any(f.low is not None for f in figures), any(f.study for f in figures)
    rows = table("", "value", *(["95 % interval"] if intervals else []), *(["study"] if studied else []))
    for figure in figures:
        cells = [wording.with_unit(figure.value, figure.unit)]
        cells += [wording.interval(figure)] if intervals else []
        cells += [wording.study(figure.study, figure.unit)] if studied else []
        rows.add_row(Text(figure.name), *cells)
    return rows


def show_experiment(out: Console, experiment: Experiment) -> None:
    """One experiment: question, tables, checks, notes."""
    out.print()
    out.print(Rule(Text(wording.heading(experiment), style="bold"), align="left"))
    out.print(Text(experiment.question, style="italic"))
    if experiment.absent is not None:
        out.print(Text(f"Not run: {experiment.absent}"))
        return
    if experiment.emulated:
        out.print(Text(f"These timings are {wording.EMULATED}.", style="bold red"))
    if experiment.series:
        out.print(Padding(_series(experiment), (1, 0, 0, 0)))
    if experiment.figures and not experiment.emulated:
        out.print(Padding(_figures(experiment.figures), (1, 0, 0, 0)))
    for label, sentences in (("checked", experiment.checks), ("note", experiment.notes)):
        for sentence in sentences:
            grid = Table.grid(padding=(0, 1))
            grid.add_column(no_wrap=True, style="dim", min_width=7)
            grid.add_column(overflow="fold")
            grid.add_row(label, Text(sentence))
            out.print(grid)


def show_verdict(out: Console, found: Verdict) -> None:
    """The verdict's figures, arithmetic and recommendation."""
    out.print()
    out.print(Rule(Text("Verdict", style="bold"), align="left"))
    if found.figures:
        out.print(_figures(found.figures))
    out.print(Text(found.arithmetic, style="dim"))
    title = Text(f"{wording.HEADLINES[found.outcome]} (threshold {found.threshold:.0%})")
    out.print(Panel(Text(found.recommendation), title=title, title_align="left", border_style=STYLES[found.outcome]))


def show(out: Console, report: Report) -> None:
    """The whole report."""
    out.print(Text(wording.TITLE, style="bold"))
    out.print(_facts(report))
    for experiment in report.experiments:
        show_experiment(out, experiment)
    show_verdict(out, report.verdict)
