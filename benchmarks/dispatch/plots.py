"""The plots, through matplotlib: as SVG for the page, in the page's own text colour, and all of them in one PNG.

Owns how a series looks. Dots are runs, the bar is the middle half, the stroke the median; a diamond is the study's
figure. Emulated series are not drawn.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from benchmarks.dispatch import verdict, wording
from benchmarks.dispatch.result import Experiment, Report, Series, Verdict

INK = "#123456"  # replaced by the page's text colour in SVG
COLORS = ("#3f8fd2", "#e0872b", "#2fa37c", "#b06fc9", "#c9a227", "#d1605e")
STUDY = "#e0559a"
WIDTH = 8.0  # inches
FAR = 1.6  # a study figure further off than so many times our range is written at the edge, not drawn to scale
MOST_DOTS = 80

Draw = Callable[[Axes], None]
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10.0, "axes.titlesize": 10.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.titlelocation": "left",
}  # fmt: skip


def _number(value: float) -> str:
    """A tick or a label: no trailing zeros."""
    text = wording.number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def parts(experiment: Experiment) -> list[tuple[str, float, Draw]]:
    """(title, height in inches, how to draw) of an experiment's plots, one for each group of series."""
    groups: dict[str, list[Series]] = {}
    for series in experiment.measured():
        groups.setdefault(series.group, []).append(series)
    found: list[tuple[str, float, Draw]] = []
    for members in groups.values():
        title = str(members[0].facts.get("workload", ""))
        if any(series.x is not None for series in members):
            found.append(("", 3.2, _sweep_drawer(members, experiment.x_label)))
        else:
            found.append((title, 0.75 + 0.42 * len(members), _strip_drawer(members)))
    return found


def _strip_drawer(members: list[Series]) -> Draw:
    return lambda axes: strips(axes, members)


def _sweep_drawer(members: list[Series], x_label: str) -> Draw:
    return lambda axes: lines(axes, members, x_label)


def strips(axes: Axes, members: list[Series]) -> None:
    """One row for each series: dots, middle half, median, the study's diamond."""
    jitter = np.random.default_rng(0)
    high = max(max(s.quartiles.high + 2.5 * (s.quartiles.high - s.quartiles.low), s.median * 1.02) for s in members)
    low = min(min(s.samples) for s in members)
    low = 0.0 if low < 0.6 * high else low - 0.15 * (high - low)  # from zero, unless all differences would vanish
    inside = [s.study.value for s in members if s.study and s.study.value <= FAR * high]
    right = max([high, *inside]) * (1.0 if low else 1.04) + (0.02 * (high - low) if low else 0.0)
    left = min([low, *(value * 0.97 for value in inside)]) if low else 0.0
    for row, series in enumerate(members):
        color, q = COLORS[row % len(COLORS)], series.quartiles
        shown = [v for v in series.samples if v <= right][:MOST_DOTS]
        axes.scatter(shown, row + jitter.uniform(-0.2, 0.2, len(shown)), s=9, color=color, alpha=0.45, linewidths=0)
        axes.barh(row, max(q.high - q.low, 1e-12), left=q.low, height=0.56, color=color, alpha=0.35)
        axes.plot([q.median, q.median], [row - 0.36, row + 0.36], color=color, linewidth=2.2, solid_capstyle="butt")
        beyond = [v for v in series.samples if v > right]
        words = f"median {wording.with_unit(q.median, series.unit)}"
        if beyond:
            words += f"; {len(beyond)} slower, up to {_number(max(beyond))}"
        if series.study and series.study.value > right:
            words += f"; study {wording.with_unit(series.study.value, series.unit)} ▸"
        elif series.study:
            axes.scatter([series.study.value], [row], marker="D", s=34, color=STUDY, zorder=5)
        axes.text(
            1.0, row - 0.4, words, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8, color=INK
        )
    axes.set_yticks(range(len(members)), [series.name for series in members])
    axes.set_ylim(len(members) - 0.5, -0.75)
    axes.set_xlim(left, right)
    axes.set_xlabel(
        wording.UNITS.get(members[0].unit, members[0].unit) + ("" if not left else "  (the axis does not begin at 0)")
    )
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)


