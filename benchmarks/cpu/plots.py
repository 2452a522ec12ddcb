"""The plot: milliseconds against tokens, a panel for each shape and number of bits; routers against experts."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.cpu import figures
from benchmarks.cpu.figures import ALONE
from benchmarks.cpu.result import Report, Series
from benchmarks.cpu.shapes import SHAPES
from benchmarks.dispatch.plots import STYLE

WIDTH, HEIGHT = 6.4, 4.6  # inches of a panel
COLORS = ("#d1605e", "#3f8fd2", "#8c4a2f", "#e0872b", "#2fa37c", "#b06fc9", "#c9a227", "#666666", "#e0559a", "#20808c")
MARKERS = ("o", "s", "^", "v", "D", "x")
DENSE = 9.0  # bits, from which weights are not quantized: shown in every panel of their shape

Panel = tuple[str, str, list[Series]]  # title, label of x, series


def nearest(bits: float, rates: list[int]) -> int:
    """The highest rate that takes no more bits, or the lowest there is."""
    return max((rate for rate in rates if rate <= bits), default=min(rates))


def panels(report: Report) -> list[list[Panel]]:
    """Rows of panels."""
    rows: list[list[Panel]] = []
    for shape in figures.shapes_of(report):
        if SHAPES[shape].op == "router":
            continue
        members = [s for s in report.series if s.shape == shape and not s.worker.endswith(ALONE)]
        dense = [series for series in members if series.bits > DENSE]
        # those of others go where ours have as many bits, or one less: five bits of which one is scales beside our four
        rates = sorted({int(s.bits) for s in members if report.contender(s.worker).ours}) or [
            *sorted({int(s.bits) for s in members if s.bits <= DENSE})
        ]
        packed = [s for s in members if s.bits <= DENSE]
        row = [
            (
                f"{shape}, {rate} bits and scales",
                "tokens",
                [s for s in packed if nearest(s.bits, rates) == rate] + dense,
            )
            for rate in rates
        ]
        rows.append(row or [(shape, "tokens", dense)])
    routers = [s for s in report.series if SHAPES[s.shape].op == "router" and not s.worker.endswith(ALONE)]
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
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    axes.set_title(title)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.legend(frameon=False, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)


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
        machine = report.machine.get("machine", "")
        canvas.suptitle(f"Milliseconds of a call, median and middle half\n{machine}", x=0.01, ha="left", fontsize=10)
        out = io.BytesIO()
        canvas.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()
