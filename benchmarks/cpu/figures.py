"""What follows from a run: ratios with their intervals, bandwidth, shares, scaling, steps, and the comparisons that the
project is measured by. Everything is a function of a Report.

A ratio is always "how many times as fast as the other we are": the other's time over ours, over 1 where we are faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cpu.result import Report, Series
from benchmarks.cpu.shapes import SHAPES
from benchmarks.dispatch.spread import Interval, bootstrap

SCALING_GOAL, STEP_GOAL = 1.8, 1.3
DEFAULT_CODEBOOK = "mul1"
ALONE = ":1 thread"  # ends the name of our worker that has one thread


def ratio(other: Series, ours: Series, seed: int = 0) -> Interval:
    """The other's median over ours. Rounds are paired; of a series that ended early, those that both have."""
    count = min(len(other.samples), len(ours.samples))
    return bootstrap(lambda a, b: a / b, other.samples[:count], ours.samples[:count], seed=seed)


def at(report: Report, shape: str, tokens: int) -> list[Series]:
    """The series of one heat, in the order of the contenders."""
    return [series for series in report.series if (series.shape, series.tokens) == (shape, tokens)]


def shapes_of(report: Report) -> list[str]:
    """The shapes that occur, in their order."""
    return [key for key in SHAPES if any(series.shape == key for series in report.series)]


def tokens_of(report: Report, shape: str) -> list[int]:
    """The token counts that occur for it, ascending."""
    return sorted({series.tokens for series in report.series if series.shape == shape})


def _ours(report: Report, series: Series) -> bool:
    return report.contender(series.worker).default


def rate_of(series: Series) -> float:
    """Our variants' rate: the number in "mul1 2.5"."""
    return float(series.variant.split()[1]) if " " in series.variant else 32.0


def baseline(report: Report, series: Series) -> Series | None:
    """What a series is held against: the one that --baseline names, or ours as a user has it, with the default codebook
    at the highest rate that takes no more bits. None: it was not measured."""
    heat = at(report, series.shape, series.tokens)
    if report.settings.baseline:
        return next((x for x in heat if report.settings.baseline in x.name), None)
    ours = [x for x in heat if _ours(report, x) and x.family in (DEFAULT_CODEBOOK, "router")]
    if not ours:
        return None
    if report.contender(series.worker).ours and series.family != "router":
        fitting = [x for x in ours if rate_of(x) <= rate_of(series)]
    else:
        fitting = [x for x in ours if rate_of(x) <= series.bits]
    return max(fitting, key=rate_of) if fitting else min(ours, key=rate_of)


@dataclass(frozen=True)
class Row:
    """One series and what a table says of it."""

    series: Series
    against: Series | None
    ratio: Interval | None  # the series' time over the baseline's
    bytes_per_second: float
    flops_per_second: float
    of_copy: float | None
    of_peak: float | None


def row(report: Report, series: Series) -> Row:
    """Rates at the median; shares of what the machine did before the run."""
    against = baseline(report, series)
    rate, flops = series.bytes / series.median, series.flops / series.median
    copy, peak = report.yardstick.get("copy"), report.yardstick.get("peak")
    own = against is series
    return Row(
        series, against, None if against is None or own else ratio(series, against, report.settings.seed), rate, flops,
        rate / copy if copy else None, flops / peak if peak else None,
    )  # fmt: skip


# ---- the comparisons ----