def lines(axes: Axes, members: list[Series], x_label: str) -> None:
    """One line for each name over x, the middle half as a band; both axes grow by factors."""
    names = list(dict.fromkeys(series.name for series in members))
    xs = sorted({float(series.x) for series in members if series.x is not None})
    for index, name in enumerate(names):
        color = COLORS[index % len(COLORS)]
        line = sorted((s for s in members if s.name == name and s.x is not None), key=lambda s: s.x or 0.0)
        where, q = [float(s.x or 0) for s in line], [s.quartiles for s in line]
        marker = "o" if len(line) > 1 else "s"
        axes.fill_between(where, [v.low for v in q], [v.high for v in q], color=color, alpha=0.22, linewidth=0)
        style = ("-", "--", "-.", ":")[index % 4]  # lines that lie on each other, and readers who see no colours
        axes.plot(where, [v.median for v in q], color=color, marker=marker, markersize=5, linestyle=style, label=name)
        studied = [(x, s.study.value) for x, s in zip(where, line, strict=True) if s.study]
        if studied:
            axes.scatter(
                [x for x, _ in studied],
                [value for _, value in studied],
                marker="D",
                s=44,
                facecolors="none",
                edgecolors=STUDY,
                linewidths=1.6,
                zorder=5,
            )
    if min(min(s.samples) for s in members) > 0:
        axes.set_yscale("log")
    if xs and xs[0] > 0:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log" and high / low < 1000:
        steps = (1.0, 2.0, 5.0) if high / low > 10 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
        axes.yaxis.set_major_locator(FixedLocator([10.0**e * step for e in range(-6, 9) for step in steps]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(wording.UNITS.get(members[0].unit, members[0].unit))
    axes.grid(color=INK, alpha=0.15, linewidth=0.8)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0
    )


def summary(axes: Axes, found: Verdict) -> None:
    """The improvement of every workload with its interval, and the threshold."""
    shown = [figure for figure in found.figures if figure.key.endswith("_of_batch")]
    for row, figure in enumerate(shown):
        color = COLORS[0] if figure.key.startswith(verdict.DECIDING) else COLORS[3]
        low, high = (
            (figure.low, figure.high) if figure.low is not None and figure.high is not None else (figure.value,) * 2
        )
        axes.plot([100 * low, 100 * high], [row, row], color=color, linewidth=6, alpha=0.4, solid_capstyle="butt")
        axes.scatter([100 * figure.value], [row], s=36, color=color, zorder=4)
        words = f"{wording.with_unit(figure.value, '%')}  ({wording.interval(figure)})"
        axes.text(1.0, row - 0.28, words, transform=axes.get_yaxis_transform(), ha="right", fontsize=8, color=INK)
    axes.axvline(100 * found.threshold, color=STUDY, linewidth=1.4, linestyle="--")
    axes.text(100 * found.threshold, -0.8, f" threshold {found.threshold:.0%}", color=STUDY, fontsize=8, va="bottom")
    axes.axvline(0, color=INK, alpha=0.5, linewidth=0.8)
    names = [figure.name.split(",")[0] + (" (decides)" if i == 0 else "") for i, figure in enumerate(shown)]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.5, -0.8)
    axes.set_xlabel("time that waiting after every op adds, % of the batch time")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)


def _ink(axes: Axes, color: str) -> None:
    axes.tick_params(colors=color, labelcolor=color)
    for spine in axes.spines.values():
        spine.set_edgecolor(color)
    legend = axes.get_legend()
    named = legend.get_texts() if legend else []
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts, *named):
        if to_hex(text.get_color()) in ("#000000", INK):
            text.set_color(color)


def _svg(name: str, height: float, draw: Draw) -> str:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        _ink(axes, INK)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<svg height="[^"]*"|<svg ', "<svg ", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # ids are the page's, not the picture's: two plots must not share one
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def svgs(experiment: Experiment) -> list[tuple[str, str]]:
    """(title, SVG) of an experiment's plots."""
    return [
        (title, _svg(f"{experiment.key}{index}", height, draw))
        for index, (title, height, draw) in enumerate(parts(experiment))
    ]


def summary_svg(found: Verdict) -> str:
    """The verdict's plot, "" without figures."""
    rows = len(found.figures) // 2
    return _svg("verdict", 0.9 + 0.42 * rows, lambda axes: summary(axes, found)) if rows else ""


def png(report: Report) -> bytes:
    """All plots in one picture."""
    drawn: list[tuple[str, float, Draw]] = []

    def summarise(axes: Axes) -> None:
        summary(axes, report.verdict)

    if report.verdict.figures:
        title = f"Verdict: {wording.HEADLINES[report.verdict.outcome].lower()}"
        drawn.append((title, 1.5 + 0.42 * len(report.verdict.figures) / 2, summarise))
    for experiment in report.experiments:
        for title, height, draw in parts(experiment):
            name = "\n".join([wording.heading(experiment), *textwrap.wrap(title, 78)])
            drawn.append((name, height + 0.6 + 0.3 * bool(title), draw))
    if not drawn:
        drawn.append(("Nothing was measured", 1.0, lambda axes: axes.set_axis_off()))
    heights = [height for _, height, _ in drawn]
    with matplotlib.rc_context(STYLE):
        canvas: Any = Canvas(figsize=(WIDTH + 1.5, sum(heights) + 1.0), layout="constrained", dpi=110)
        canvas.get_layout_engine().set(hspace=0.02, h_pad=0.12)
        machine = report.machine
        line = " · ".join(machine[name] for name in ("device", "machine") if name in machine)
        line += f" · torch {machine.get('torch', 'unknown')}"
        canvas.suptitle(f"{wording.TITLE}\n{line}", x=0.01, ha="left", fontsize=11)
        grid = np.atleast_1d(canvas.subplots(len(drawn), 1, height_ratios=heights))
        for axes, (title, _, draw) in zip(grid, drawn, strict=True):
            draw(axes)
            _ink(axes, "#222222")
            legend = axes.get_legend()
            rows = (len(legend.get_texts()) + 1) // 2 if legend else 0
            above = 16 if draw is summarise else 15 * rows
            axes.set_title(title, pad=8 + above, fontweight="bold" if "\n" not in title else "normal")
        out = io.BytesIO()
        canvas.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()
