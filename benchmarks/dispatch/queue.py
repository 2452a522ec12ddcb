"""Experiments 1 to 4, and shared events between two queues: ways to hand the same kernel to a Mac's GPU.

Owns what is compared and the words for it. They use Metal itself, through metal_marlin.metal_queue, beside PyTorch; the
kernel and its check are in metal_work.py, the timing in rounds.py. Without a Metal device they say so.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.dispatch import study
from benchmarks.dispatch.metal_work import ADDEND, OTHER_ADDEND, MetalWork
from benchmarks.dispatch.result import Experiment, Figure, Plan, Progress, Series, Settings
from benchmarks.dispatch.rounds import in_turns
from benchmarks.dispatch.spread import bootstrap
from metal_marlin import metal_queue

IN_FLIGHT = (1, 2, 4, 8, 16)  # command buffers
ENCODERS = (1, 2, 4, 8, 16)
KERNELS = 32  # of a timed sequence: twice the most that are in flight
FEW = 8  # of a sequence that waits for each
EMULATED = (
    "Emulated: this is a test's stand-in for Metal on a CPU. The same code ran and its results were checked, but the"
    " timings mean nothing and are not shown."
)
KERNEL = (
    "The kernel works about a millisecond, calibrated on this GPU, about as long as the study's; each launch reads what"
    " the one before wrote, as the layers of a model do."
)


class Waited:
    """For in_turns: every variant here waits for its own work."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


def timed(
    variants: Mapping[str, Callable[[], object]], settings: Settings, progress: Progress
) -> dict[str, tuple[float, ...]]:
    """Wall milliseconds of each variant, taken in turns."""
    return in_turns(variants, Waited(), settings, progress)  # type: ignore[arg-type, unused-ignore]


def gain(key: str, name: str, slow: tuple[float, ...], fast: tuple[float, ...], formula: str, seed: int) -> Figure:
    """(slow - fast) / fast, in percent."""
    return Figure.of(key, name, "%", bootstrap(lambda a, b: (a - b) / b, slow, fast, seed=seed), formula)


def difference(
    key: str, name: str, more: tuple[float, ...], less: tuple[float, ...], each: int, formula: str, seed: int
) -> Figure:
    """(more - less) / each of two series in ms, in microseconds."""
    return Figure.of(key, name, "us", bootstrap(lambda a, b: (a - b) * 1e3 / each, more, less, seed=seed), formula)


def run(
    plan: Plan,
    measure: Callable[[MetalWork, Settings, Progress], dict[str, Any]],
    slots: int,
    settings: Settings,
    progress: Progress,
) -> Experiment:
    """Opens the device, measures, checks, and marks what is emulated. measure() gives the parts that it knows."""
    problem = metal_queue.device_problem()
    if problem:
        return plan.missing(problem)
    work = MetalWork(settings.timeout, slots)
    parts = measure(work, settings, progress)
    series = tuple(
        dataclasses.replace(series, emulated=work.emulated, facts={**work.facts(), **series.facts})
        for series in parts.pop("series")
    )
    figures = tuple(parts.pop("figures"))
    notes = [f"GPU: {work.device.name}, through Metal itself, on queues of its own beside PyTorch's."]
    if work.emulated:
        notes.append(EMULATED)
        figures = ()
    return dataclasses.replace(
        plan.missing(""),
        absent=None,
        series=series,
        figures=figures,
        checks=(work.check(),),
        notes=tuple(notes),
        **parts,
    )


# ---- 1: waiting for each ----


