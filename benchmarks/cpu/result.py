"""What a run of `python -m benchmarks cpu` found, as data, and its JSON. Owns the types; figures.py reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import report_json
from benchmarks.dispatch.spread import Quartiles, quartiles
from benchmarks.report_json import BadReport

FORMAT = "metal_marlin cpu report 1"


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    ops: tuple[str, ...] = ("moe", "linear", "router")
    shapes: tuple[str, ...] = ()  # () is all of the ops'
    tokens: tuple[int, ...] = (1, 4, 16, 128, 512)
    bits: tuple[float, ...] = (2.0, 3.0, 4.0)
    codebooks: tuple[str, ...] = ("mul1", "mcg", "3inst")
    levels: tuple[str, ...] = ()  # () is what command.py picks
    peers: tuple[str, ...] = ()
    threads: int = 2
    rounds: int = 30  # at most; time may end it sooner
    seconds: float = 30.0  # for one shape and token count
    slice: float = 0.02  # seconds of one turn
    slowest: float = 20.0  # seconds of a call, from which a contender is left out
    timeout: float = 300.0  # seconds to wait for an answer
    cold_bytes: int = 2**28
    memory: float = 0.8  # part of the free memory that weights may take
    seed: int = 0
    spin: bool = False
    scaling: bool = False
    sweep: bool = False
    match: str = ""
    baseline: str = ""


@dataclass(frozen=True)
class Series:
    """One contender's variant at one shape and token count.

    worker   who: the key of Report.contenders
    samples  seconds of a call, the median of one turn's; sample i is of round i for all series of a heat
    bytes    of weights that a call had to read, the mean over its routings
    delayed  part of the turns in which its threads waited for a processor, over 1 % of the time, that others used
    error    relative error of the small layer that was checked before
    """

    shape: str
    tokens: int
    worker: str
    variant: str
    family: str
    bits: float
    samples: tuple[float, ...]
    bytes: float
    flops: float
    delayed: float = 0.0
    error: float = 0.0
    copies: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(float(sample) for sample in self.samples))
        if not self.samples or not all(math.isfinite(sample) and sample > 0 for sample in self.samples):
            raise ValueError(f"{self.worker} {self.variant}: expected positive samples, got {self.samples[:4]}")

    @property
    def name(self) -> str:
        """Who and what, as tables have it."""
        return f"{self.worker.replace(':', ' ')}, {self.variant}"

    @property
    def quartiles(self) -> Quartiles:
        """Seconds."""
        return quartiles(self.samples)

    @property
    def median(self) -> float:
        """Seconds."""
        return self.quartiles.median


@dataclass(frozen=True)
class Contestant:
    """A worker that took part: its library's versions, its threads."""

    name: str
    title: str
    threads: int
    facts: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    default: bool = False  # ours: the level that runs without being asked for


@dataclass(frozen=True)
class Absence:
    """A peer that did not take part, and what would make it."""

    name: str
    why: str
    install: str


@dataclass(frozen=True)
class Report:
    """Everything that one run found. excluded: sentences on variants and workers that were dropped, and why."""

    settings: Settings
    machine: Mapping[str, str]
    contenders: tuple[Contestant, ...]
    absent: tuple[Absence, ...]
    excluded: tuple[str, ...]
    series: tuple[Series, ...]
    yardstick: Mapping[str, float] = field(default_factory=dict)
    yardstick_after: Mapping[str, float] = field(default_factory=dict)
    began: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    interrupted: bool = False

    def contender(self, name: str) -> Contestant:
        """KeyError: none of that name."""
        return next(c for c in self.contenders if c.name == name)

    def to_json(self) -> str:
        """The whole report. `Report.from_json` gives back an equal one."""
        return report_json.dumps(FORMAT, dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """BadReport: not JSON, not a report, another version's, or a field missing or unknown."""
        data = report_json.loads(FORMAT, text)
        try:
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["settings"].items()}
            data["settings"] = Settings(**settings)
            for name, kind in (("contenders", Contestant), ("absent", Absence), ("series", Series)):
                data[name] = tuple(kind(**item) for item in data[name])
            data["excluded"] = tuple(data["excluded"])
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadReport(f"a damaged report: {error}") from None
