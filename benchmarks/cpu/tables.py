"""The report as tables of text, shared by the terminal and the markdown file. Owns what is shown and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.cpu import figures
from benchmarks.cpu.figures import Outcome
from benchmarks.cpu.result import Report
from benchmarks.cpu.roster import EVERY_PEER
from benchmarks.cpu.shapes import SHAPES
from benchmarks.dispatch import wording
from benchmarks.dispatch.spread import Interval

MARKS = {"met": "✓", "about": "~", "missed": "✗", "": ""}
FIRST_TO_GO = ("runs", "error", "of peak", "of copy", "GFLOP/s", "middle half", "GB/s", "bits")
LEGEND = "✓ met by the whole 95 % interval, ~ by the median alone, ✗ missed"


@dataclass(frozen=True)
class Table:
    """A title, the columns' heads, and rows of as many cells. note: a sentence below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def within(self, width: int) -> Table:
        """The table without the columns that matter least, until it fits, and a note that names them."""
        kept = list(range(len(self.columns)))
        size = [max(len(row[i]) for row in (self.columns, *self.rows)) + 2 for i in kept]
        gone = []
        for name in FIRST_TO_GO:
            if sum(size[i] for i in kept) > width and name in self.columns:
                kept.remove(self.columns.index(name))
                gone.append(name)
        if not gone:
            return self
        note = f"{self.note} Too narrow for: {', '.join(gone)}.".strip()
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(self.title, tuple(self.columns[i] for i in kept), rows, note)


def milliseconds(seconds: float) -> str:
    return wording.number(seconds * 1e3)


def factor(interval: Interval) -> str:
    """2.31 (2.25 – 2.40)"""
    return f"{interval.value:.2f} ({interval.low:.2f} – {interval.high:.2f})"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def judged(outcome: Outcome | None) -> str:
    """A ratio, and its goal's mark."""
    if outcome is None:
        return ""
    goal = "" if outcome.goal is None else f" {MARKS[outcome.verdict]} ≥ {outcome.goal:.2g}"
    return factor(outcome.ratio) + goal


def facts(report: Report) -> dict[str, str]:
    """The machine and how it was measured."""
    s = report.settings
    found = dict(report.machine)
    for name, text in (("its speed", report.yardstick), ("afterwards", report.yardstick_after)):
        if text:
            found[name] = yardstick(text)
    waiting = (
        "as the libraries' defaults have it, and workers are stopped between their turns"
        if s.spin
        else "asleep (OMP_WAIT_POLICY=passive, KMP_BLOCKTIME=0, allow_spinning=0)"
    )
    found["threads"] = f"{s.threads} for each contender; waiting threads: {waiting}"
    found["weights"] = f"cold: layers cycled over at least {s.cold_bytes / 2**20:.0f} MiB, another routing every call"
    ended = "; INTERRUPTED" if report.interrupted else ""
    found["effort"] = f"at most {s.rounds} rounds and {s.seconds:g} s a table; took {report.seconds:.0f} s{ended}"
    found["began"] = report.began
    waited = [x.delayed for x in report.series]
    if waited:
        found["disturbed"] = (
            f"{100 * sum(waited) / len(waited):.0f} % of turns waited for a processor over 1 % of their time"
        )
    for one in report.contenders:
        found[one.name] = ", ".join(f"{key} {value}" for key, value in one.facts.items())
    return found


def yardstick(found: Mapping[str, float]) -> str:
    """The machine's own speed."""
    products = ", ".join(f"{name} {found[name] / 1e9:.0f}" for name in ("f32", "bf16") if name in found)
    return f"copies {found['copy'] / 1e9:.1f} GB/s, read and written; dense products {products} GFLOP/s"


def absences(report: Report) -> list[str]:
    """A line for each peer that was absent, and how to get it."""
    lines = [f"{one.name} is absent: {one.why}. To have it: {one.install}" for one in report.absent]
    return [*lines, f"Those that pip installs, all at once: {EVERY_PEER}"] if lines else []


