"""The report in a terminal, through rich, and as markdown."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Rich
from rich.text import Text

from benchmarks.cpu import figures, tables
from benchmarks.cpu.result import Report

UNLIMITED = 400  # columns, where no terminal sets them: a file or a pipe gets every figure
TITLE = "Our ops on this CPU, next to the other libraries here"


def show(out: Console, report: Report) -> None:
    """Facts, tables, and who did not take part. A narrow terminal gets the columns that fit."""
    if not out.is_terminal:
        out.width = UNLIMITED
    out.print(Text(TITLE, style="bold"))
    grid = Rich.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in tables.facts(report).items():
        grid.add_row(name, Text(value))
    out.print(grid)
    for table in tables.every(report):
        out.print()
        out.print(Text(table.title, style="bold"))
        shown = table.within(out.width if out.is_terminal else UNLIMITED)
        made = Rich(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
        for index, column in enumerate(shown.columns):
            made.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in shown.rows:
            made.add_row(*(Text(cell) for cell in row))
        out.print()
        out.print(made)
        if shown.note:
            out.print(Text(shown.note, style="dim"))
    left_out(out, report)


def left_out(out: Console, report: Report) -> None:
    """Who was absent or excluded."""
    sentences = [*tables.absences(report), *report.excluded]
    if sentences:
        out.print()
        out.print(Text("Not measured", style="bold"))
        for sentence in sentences:
            out.print(Text(sentence))


def markdown(report: Report) -> str:
    """For docs/cpu.md: facts, comparisons, medians; every figure of a heat folded away."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {escaped(value)} |" for name, value in tables.facts(report).items()]
    shapes = figures.shapes_of(report)
    for table in [*tables.summary(report), *(tables.medians(report, shape) for shape in shapes)]:
        lines += ["", f"**{table.title}**", "", *grid(table)]
        if table.note:
            lines += ["", table.note]
    sentences = [*tables.absences(report), *report.excluded]
    if sentences:
        lines += ["", "**Not measured**", "", *(f"- {escaped(sentence)}" for sentence in sentences)]
    if not report.settings.sweep:
        lines += ["", "<details><summary>Every figure</summary>"]
        for shape in shapes:
            for tokens in figures.tokens_of(report, shape):
                table = tables.details(report, shape, tokens)
                lines += ["", f"**{table.title}**", "", *grid(table)]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def grid(table: tables.Table) -> list[str]:
    """A table's lines."""
    lines = [f"| {' | '.join(escaped(c) for c in table.columns)} |", f"|---{'|---:' * (len(table.columns) - 1)}|"]
    return lines + [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in table.rows]


def escaped(text: str) -> str:
    """A cell's text."""
    return text.replace("|", "\\|").replace("\n", " ")
