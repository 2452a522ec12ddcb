"""Which experiments there are, in what order, and running them within a time budget.

Owns what happens around an experiment: its share of the time, failures, interruption. Drawing is left to others.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence

from benchmarks.dispatch import memory, overlap, queue, stream, verdict, waiting
from benchmarks.dispatch.result import Experiment, Plan, Progress, Refused, Report, Settings

#: Called with each finished experiment.
Finished = Callable[[Experiment], None]
FAILED = "failed: "


def plans() -> tuple[Plan, ...]:
    """All experiments in the report's order."""
    return (
        *queue.EXPERIMENTS,
        *waiting.EXPERIMENTS,
        *stream.EXPERIMENTS,
        *overlap.EXPERIMENTS,
        *memory.EXPERIMENTS,
    )


def run_all(
    settings: Settings,
    machine: dict[str, str],
    chosen: Sequence[Plan],
    progress_of: Callable[[Plan], Progress],
    finished: Finished = lambda experiment: None,
    sofar: list[Experiment] | None = None,
) -> Report:
    """Runs `chosen` one after the other and reports. What an experiment leaves of its share goes to the later ones.

    sofar  holds what has finished, for a caller that is called from elsewhere meanwhile (the watch)

    A KeyboardInterrupt ends the run: the report then holds what was finished, and says so. An experiment that raises is
    reported with its message, and the next one runs; after a TimeoutError none does. Refused passes through.
    """
    began, stamp = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    done: list[Experiment] = [] if sofar is None else sofar
    interrupted, gave_up = False, ""
    for index, plan in enumerate(chosen):
        if gave_up:
            done.append(plan.missing(gave_up))
            continue
        left = max(settings.seconds - (time.monotonic() - began), 0.0)
        share = left * plan.share / sum(p.share for p in chosen[index:])
        start = time.monotonic()
        try:
            experiment = plan.run(dataclasses.replace(settings, seconds=max(share, 0.05)), progress_of(plan))
        except KeyboardInterrupt:
            interrupted, gave_up = True, "interrupted before it ran"
            experiment = plan.missing("interrupted while it ran")
        except Refused:
            raise
        except TimeoutError as error:
            gave_up = "not run: the device had stopped answering"
            experiment = plan.missing(f"{FAILED}{error}")
        except Exception as error:
            message = str(error).strip().split("\n")[0] or "no message"
            experiment = plan.missing(f"{FAILED}{type(error).__name__}: {message}")
        experiment = dataclasses.replace(experiment, seconds=round(time.monotonic() - start, 3))
        done.append(experiment)
        finished(experiment)
    return Report(
        settings,
        machine,
        tuple(done),
        verdict.decide(settings, done),
        stamp.isoformat(timespec="seconds"),
        round(time.monotonic() - began, 3),
        interrupted,
    )
