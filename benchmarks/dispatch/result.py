"""What the dispatch benchmark measures and reports, as data: settings, series, experiments, the report; and its JSON.

Owns the types and the calling convention. An experiment is a function

    run(settings: Settings, progress: Progress) -> Experiment

that keeps to `settings.seconds` of wall time, calls `progress(fraction, what)` as it goes, and returns even when there
is nothing to measure: then `Experiment.absent` says why, and there are no series. It raises Refused for sizes that
cannot be meant, TimeoutError when the device does not answer within `settings.timeout` seconds; KeyboardInterrupt
passes through. A module lists its experiments in a tuple EXPERIMENTS of Plan; the runner calls them one by one.

A series taken on a fake or an emulator has `emulated=True`. Its numbers are kept for tests, and nothing else: reading
a statistic of it raises NotMeasured, so neither a table nor a plot nor the verdict can present it as a measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import report_json
from benchmarks.dispatch.spread import Interval, Quartiles, bootstrap, quartiles
from benchmarks.report_json import BadReport

#: Called with the part of the experiment that is done, 0 to 1, and a few words on what runs now.
Progress = Callable[[float, str], None]
Fact = str | int | float | bool | None
FORMAT = "metal_marlin dispatch report 1"


class NotMeasured(ValueError):
    """A statistic was asked of a series whose timings come from a fake or an emulator."""


class Refused(ValueError):
    """Settings that cannot be meant or cannot fit; the message says what they would need."""


@dataclass(frozen=True)
class Settings:
    """What was asked for. Sizes are those of one MoE layer, by default the published study's."""

    device: str = "cpu"  # torch device type: "mps", "cuda", "xpu", "cpu"
    repeats: int = 100  # rounds of each comparison at most; time may end it sooner
    seconds: float = 90.0  # wall time; for the whole command, and in run() for that experiment
    timeout: float = 60.0  # seconds to wait for the device before giving up
    threshold: float = 0.15  # improvement, as a fraction, from which pipelining would be worth its complexity
    seed: int = 0
    quick: bool = False  # small sizes, few rounds: to see that everything runs
    batch: int = 128  # tokens
    hidden: int = 4096
    intermediate: int = 14336
    experts: int = 8
    top_k: int = 4
    layers: int = 4
    dtype: str = "bfloat16"  # of activations and dense weights

    @property
    def study_sizes(self) -> bool:
        """Whether the study's milliseconds were taken at these sizes, so that they may stand beside ours."""
        return (self.batch, self.hidden, self.intermediate, self.top_k) == (128, 4096, 14336, 4)