def details(report: Report, shape: str, tokens: int) -> Table:
    """One heat: everything that is known of every series."""
    rows = []
    for series in figures.at(report, shape, tokens):
        one, q = figures.row(report, series), series.quartiles
        against = "1" if one.against is series else "" if one.ratio is None else factor(one.ratio)
        rows.append((
            series.name, f"{series.bits:.2f}", milliseconds(q.median),
            f"{milliseconds(q.low)} – {milliseconds(q.high)}",
            against, f"{one.bytes_per_second / 1e9:.2f}", share(one.of_copy), f"{one.flops_per_second / 1e9:.1f}",
            share(one.of_peak), f"{series.error:.1g}", str(len(series.samples)),
        ))  # fmt: skip
    columns = (
        "", "bits", "median ms", "middle half", "time / baseline", "GB/s", "of copy", "GFLOP/s", "of peak", "error",
        "runs",
    )  # fmt: skip
    count = f"{tokens} token{'s' * (tokens != 1)}"
    return Table(f"{SHAPES[shape].title}, {count}", columns, tuple(rows))


def medians(report: Report, shape: str) -> Table:
    """Everyone's milliseconds by token count."""
    counts = figures.tokens_of(report, shape)
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for series in report.series:
        if series.shape == shape:
            line = lines.setdefault((series.name, f"{series.bits:.2f}"), {})
            line[series.tokens] = milliseconds(series.median)
    rows = tuple((name, bits, *(line.get(t, "") for t in counts)) for (name, bits), line in lines.items())
    return Table(f"{SHAPES[shape].title}: median ms by tokens", ("", "bits", *map(str, counts)), rows)


def comparisons(report: Report, shape: str) -> Table:
    """How many times as fast we are, next to the goals."""
    counts = figures.tokens_of(report, shape)
    rows = []
    for comparison, outcomes in figures.compared(report, shape):
        best = {one.peer for one in outcomes.values()}
        title = comparison.title
        if len(best) > 1:
            title += f" ({', '.join(sorted(best))})"
        rows.append((title, *(judged(outcomes.get(t)) for t in counts)))
    return Table(
        f"{SHAPES[shape].title}: times as fast as the peer, by tokens", ("ours : peer", *map(str, counts)), tuple(rows),
        f"The peer's median over ours, with its 95 % interval. {LEGEND}.",
    )  # fmt: skip


def scaling(report: Report) -> Table:
    """Threads."""
    rows = tuple(
        (series.shape, series.name, str(series.tokens), judged(one)) for series, one in figures.scaling(report)
    )
    return Table(
        f"From 1 thread to {report.settings.threads}", ("", "ours", "tokens", "times as fast"), rows, f"{LEGEND}."
    )


def steps(report: Report) -> Table:
    """Cliffs."""
    rows = tuple(
        (
            step.shape, step.name, f"{step.before} → {step.before + 1}",
            f"{factor(step.per_token)} {MARKS[step.verdict]} ≤ {figures.STEP_GOAL:g}",
            f"{step.raw_before} → {step.raw_before + 1}", factor(step.raw),
        )
        for step in figures.steps(report)
    )  # fmt: skip
    columns = ("", "", "tokens", "largest step of the time for a token", "tokens", "of the time")
    return Table("Steps between neighbouring token counts", columns, rows, f"{LEGEND}.")


def every(report: Report) -> list[Table]:
    """All tables, the comparisons last, where a reader of a terminal is."""
    found: list[Table] = []
    shapes = figures.shapes_of(report)
    for shape in shapes:
        if not report.settings.sweep:
            found += [details(report, shape, tokens) for tokens in figures.tokens_of(report, shape)]
    found += summary(report)
    return found


def summary(report: Report) -> list[Table]:
    """What is to be read first: comparisons, scaling, steps; those that have rows."""
    found = [scaling(report), steps(report)] if report.settings.sweep else [scaling(report)]
    if not report.settings.sweep:
        found = [*(comparisons(report, shape) for shape in figures.shapes_of(report)), *found]
    return [table for table in found if table.rows]