@dataclass(frozen=True)
class Comparison:
    """Ours, by codebook and rate, against the fastest of a peer's variants at each token count. goals: how many times
    as fast we mean to be, by token count; 0 is any other."""

    title: str
    op: str
    codebook: str
    rate: float
    peer: str
    variants: Callable[[Series], bool]
    goals: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A comparison at one token count. peer: the name of the variant that was fastest."""

    ratio: Interval
    peer: str
    goal: float | None

    @property
    def verdict(self) -> str:
        """Whether the goal is met: by the whole interval, by its value alone, or not."""
        if self.goal is None:
            return ""
        if self.ratio.low >= self.goal:
            return "met"
        return "about" if self.ratio.value >= self.goal else "missed"


def named(*names: str) -> Callable[[Series], bool]:
    """Those variants."""
    return lambda series: series.variant in names


def comparisons() -> list[Comparison]:
    """Those that the project's goals speak of, at about equal bits."""
    found: list[Comparison] = []
    for rate in (2, 3, 4):
        kt = f"IQ{rate}_KT"
        for codebook, goal in (("mul1", 2.0), ("mcg", 1.2), ("3inst", 1.2)):
            title = f"{codebook} {rate} : ik {kt}"
            found.append(Comparison(title, "moe", codebook, rate, "ik", named(kt), {1: goal}))
    scalar = {1: 1 / 1.3}
    found += [
        Comparison("mul1 2 : ik Q2_K", "moe", "mul1", 2, "ik", named("Q2_K", "Q2_K_R4"), scalar),
        Comparison("mul1 2 : ggml Q2_K", "moe", "mul1", 2, "ggml", named("Q2_K", "Q2_K repacked"), scalar),
        Comparison("mul1 2 : QMoE int2", "moe", "mul1", 2, "onnxruntime", named("QMoE int2 b128"), scalar),
        Comparison("mul1 4 : ik Q4_K", "moe", "mul1", 4, "ik", named("Q4_K", "Q4_K_R4", "IQ4_KS")),
        Comparison("mul1 4 : QMoE int4", "moe", "mul1", 4, "onnxruntime", named("QMoE int4 b128", "QMoE int4 b32")),
    ]
    for rate in (2, 3, 4):
        best = f"mul1 {rate} : ik's fastest"
        found.append(Comparison(best, "moe", "mul1", rate, "ik", lambda series: True, {128: 1.0, 512: 1.0}))
        goals = {1: 8.0, 128: 1.2, 512: 1.2}
        grouped = f"mul1 {rate} : grouped_mm bf16"
        found.append(Comparison(grouped, "moe", "mul1", rate, "transformers", named("grouped_mm bf16"), goals))
        for dtype in ("bf16", "f32"):
            title = f"mul1 {rate} : torch {dtype}"
            found.append(Comparison(title, "linear", "mul1", rate, "torch", named(f"linear {dtype}")))
    found.append(Comparison("router : torch f32", "router", "router", 32, "torch", named("ops f32"), {0: 1.0}))
    return found


def outcome(report: Report, comparison: Comparison, shape: str, tokens: int) -> Outcome | None:
    """None: one of the two was not measured there."""
    heat = at(report, shape, tokens)
    ours = next(
        (s for s in heat if _ours(report, s) and s.family == comparison.codebook and rate_of(s) == comparison.rate),
        None,
    )
    peers = [s for s in heat if s.worker == comparison.peer and comparison.variants(s)]
    if ours is None or not peers:
        return None
    best = min(peers, key=lambda s: s.median)
    goal = comparison.goals.get(tokens, comparison.goals.get(0))
    return Outcome(ratio(best, ours, report.settings.seed), best.variant, goal)


def compared(report: Report, shape: str) -> list[tuple[Comparison, dict[int, Outcome]]]:
    """Every comparison that this shape has something for."""
    found = []
    for comparison in comparisons():
        if comparison.op == SHAPES[shape].op:
            each = {tokens: outcome(report, comparison, shape, tokens) for tokens in tokens_of(report, shape)}
            here = {tokens: one for tokens, one in each.items() if one is not None}
            if here:
                found.append((comparison, here))
    return found


# ---- threads and token counts ----


def scaling(report: Report) -> list[tuple[Series, Outcome]]:
    """Our default level: how many times as fast as with one thread."""
    found = []
    alone = {(s.shape, s.tokens, s.variant): s for s in report.series if s.worker.endswith(ALONE)}
    for series in report.series:
        one = alone.get((series.shape, series.tokens, series.variant))
        if one is not None and _ours(report, series):
            found.append((series, Outcome(ratio(one, series, report.settings.seed), one.worker, SCALING_GOAL)))
    return found


@dataclass(frozen=True)
class Step:
    """The largest step between neighbouring token counts: of the time for a token, which a cliff raises and more work
    does not, and of the time itself, which doubles from one token to two for whoever does twice the work."""

    name: str
    shape: str
    before: int
    per_token: Interval
    raw_before: int
    raw: Interval

    @property
    def verdict(self) -> str:
        """ "met" if it is no cliff."""
        if self.per_token.high <= STEP_GOAL:
            return "met"
        return "about" if self.per_token.value <= STEP_GOAL else "missed"


def steps(report: Report) -> list[Step]:
    """For everything that was measured at neighbouring counts."""
    found = []
    for shape in shapes_of(report):
        for worker, variant in dict.fromkeys((s.worker, s.variant) for s in report.series if s.shape == shape):
            line = {s.tokens: s for s in report.series if (s.shape, s.worker, s.variant) == (shape, worker, variant)}
            pairs = [(line[t], line[t + 1]) for t in sorted(line) if t + 1 in line]
            if pairs:
                grown = {a.tokens: b.median / a.median for a, b in pairs}
                cliff, tallest = (
                    max(pairs, key=lambda p: grown[p[0].tokens] * p[0].tokens / p[1].tokens),
                    max(pairs, key=lambda p: grown[p[0].tokens]),
                )
                whole = ratio(cliff[1], cliff[0], report.settings.seed)
                each = Interval(*(value * cliff[0].tokens / cliff[1].tokens for value in whole))
                raw = ratio(tallest[1], tallest[0], report.settings.seed)
                found.append(Step(cliff[0].name, shape, cliff[0].tokens, each, tallest[0].tokens, raw))
    return found
