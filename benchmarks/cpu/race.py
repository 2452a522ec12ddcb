"""The measuring: who is there, whose results are right, what fits into memory, and rounds of turns.

In a round every contender has one turn, in an order drawn anew, so that clocks, heat and neighbours drift for all
alike; only one process computes at a time. Who fails, dies, hangs or is too slow leaves the run with a sentence on why.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu.processes import Failed, Gone, Missing, Worker
from benchmarks.cpu.result import Absence, Contestant, Series, Settings
from benchmarks.cpu.roster import ENTRIES, OURS
from benchmarks.cpu.shapes import SHAPES, Shape
from benchmarks.dispatch.device import host_free_bytes

FEWEST = 5  # rounds, whatever the time: less has no quartiles worth printing
DISTURBED = 0.01  # of a turn's time, waited for a processor

Say = Callable[[str], None]


@dataclass
class Lane:
    """A worker that runs, and what of it is still in the race."""

    contestant: Contestant
    worker: Worker
    offered: dict[str, dict[str, Any]] = field(default_factory=dict)  # variant: its fields, of the op at hand
    errors: dict[str, float] = field(default_factory=dict)  # of those whose results are right
    built: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.contestant.name


@dataclass
class Cell:
    """One variant at one token count, and its samples so far."""

    lane: Lane
    variant: str
    tokens: int
    samples: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    disturbed: int = 0
    out: bool = False

    @property
    def title(self) -> str:
        return f"{self.lane.name}, {self.variant}"


class Race:
    """One run. `series`, `absent` and `excluded` fill as it goes, so that an interrupted one has something to show."""

    def __init__(self, settings: Settings, say: Say = lambda text: None) -> None:
        self.settings, self.say = settings, say
        self.lanes: list[Lane] = []
        self.contestants: list[Contestant] = []
        self.absent: list[Absence] = []
        self.excluded: list[str] = []
        self.series: list[Series] = []

    # ---- who is there ----

    def start(self, wanted: Sequence[tuple[str, Contestant, Worker]]) -> None:
        """Waits for workers that were started together: (entry's name, who, process)."""
        for entry, contestant, worker in wanted:
            try:
                worker.greet()
            except Missing as missing:
                self.absence(entry, str(missing))
                continue
            except Gone as gone:
                self.absence(entry, f"its worker {gone}")
                continue
            known = Contestant(**{**vars(contestant), "facts": worker.facts})
            self.lanes.append(Lane(known, worker))
            self.contestants.append(known)

    def absence(self, entry: str, why: str) -> None:
        """Notes that a peer is not here."""
        self.absent.append(Absence(entry, why, ENTRIES[entry].install if entry in ENTRIES else ""))
        self.say(f"{entry} is absent: {why}")

    def exclude(self, sentence: str) -> None:
        """Keeps it for the report, and says it now."""
        self.excluded.append(sentence)
        self.say(sentence)

    def close(self) -> None:
        """Ends every worker."""
        for lane in self.lanes:
            lane.worker.close()
        self.lanes.clear()

    def _ask_all(self, do: str, seconds: float, arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The same request to several workers at once, and their answers; those that don't answer leave."""
        sent, found = [], {}
        for lane in list(self.lanes):
            if lane.name in arguments:
                try:
                    lane.worker.send(do, **arguments[lane.name])
                    sent.append(lane)
                except Gone as gone:
                    self._leaves(lane, str(gone))
        for lane in sent:
            try:
                found[lane.name] = lane.worker.receive(do, seconds)
            except Gone as gone:
                self._leaves(lane, str(gone))
            except Failed as failed:
                self.exclude(f"{lane.name} left out: {do} failed: {failed}")
        return found

    def _leaves(self, lane: Lane, why: str) -> None:
        self.exclude(f"{lane.name} left the run: its worker {why}")
        self.lanes = [other for other in self.lanes if other is not lane]

    # ---- whose results are right ----

    def wanted(self, lane: Lane, offered: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The variants that the settings ask for: rates and codebooks of ours; peers' as they are."""
        chosen = {}
        for variant in offered:
            known = variant["family"] in self.settings.codebooks and variant["bits"] in self.settings.bits
            if lane.contestant.ours and variant["family"] != "router" and not known:
                continue
            if re.search(self.settings.match, f"{lane.name}, {variant['name']}"):
                chosen[variant["name"]] = variant
        return chosen

    def check(self, op: str) -> None:
        """Every variant computes the small layer; what is wrong is excluded before anything is timed."""
        offers = self._ask_all("variants", self.settings.timeout, {lane.name: {"op": op} for lane in self.lanes})
        for lane in self.lanes:
            lane.offered = self.wanted(lane, offers.get(lane.name, []))
            lane.errors = {}
        requests = {lane.name: {"op": op, "variants": list(lane.offered)} for lane in self.lanes if lane.offered}
        answers = self._ask_all("check", self.settings.timeout, requests)
        for lane in self.lanes:
            for name, found in answers.get(lane.name, {}).items():
                if "failed" in found:
                    self.exclude(f"{lane.name}, {name} left out of {op}: {found['failed']}")
                elif not found["error"] <= found["limit"]:
                    self.exclude(
                        f"{lane.name}, {name} left out of {op}: its result is off by {found['error']:.2g} of its size;"
                        f" expected at most {found['limit']:.2g}"
                    )
                else:
                    lane.errors[name] = found["error"]

    # ---- what fits ----

    def build(self, shape: Shape) -> None:
        """Weights of that shape in every worker, as far as memory goes: the largest are left out first."""
        s = self.settings
        arguments: dict[str, dict[str, Any]] = {
            lane.name: {"shape": shape.key, "variants": list(lane.errors), "cold_bytes": s.cold_bytes}
            for lane in self.lanes
            if lane.errors
        }
        for lane in self.lanes:
            lane.built = {}
        needs = self._ask_all("needs", s.timeout, arguments)
        free = host_free_bytes()
        room = s.memory * free if free else float("inf")
        while True:
            sizes = {(lane, v): size for lane, found in needs.items() for v, size in found["each"].items()}
            total = sum(sizes.values()) + sum(found["shared"] for found in needs.values())
            if total <= room or not any(sizes.values()):
                break
            name, variant = max(sizes, key=lambda key: sizes[key])
            arguments[name]["variants"].remove(variant)
            self.exclude(
                f"{name}, {variant} left out of {shape.key}: its weights take {sizes[name, variant] / 2**30:.1f} GiB,"
                f" and all together may take {room / 2**30:.1f} GiB"
            )
            # what it shared with another form now counts for that one
            again = self._ask_all("needs", s.timeout, {name: arguments[name]})
            if name not in again:
                break
            needs[name] = again[name]
        answers = self._ask_all("build", s.timeout, arguments)
        for lane in self.lanes:
            for variant, found in answers.get(lane.name, {}).items():
                if "failed" in found:
                    self.exclude(f"{lane.name}, {variant} left out of {shape.key}: {found['failed']}")
                else:
                    lane.built[variant] = found

    # ---- rounds ----

    def run(self, progress: Callable[[float, str], None] = lambda fraction, what: None) -> None:
        """Everything: ops, their shapes, their token counts."""
        s = self.settings
        plan = [SHAPES[key] for key in (s.shapes or SHAPES) if SHAPES[key].op in s.ops]
        checked = ""
        for index, shape in enumerate(plan):
            if shape.op != checked:
                progress(index / len(plan), f"checking {shape.op}")
                self.check(shape.op)
                checked = shape.op
            progress(index / len(plan), f"{shape.key}: weights")
            self.build(shape)
            heats = [s.tokens] if s.sweep else [(tokens,) for tokens in s.tokens]
            for number, tokens in enumerate(heats):
                done = (index + number / len(heats)) / len(plan)
                what = f"{shape.key}, {tokens[0]} tokens" if len(tokens) == 1 else f"{shape.key}, sweep"
                progress(done, what)
                self.heat(shape, tokens)
        self._ask_all("drop", s.timeout, {lane.name: {} for lane in self.lanes})

    def heat(self, shape: Shape, tokens: Sequence[int]) -> None:
        """Rounds over every variant that is built at these token counts."""
        s = self.settings
        cells = [
            Cell(lane, v, t)
            for lane in self.lanes
            for v in lane.built
            for t in tokens
            if not self._slow(shape, lane, v, t)
        ]
        order = random.Random(s.seed)
        began = time.monotonic()
        try:
            for done in range(max(s.rounds, FEWEST)):
                if done >= FEWEST and time.monotonic() - began >= s.seconds:
                    break
                for cell in order.sample(cells, len(cells)):
                    if not cell.out:
                        self._turn(cell, cells, [s.seed, done, cell.tokens])
        finally:
            for cell in cells:
                if cell.samples and not cell.out:
                    self._keep(shape, cell)

    def _turn(self, cell: Cell, cells: list[Cell], seed: list[int]) -> None:
        s = self.settings
        try:
            answer = cell.lane.worker.ask(
                "turn", s.timeout, variant=cell.variant, tokens=cell.tokens, seed=seed, seconds=s.slice, warm=True
            )
        except Gone as gone:
            self._leaves(cell.lane, str(gone))
            for other in cells:
                other.out = other.out or other.lane is cell.lane
            return
        except Failed as failed:
            self.exclude(f"{cell.title} left out at {cell.tokens} tokens: {failed}")
            cell.out = True
            return
        took = statistics.median(answer["seconds"])
        cell.samples.append(took)
        cell.read.append(answer["bytes"])
        cell.disturbed += answer["delayed"] > DISTURBED
        if took > s.slowest:
            self.exclude(f"{cell.title} left out at {cell.tokens} tokens: one call took {took:.0f} s")
            cell.out = True

    def _slow(self, shape: Shape, lane: Lane, variant: str, tokens: int) -> bool:
        """Whether a call would take too long, by what fewer tokens took."""
        before = [x for x in self.series if (x.shape, x.worker, x.variant) == (shape.key, lane.name, variant)]
        if self.settings.sweep or not before:
            return False
        last = max(before, key=lambda x: x.tokens)
        expected = last.median * min(tokens / last.tokens, 1e9)
        if expected <= self.settings.slowest or last.tokens < 4:  # few tokens touch few experts: no guide to many
            return False
        self.exclude(
            f"{lane.name}, {variant} left out of {shape.key} at {tokens} tokens: a call would take {expected:.0f} s"
        )
        return True

    def _keep(self, shape: Shape, cell: Cell) -> None:
        lane, built = cell.lane, cell.lane.built[cell.variant]
        offered = lane.offered[cell.variant]
        self.series.append(
            Series(
                shape.key, cell.tokens, lane.name, cell.variant, offered["family"], built["bits"], tuple(cell.samples),
                statistics.fmean(cell.read), shape.flops(cell.tokens), cell.disturbed / len(cell.samples),
                lane.errors[cell.variant], built["copies"],
            )
        )  # fmt: skip


def entrants(settings: Settings, levels: Sequence[str], default: str) -> list[tuple[str, Contestant, dict[str, Any]]]:
    """(entry, who, the worker's options) of everyone that the settings ask for. `scaling` adds our default level with
    one thread."""
    common = {"threads": settings.threads, "spin": settings.spin}
    found: list[tuple[str, Contestant, dict[str, Any]]] = []
    title = ENTRIES[OURS].title
    for level in levels:
        who = Contestant(f"{OURS}:{level}", f"{title} {level}", settings.threads, {}, True, level == default)
        found.append((OURS, who, {"name": OURS, "level": level, **common}))
    if settings.scaling:
        who = Contestant(f"{OURS}:{default}:1 thread", f"{title} {default}, 1 thread", 1, {}, True)
        found.append((OURS, who, {"name": OURS, "level": default, **common, "threads": 1}))
    for name in settings.peers:
        found.append((name, Contestant(name, ENTRIES[name].title, settings.threads), {"name": name, **common}))
    return found