@dataclass(frozen=True)
class Published:
    """What the published study measured on its one Mac, in the unit of the series or figure beside it."""

    value: float
    spread: float | None = None  # as it printed it: +- one standard deviation
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Raw figures of one thing that was measured, one per repeat.

    key      unique within the experiment, stable between versions: compare matches reports by it
    unit     "ms", "us", "bytes"; time is wall time unless a fact says otherwise
    group    series of one group are drawn together; those with equally many samples were taken in turns, so that
             sample i of each comes from round i and differences may be taken round by round
    x        where the series stands in a sweep (such as the number of command buffers), None outside of sweeps; series
             of one group and one name then form a line
    facts    what a reader needs to check the figure: sizes, counts of dispatches
    """

    key: str
    name: str
    unit: str
    samples: tuple[float, ...]
    study: Published | None = None
    group: str = ""
    x: float | None = None
    emulated: bool = False
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(float(sample) for sample in self.samples))
        if not self.samples or not all(math.isfinite(sample) for sample in self.samples):
            raise ValueError(f"series {self.key}: expected finite samples and at least one, got {self.samples[:4]}")

    @property
    def quartiles(self) -> Quartiles:
        """The median and the middle half. NotMeasured: the timings are emulated."""
        return quartiles(self.measured)

    @property
    def median(self) -> float:
        return self.quartiles.median

    @property
    def measured(self) -> tuple[float, ...]:
        """The samples, if they are measurements. NotMeasured: they are emulated."""
        if self.emulated:
            raise NotMeasured(f"{self.key}: timings of a fake or an emulator; they are no measurements")
        return self.samples

    def interval(self, seed: int = 0) -> Interval:
        """The median with its bootstrap interval. NotMeasured: the timings are emulated."""
        return bootstrap(lambda median: median, self.measured, seed=seed)


@dataclass(frozen=True)
class Figure:
    """A number derived from series: what it is, how it came about, and what the study has for it.

    unit  "%" for fractions (value 0.07 prints as 7.0 %), "x" for ratios, otherwise as in Series
    """

    key: str
    name: str
    unit: str
    value: float
    low: float | None = None  # ends of the bootstrap interval, None where there is none
    high: float | None = None
    formula: str = ""
    study: Published | None = None

    @classmethod
    def of(
        cls, key: str, name: str, unit: str, interval: Interval, formula: str, study: Published | None = None
    ) -> Figure:
        return cls(key, name, unit, *interval, formula, study)


@dataclass(frozen=True)
class Experiment:
    """One experiment's outcome, with all the text that a reader needs who knows nothing of it.

    number      "1" to "6" as in the study, "" for what it did not have
    question    one sentence with a question mark
    method      what was run and how it was timed
    arithmetic  how the figures follow from the series, the study's own arithmetic beside it
    reading     how to read the plot
    checks      what was verified before anything was timed: one sentence each
    notes       what the reader must know to judge this run: device, substitutions, what could not be done
    absent      why it did not run, or None
    x_label     what Series.x counts
    """

    key: str
    number: str
    title: str
    question: str
    method: str = ""
    arithmetic: str = ""
    reading: str = ""
    series: tuple[Series, ...] = ()
    figures: tuple[Figure, ...] = ()
    checks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    absent: str | None = None
    x_label: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("series", "figures", "checks", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        keys = [series.key for series in self.series] + [figure.key for figure in self.figures]
        if len(set(keys)) != len(keys):
            raise ValueError(f"experiment {self.key}: two series or figures share a key: {keys}")
        if self.absent is not None and self.series:
            raise ValueError(f"experiment {self.key}: it has series, so it cannot be absent")

    @property
    def emulated(self) -> bool:
        """Whether any of its timings are emulated."""
        return any(series.emulated for series in self.series)

    def measured(self, group: str | None = None) -> tuple[Series, ...]:
        """The series that are measurements, those of one group if it is given."""
        return tuple(s for s in self.series if not s.emulated and (group is None or s.group == group))

    def find(self, key: str) -> Series | None:
        """The series of that key, None if there is none."""
        return next((series for series in self.series if series.key == key), None)


@dataclass(frozen=True)
class Plan:
    """One entry of a module's EXPERIMENTS. `share` is the part of the time budget that it wants, relative to others;
    title and question are shown while it runs and if it never gets to."""

    key: str
    number: str
    title: str
    question: str
    run: Callable[[Settings, Progress], Experiment]
    share: float = 1.0

    def missing(self, reason: str) -> Experiment:
        """The outcome when it did not run."""
        return Experiment(self.key, self.number, self.title, self.question, absent=reason)


@dataclass(frozen=True)
class Verdict:
    """What follows from the measurements. outcome: "worth it", "not worth it", "inconclusive", "not applicable"."""

    outcome: str
    recommendation: str
    threshold: float
    figures: tuple[Figure, ...] = ()
    arithmetic: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", tuple(self.figures))


@dataclass(frozen=True)
class Report:
    """Everything that one run of the command found; what the JSON file holds."""

    settings: Settings
    machine: Mapping[str, str]
    experiments: tuple[Experiment, ...]
    verdict: Verdict
    began: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    interrupted: bool = False

    def find(self, key: str) -> Experiment | None:
        """The experiment of that key, None if there is none."""
        return next((experiment for experiment in self.experiments if experiment.key == key), None)

    def to_json(self) -> str:
        """The whole report. `Report.from_json` gives back an equal one."""
        return report_json.dumps(FORMAT, dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """BadReport: not JSON, not a report, another version's, or a field missing or unknown."""
        data = report_json.loads(FORMAT, text)
        try:
            data["settings"] = Settings(**data["settings"])
            data["verdict"] = _verdict(data["verdict"])
            data["experiments"] = tuple(_experiment(item) for item in data["experiments"])
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadReport(f"a damaged report: {error}") from None


def _published(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "study": None if item.get("study") is None else Published(**item["study"])}


def _figures(items: list[dict[str, Any]]) -> tuple[Figure, ...]:
    return tuple(Figure(**_published(item)) for item in items)


def _verdict(data: dict[str, Any]) -> Verdict:
    return Verdict(**{**data, "figures": _figures(data["figures"])})


def _experiment(data: dict[str, Any]) -> Experiment:
    series = tuple(Series(**_published(item)) for item in data["series"])
    return Experiment(**{**data, "series": series, "figures": _figures(data["figures"])})