def measure_sync(work: MetalWork, settings: Settings, progress: Progress) -> dict[str, Any]:
    """One kernel, waited for, again and again, in three ways."""
    gpu: dict[str, list[float]] = {"blocking": [], "handler": [], "queued": []}
    count = 2 if work.emulated else FEW

    def each(name: str, wait: Callable[[Any], None]) -> None:
        spent = 0.0
        for _ in range(count):
            commands = work.encode()
            commands.commit()
            wait(commands)
            spent += work.gpu_ms(commands)
        gpu[name].append(spent / count)

    def queued() -> None:
        flying = [work.encode() for _ in range(count)]
        for commands in flying:
            commands.commit()
        for commands in flying:
            work.wait(commands)
        gpu["queued"].append(sum(map(work.gpu_ms, flying)) / count)

    times = timed(
        {
            "blocking": lambda: each("blocking", lambda commands: commands.wait_until_completed()),
            "handler": lambda: each("handler", work.wait),
            "queued": queued,
        },
        settings,
        progress,
    )
    wall = {name: tuple(ms / count for ms in samples) for name, samples in times.items()}
    busy = {name: tuple(gpu[name][-len(samples) :]) for name, samples in wall.items()}
    names = {
        "blocking": "waitUntilCompleted for each",
        "handler": "completion handler for each",
        "queued": "all committed, then waited",
    }
    facts = {"kernels": count}
    series = [
        Series(
            name,
            names[name],
            "ms",
            wall[name],
            study.SYNC_DISPATCH if name == "blocking" else None,
            "wall",
            facts=facts,
        )
        for name in names
    ]
    series += [
        Series(f"gpu_{name}", f"GPU time: {names[name]}", "ms", busy[name], None, "GPU", facts=facts)
        for name in ("blocking", "queued")
    ]
    seed = settings.seed
    return {
        "method": f"{KERNEL} {count} kernels, a command buffer each. Times are for one kernel, encoding included.",
        "arithmetic": (
            "What waiting costs is the wall time of a kernel that is waited for, less that of one that is not. The"
            f" study has {study.SYNC_DISPATCH.value} ms a kernel; its kernel's own time is not known, so only the gap"
            " between the rows here says what waiting cost on this machine. GPU time is Metal's own GPUEndTime -"
            " GPUStartTime."
        ),
        "reading": "The gap between the first row and the last is time in which the GPU had nothing to do.",
        "series": series,
        "figures": (
            difference(
                "waiting", "waiting costs a kernel", wall["blocking"], wall["queued"], 1,
                "blocking - queued, of the medians", seed,
            ),
            gain(
                "waiting_share", "slower by waiting for each", wall["blocking"], wall["queued"],
                "(blocking - queued) / queued, of the medians", seed,
            ),
            difference(
                "handler_cost", "the handler against waitUntilCompleted", wall["handler"], wall["blocking"], 1,
                "handler - blocking, of the medians", seed,
            ),
        ),
    }  # fmt: skip


# ---- 2: several in flight ----


def measure_in_flight(work: MetalWork, settings: Settings, progress: Progress) -> dict[str, Any]:
    """A window of N command buffers slides over a row of kernels."""
    kernels = max(IN_FLIGHT) if work.emulated else KERNELS

    def window(most: int, own: bool) -> None:
        flying: deque[Any] = deque()
        for index in range(kernels):
            if len(flying) == most:
                work.wait(flying.popleft())
            commands = work.encode(slot=index % most if own else 0)
            commands.commit()
            flying.append(commands)
        for commands in flying:
            work.wait(commands)

    variants = {f"{kind}{n}": partial(window, n, kind == "own") for kind in ("chain", "own") for n in IN_FLIGHT}
    times = timed(variants, settings, progress)
    each = {name: tuple(ms / kernels for ms in samples) for name, samples in times.items()}
    groups = {"chain": "in a chain", "own": "independent"}
    series = [
        Series(
            f"{kind}{n}", group, "ms", each[f"{kind}{n}"],
            study.IN_FLIGHT.get(n) if kind == "chain" else None, "flight", n, facts={"kernels": kernels},
        )
        for kind, group in groups.items()
        for n in IN_FLIGHT
    ]  # fmt: skip
    figures = [
        gain(
            f"{kind}{n}_gain", f"{n} in flight against 1, {group}", each[f"{kind}1"], each[f"{kind}{n}"],
            f"(1 in flight - {n} in flight) / {n} in flight, of the medians", settings.seed,
        )
        for kind, group in groups.items()
        for n in IN_FLIGHT[1:]
    ]  # fmt: skip
    return {
        "method": (
            f"{KERNEL} {kernels} kernels, a command buffer each, at most N of them committed and not completed: before"
            " the next one is encoded, the oldest is waited for. Once on one buffer, so that each kernel needs the"
            " last, and once on N buffers in turn, so that the GPU may run them side by side."
        ),
        "arithmetic": (
            "Times are the whole row's over the number of kernels. The study has 1.246, 1.304 and 1.254 ms for 2, 4 and"
            " 8: all the same within its spread, which it does not give, and 2.401 ms for 1. So all of the gain is in"
            " the second command buffer: it is encoded while the first one runs."
        ),
        "reading": "A line that falls from 1 to 2 and is flat from there says: two are enough, more is for nothing.",
        "x_label": "command buffers in flight",
        "series": series,
        "figures": figures,
    }


# ---- 3: handlers ----

STAGES = {
    "commit": ("in commit()", "committing_ns", "committed_ns", study.COMMIT),
    "scheduled": ("commit to the scheduled handler", "committing_ns", "scheduled_ns", None),
    "start": ("commit to the GPU's start", "committing_ns", "gpu_start_ns", None),
    "gpu": ("the GPU's work", "gpu_start_ns", "gpu_end_ns", None),
    "notice": ("the GPU's end to the completion handler", "gpu_end_ns", "completed_ns", None),
    "latency": ("commit to the completion handler", "committing_ns", "completed_ns", study.HANDLER_LATENCY),
}


