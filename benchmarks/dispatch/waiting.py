"""What one wait costs: synchronize() on an idle device, and a tiny op with and without a wait after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.dispatch.device import Device
from benchmarks.dispatch.result import Experiment, Figure, Plan, Progress, Series, Settings
from benchmarks.dispatch.rounds import WARM_UP, in_turns
from benchmarks.dispatch.spread import bootstrap

QUEUED = 200  # ops in a row: so many that one wait at the end does not show
NUMBERS = 1024  # a tiny op's length: its work is nothing beside its launch


@torch.inference_mode()
def run(settings: Settings, progress: Progress) -> Experiment:
    """The cost of one wait."""
    device = Device(settings.device, settings.timeout)
    x = torch.ones(NUMBERS, device=settings.device)

    def idle() -> None:
        for _ in range(QUEUED):
            device.wait()

    def queued() -> None:
        for _ in range(QUEUED):
            x.add_(1.0)

    def waited() -> None:
        for _ in range(QUEUED):
            x.add_(1.0)
            device.wait()

    works: dict[str, tuple[str, Callable[[], None]]] = {
        "idle": ("synchronize, nothing to wait for", idle),
        "queued": ("a tiny op, queued behind others", queued),
        "waited": ("a tiny op, waited for", waited),
    }
    try:
        times = in_turns({name: work for name, (_, work) in works.items()}, device, settings, progress)
        expected = 1.0 + QUEUED * 2 * (WARM_UP + len(times["queued"]))  # two loops add
        got = float(x[0])
        assert got == expected, f"after all the additions x is {got}; expected {expected}"
    finally:
        device.close()
    each = {name: tuple(ms * 1e3 / QUEUED for ms in samples) for name, samples in times.items()}
    series = [
        Series(name, works[name][0], "us", samples, None, "wait", facts={"ops": QUEUED})
        for name, samples in each.items()
    ]
    cost = bootstrap(lambda waited, queued: waited - queued, each["waited"], each["queued"], seed=settings.seed)
    return dataclasses.replace(
        WAITING.missing(""),
        absent=None,
        method=(
            f"{QUEUED} times in a row: synchronize() with nothing to wait for; x += 1 on {NUMBERS} numbers; the"
            " same, waiting after each. Times are for one of them."
        ),
        arithmetic=(
            "One wait costs waited - queued. To lose 15 % by waiting after every op, an op would have to be shorter"
            f" than {cost.value / 0.15:,.0f} us here (cost / 0.15)."
            if device.asynchronous
            else "On a CPU there is nothing to wait for, so waited - queued is only how well the loop repeats."
        ),
        reading="The distance between the two lower bars is the price of one wait.",
        series=tuple(series),
        figures=(Figure.of("cost", "one wait costs", "us", cost, "waited - queued, of the medians"),),
        checks=("All additions arrived: x holds their count.",),
        notes=() if device.asynchronous else ("Execution on a CPU is synchronous: wait() does nothing here.",),
    )


WAITING = Plan(
    "waiting",
    "",
    "The price of one wait",
    "What does it cost to wait for the device once?",
    run,
    0.5,
)
EXPERIMENTS = (WAITING,)
