"""What follows from the measurements, in words. Owns the rule and the recommendation; measures nothing.

The rule is applied to the MoE layers of experiment 5: improvement = (per-op - batch) / batch, its bootstrap interval
against the threshold. Emulated series are never used.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.dispatch import study
from benchmarks.dispatch.result import Experiment, Figure, Series, Settings, Verdict
from benchmarks.dispatch.spread import Interval, bootstrap
from benchmarks.dispatch.stream import WORKLOADS

WORTH, NOT_WORTH, OPEN, NOT_APPLICABLE = "worth it", "not worth it", "inconclusive", "not applicable"
DECIDING = "moe"


def side(interval: Interval, threshold: float) -> str:
    """On which side of the threshold the whole interval lies; inconclusive when it spans it."""
    if interval.low > threshold:
        return WORTH
    return NOT_WORTH if interval.high < threshold else OPEN


def improvement(per_op: Series, batch: Series, seed: int = 0) -> tuple[Interval, Interval]:
    """(per-op - batch) over batch, and over per-op, each with its interval. NotMeasured: a series is emulated."""
    columns = per_op.measured, batch.measured
    paired = len(columns[0]) == len(columns[1])
    of_batch = bootstrap(lambda a, b: (a - b) / b, *columns, paired=paired, seed=seed)
    return of_batch, bootstrap(lambda a, b: (a - b) / a, *columns, paired=paired, seed=seed)


def decide(settings: Settings, experiments: Sequence[Experiment]) -> Verdict:
    """The verdict on whatever was measured, which may be nothing."""
    stream = next((e for e in experiments if e.key == "stream"), None)
    threshold = settings.threshold
    gains: dict[str, tuple[Interval, Interval]] = {}
    for key in WORKLOADS:
        per_op = stream.find(f"{key}_per_op") if stream else None
        batch = stream.find(f"{key}_batch") if stream else None
        if per_op and batch and not (per_op.emulated or batch.emulated):
            gains[key] = improvement(per_op, batch, settings.seed)
    figures = []
    for key, (of_batch, of_per_op) in gains.items():
        name = WORKLOADS[key]
        figures.append(
            Figure.of(f"{key}_of_batch", f"{name}, of the batch time", "%", of_batch, "(per-op - batch) / batch")
        )
        figures.append(
            Figure.of(f"{key}_of_per_op", f"{name}, of the per-op time", "%", of_per_op, "(per-op - batch) / per-op")
        )
    arithmetic = (
        "improvement = (per-op - batch) / batch, which is compared with the threshold; over per-op it is always the"
        f" smaller of the two. {study.arithmetic()}"
    )
    outcome, words = _outcome(settings, gains)
    if outcome != NOT_APPLICABLE:
        words += _beyond(experiments, threshold)
    return Verdict(outcome, words, threshold, tuple(figures), arithmetic)


def _outcome(settings: Settings, gains: dict[str, tuple[Interval, Interval]]) -> tuple[str, str]:
    threshold = settings.threshold
    if DECIDING not in gains:
        return OPEN, "Experiment 5 has no measurements of MoE layers, so there is nothing to decide on."
    gain = gains[DECIDING][0]
    found = f"{gain.value:.1%} of the batch time (95 % interval {gain.low:.1%} to {gain.high:.1%})"
    if settings.device == "cpu":
        quiet = gain.low <= 0 <= gain.high or abs(gain.value) < 0.02
        tail = (
            "which is nothing, as it should be"
            if quiet
            else "which is this machine's noise: nothing waits for anything here"
        )
        return NOT_APPLICABLE, (
            "A CPU executes an op before its call returns: there is no queue, so there is nothing to pipeline."
            f" Waiting after every op “costs” {found}, {tail}. Run this on a GPU for a verdict."
        )
    outcome = side(gain, threshold)
    text = {
        WORTH: (
            f"Queueing pays: waiting after every op costs MoE layers {found}, above the threshold of {threshold:.0%}."
            " PyTorch queues by itself as long as nothing in between asks for a value (.item(), .tolist(),"
            " printing), so there is nothing to build for it: just don't wait."
        ),
        NOT_WORTH: (
            f"Don't build a pipeline for this: even waiting after every op costs MoE layers only {found}, under the"
            f" threshold of {threshold:.0%}, and PyTorch, which queues, doesn't wait that often."
        ),
        OPEN: (
            f"Not decided. Waiting after every op costs MoE layers {found}, and that interval spans the threshold of"
            f" {threshold:.0%}. Run again on an otherwise idle machine, or longer (--seconds, --repeats)."
        ),
    }[outcome]
    others = [f"{WORKLOADS[k]} {g[0].value:.1%} ({side(g[0], threshold)})" for k, g in gains.items() if k != DECIDING]
    return outcome, text + (f" Elsewhere: {', '.join(others)}." if others else "")


def _beyond(experiments: Sequence[Experiment], threshold: float) -> str:
    """What is left for a pipeline of one's own beyond PyTorch's queue: the overlap bound, and commits."""
    figures = {f.key: f for e in experiments if not e.emulated for f in e.figures}
    text = ""
    bound = figures.get("potential")
    if bound is not None and bound.low is not None and bound.high is not None:
        what = {
            NOT_WORTH: "under the threshold, so that is not worth building either",
            WORTH: "above the threshold; but it is a bound, and only a trial can show how much of it is there to have",
            OPEN: "which may be on either side of the threshold",
        }[side(Interval(bound.value, bound.low, bound.high), threshold)]
        text += (
            " What a pipeline of one's own could add to PyTorch's queue is running routers beside experts: at most"
            f" {bound.value:.1%} of their time ({bound.low:.1%} to {bound.high:.1%}), {what}."
        )
    commit = figures.get("moe_commit")
    if commit is not None:
        text += f" Committing after every layer, without waiting, saves {commit.value:.1%} of the batch time."
    return text