def times_of(commands: Any, timeout: float) -> Any:
    """The times of a completed command buffer. Its scheduled handler may be late, on another thread."""
    deadline = time.monotonic() + timeout
    while None in (times := commands.times()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no scheduled handler, or no GPU times, {timeout:g} s after completion: {times}")
        time.sleep(1e-4)
    return times


def measure_handlers(work: MetalWork, settings: Settings, progress: Progress) -> dict[str, Any]:
    """One command buffer at a time, and when each thing happened to it."""
    found: dict[str, list[dict[str, float]]] = {"work": [], "empty": []}

    def once(name: str, steps: int) -> None:
        commands = work.encode(steps=steps)
        commands.commit()
        work.wait(commands)
        awake = time.perf_counter_ns()
        times = times_of(commands, work.timeout)
        stages = {
            key: (getattr(times, end) - getattr(times, begin)) / 1e6 for key, (_, begin, end, _) in STAGES.items()
        }
        found[name].append({**stages, "wake": (awake - times.completed_ns) / 1e6})

    times = timed({"work": partial(once, "work", 0), "empty": partial(once, "empty", 1)}, settings, progress)
    taken = {name: found[name][-len(samples) :] for name, samples in times.items()}
    labels = {key: label for key, (label, *_) in STAGES.items()} | {"wake": "the handler to the waiting thread"}
    groups = {"work": "a millisecond of work", "empty": "next to no work"}
    series = [
        Series(
            f"{name}_{key}", label if name == "work" else f"{label}, no work", "ms",
            tuple(stage[key] for stage in taken[name]),
            STAGES[key][3] if name == "work" and key in STAGES else None, group,
        )
        for name, group in groups.items()
        for key, label in labels.items()
    ]  # fmt: skip
    latency, gpu = (tuple(stage[key] for stage in taken["work"]) for key in ("latency", "gpu"))
    return {
        "method": (
            "One command buffer at a time: commit, wait until the completion handler has run. Times before and after"
            " commit() and on entering a handler are taken in C; start and end on the GPU are Metal's GPUStartTime and"
            " GPUEndTime, on the same clock. Handlers are called by Metal on a thread of its own. Once with the"
            " millisecond's kernel and once with next to no work, in turns."
        ),
        "arithmetic": (
            "commit to completion handler = commit to start + GPU's work + end to handler. The study's"
            f" {study.HANDLER_LATENCY.value} ms is that sum for its kernel, so most of it is the kernel: what the"
            " handler itself adds is the row “the GPU's end to the completion handler”."
        ),
        "reading": "All rows but “the GPU's work” and the sum are overhead, and should not depend on the kernel.",
        "series": series,
        "figures": (
            difference(
                "overhead", "around the GPU's work", latency, gpu, 1,
                "commit to the completion handler - the GPU's work, of the medians", settings.seed,
            ),
        ),
    }  # fmt: skip


# ---- 4: encoders ----


def measure_encoders(work: MetalWork, settings: Settings, progress: Progress) -> dict[str, Any]:
    """N encoders with a kernel each against one encoder with N kernels, in one command buffer."""

    def total(encoders: int, count: int) -> None:
        commands = work.encode(encoders=encoders, count=count)
        commands.commit()
        work.wait(commands)

    variants = {f"encoders{n}": partial(total, n, 1) for n in ENCODERS} | {
        f"one{n}": partial(total, 1, n) for n in ENCODERS
    }
    times = timed(variants, settings, progress)
    groups = {"encoders": "an encoder each", "one": "one encoder for all"}
    series = [
        Series(
            f"{kind}{n}", group, "ms", times[f"{kind}{n}"],
            study.ENCODERS.get(n) if kind == "encoders" else None, "encoders", n,
        )
        for kind, group in groups.items()
        for n in ENCODERS
    ]  # fmt: skip
    most = max(ENCODERS)
    return {
        "method": (
            f"{KERNEL} One command buffer with N kernels, each in an encoder of its own or all in one; from before"
            " encoding until the completion handler has run. An encoder is serial, and so are encoders on one buffer's"
            " memory."
        ),
        "arithmetic": (
            "The study's totals of 1.11, 2.33 and 4.41 ms for 2, 4 and 8 encoders grow by 0.55 ms an encoder"
            " ((4.41 - 1.11) / 6): that is its kernel, not the encoder. An encoder's own cost is the difference between"
            " the two lines."
        ),
        "reading": "Both lines rise with the kernels' own time; where they lie together, an encoder costs nothing.",
        "x_label": "kernels in the command buffer",
        "series": series,
        "figures": (
            difference(
                "encoder", "another encoder costs", times[f"encoders{most}"], times[f"one{most}"], most - 1,
                f"({most} encoders - one encoder with {most} kernels) / {most - 1}, of the medians", settings.seed,
            ),
        ),
    }  # fmt: skip


# ---- shared events ----


def measure_events(work: MetalWork, settings: Settings, progress: Progress) -> dict[str, Any]:
    """The same row of kernels on one queue, and handed to and fro between two."""
    kernels = 6 if work.emulated else KERNELS
    event, queues = work.device.event(), (work.queue, work.device.queue())
    addends = (ADDEND, OTHER_ADDEND)  # kernels of the two queues do not commute: a wrong order shows
    signalled = 0

    def row(queue_of: Callable[[int], Any], events: bool, host: bool) -> None:
        nonlocal signalled
        flying = []
        for index in range(kernels):
            commands = queue_of(index).commands()
            if events:
                if signalled:
                    commands.wait_for(event, signalled)
                signalled += 1
            work.launch(commands, addend=addends[index % 2])
            if events:
                commands.signal(event, signalled)
            commands.commit()
            flying.append(commands)
            if host:
                work.wait(commands)
        for commands in flying:
            work.wait(commands)

    times = timed(
        {
            "one": lambda: row(lambda index: queues[0], False, False),
            "event": lambda: row(lambda index: queues[index % 2], True, False),
            "one_event": lambda: row(lambda index: queues[0], True, False),
            "host": lambda: row(lambda index: queues[index % 2], False, True),
        },
        settings,
        progress,
    )
    each = {name: tuple(ms / kernels for ms in samples) for name, samples in times.items()}
    names = {
        "one": "one queue",
        "one_event": "one queue, with the events' commands",
        "event": "two queues in turn, handed over by a shared event",
        "host": "two queues in turn, handed over by the CPU",
    }
    seed = settings.seed
    return {
        "method": (
            f"{KERNEL} {kernels} kernels, a command buffer each. Two queues: kernel i is committed to queue i mod 2,"
            " waits for the shared event's value i and signals i + 1; all are committed at once. Handed over by the"
            " CPU: it waits for each kernel before it commits the next one to the other queue."
        ),
        "arithmetic": (
            "Times are the whole row's over the number of kernels. What a handover by event costs is its row less that"
            " of one queue. The study has no figure: it could not use events."
        ),
        "reading": (
            "If the event's row is near that of one queue, work can be spread over queues at no cost; if it is near the"
            " CPU's, an event is no better than waiting."
        ),
        "series": [
            Series(key, name, "ms", each[key], None, "handover", facts={"kernels": kernels})
            for key, name in names.items()
        ],
        "figures": (
            difference(
                "event_cost", "a handover by event", each["event"], each["one"], 1, "event - one queue", seed
            ),
            difference(
                "host_cost", "a handover by the CPU", each["host"], each["one"], 1, "CPU - one queue", seed
            ),
        ),
    }  # fmt: skip


SYNC: Plan = Plan(
    "sync",
    "1",
    "Waiting for each kernel",
    "What does it cost to wait for every kernel before handing over the next one?",
    lambda settings, progress: run(SYNC, measure_sync, 1, settings, progress),
    0.5,
)
FLIGHT: Plan = Plan(
    "in_flight",
    "2",
    "Command buffers in flight",
    "How many command buffers must be on their way for the GPU never to run dry?",
    lambda settings, progress: run(FLIGHT, measure_in_flight, max(IN_FLIGHT), settings, progress),
    1.0,
)
HANDLERS: Plan = Plan(
    "handlers",
    "3",
    "Completion handlers",
    "How long does a commit take, and how long until the program learns that the GPU has finished?",
    lambda settings, progress: run(HANDLERS, measure_handlers, 1, settings, progress),
    0.5,
)
MULTI_ENCODER: Plan = Plan(
    "encoders",
    "4",
    "Several encoders in one command buffer",
    "What does an encoder of its own cost a kernel?",
    lambda settings, progress: run(MULTI_ENCODER, measure_encoders, 1, settings, progress),
    0.7,
)
EVENTS: Plan = Plan(
    "events",
    "",
    "Shared events between two queues",
    "What does it cost to hand dependent work from one queue to another?",
    lambda settings, progress: run(EVENTS, measure_events, 1, settings, progress),
    0.5,
)
EXPERIMENTS = (SYNC, FLIGHT, HANDLERS, MULTI_ENCODER, EVENTS)
