"""The plot: milliseconds against tokens, a panel for each shape and number of bits; routers against experts."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cpu import figures
from benchmarks.cpu.result import Report, Series
from benchmarks.cpu.shapes import SHAPES
from benchmarks.dispatch.plots import COLORS, STYLE

WIDTH, HEIGHT = 5.2, 3.9  # inches of a panel
MARKERS = ("o", "s", "^", "v", "D", "x")
DENSE = 9.0  # bits, from which weights are not quantized: shown in every panel of their shape

Panel = tuple[str, str, list[Series]]  # title, label of x, series


def panels(report: Report) -> list[list[Panel]]:
    """Rows of panels."""
    rows: list[list[Panel]] = []
    for shape in figures.shapes_of(report):
        if SHAPES[shape].op == "router":
            continue
        members = [series for series in report.series if series.shape == shape]
        dense = [series for series in members if series.bits > DENSE]
        whole = sorted({int(series.bits) for series in members if series.bits <= DENSE})
        row = [
            (f"{shape}, {bits} bits and scales", "tokens", [s for s in members if int(s.bits) == bits] + dense)
            for bits in whole
        ]
        rows.append(row or [(shape, "tokens", dense)])
    routers = [series for series in report.series if SHAPES[series.shape].op == "router"]
    counts = sorted({series.tokens for series in routers})
    if counts:
        ends = list(dict.fromkeys((counts[0], counts[-1])))
        rows.append([
            (f"router, {n} token{'s' * (n != 1)}", "experts", [s for s in routers if s.tokens == n]) for n in ends
        ])  # fmt: skip
    return rows


def draw(axes: Axes, panel: Panel, colors: dict[str, str]) -> None:
    """One line for each variant with its middle half; both axes grow by factors."""
    title, label, members = panel
    lines: dict[str, list[Series]] = {}
    for series in members:
        lines.setdefault(series.name, []).append(series)
    xs: set[int] = set()
    for index, (name, line) in enumerate(lines.items()):
        color, where = (
            colors[line[0].worker],
            [s.tokens if label == "tokens" else SHAPES[s.shape].experts for s in line],
        )
        xs |= set(where)
        q = [s.quartiles for s in line]
        axes.fill_between(
            where, [1e3 * v.low for v in q], [1e3 * v.high for v in q], color=color, alpha=0.2, linewidth=0
        )
        axes.plot(
            where, [1e3 * v.median for v in q], color=color, marker=MARKERS[index % len(MARKERS)], markersize=4,
            linestyle=":" if line[0].bits > DENSE else "-", linewidth=1.3, label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(xs) if len(xs) <= 8 else [2**i for i in range(12) if min(xs) <= 2**i <= max(xs)]
    axes.xaxis.set_major_locator(FixedLocator([float(x) for x in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    axes.set_title(title)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.legend(frameon=False, fontsize=6.5)


def png(report: Report) -> bytes:
    """All panels in one picture."""
    rows = panels(report)
    names = dict.fromkeys(series.worker for series in report.series)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    wide, high = max((len(row) for row in rows), default=1), max(len(rows), 1)
    with matplotlib.rc_context(STYLE):
        canvas: Any = Canvas(figsize=(WIDTH * wide, HEIGHT * high + 0.5), layout="constrained", dpi=110)
        grid = np.asarray(canvas.subplots(high, wide, squeeze=False))
        for i in range(high):
            for j in range(wide):
                if i < len(rows) and j < len(rows[i]):
                    draw(grid[i, j], rows[i][j], colors)
                else:
                    grid[i, j].set_axis_off()
        machine = " · ".join(report.machine[name] for name in ("machine", "torch") if name in report.machine)
        canvas.suptitle(f"Milliseconds of a call, median and middle half\n{machine}", x=0.01, ha="left", fontsize=10)
        out = io.BytesIO()
        canvas.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()
