"""Experiment 5 and two sweeps around it: waiting after every op, waiting once, committing after every layer.

Owns what is compared and its figures. The workloads are in workloads.py, the timing in rounds.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.dispatch import study, workloads
from benchmarks.dispatch.device import Device
from benchmarks.dispatch.layers import nothing
from benchmarks.dispatch.result import Experiment, Figure, Plan, Progress, Published, Series, Settings
from benchmarks.dispatch.rounds import in_turns
from benchmarks.dispatch.spread import bootstrap
from benchmarks.dispatch.workloads import Workload

NAMES = {"per_op": "wait after every op", "batch": "wait once, at the end", "commit": "commit after every layer"}
WORKLOADS = {
    "moe": "MoE layers",
    "matmuls": "plain products",
    "model": "a model's prompt",
    "decode": "a model's single token",
}
SWEEP = (1, 8, 32, 128)  # tokens
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # largest error / largest value
ON_A_CPU = (
    "Execution on a CPU is synchronous: an op has run when its call returns, there is nothing to wait for. The columns"
    " run the same code, and their difference shows how well this machine repeats a measurement, nothing else."
)
FORMULAS = {
    "of_batch": "(per-op - batch) / batch, of the medians",
    "of_per_op": "(per-op - batch) / per-op, of the medians",
    "commit": "(batch - commit) / batch, of the medians",
}


def variants(workload: Workload, device: Device) -> dict[str, Callable[[], object]]:
    """The workload with each way to wait. The caller of in_turns waits at the end of each."""
    found: dict[str, Callable[[], object]] = {
        "per_op": lambda: workload.run(device.wait, nothing),
        "batch": lambda: workload.run(nothing, nothing),
    }
    if device.commits is None:
        found["commit"] = lambda: workload.run(nothing, device.commit)
    return found


def check(workload: Workload, device: Device) -> str:
    """The sentence for the report. AssertionError: the results are not finite, or depend on how it waits."""
    results = {name: work() for name, work in variants(workload, device).items()}
    device.wait()
    first, worst = results["per_op"], 0.0
    assert isinstance(first, torch.Tensor)
    assert bool(torch.isfinite(first).all()), f"{workload.title}: results are not finite"
    for name, result in results.items():
        assert isinstance(result, torch.Tensor)
        if not torch.equal(first, result):  # a device may add in another order each time
            worst = max(worst, float((result.float() - first.float()).abs().max() / first.float().abs().max()))
        assert worst < TOLERANCE[first.dtype], f"{workload.title}: {NAMES[name]} changed the result by {worst:.1e}"
    same = f"the same within {worst:.0e} of the largest value" if worst else "the same bits"
    return f"{workload.title}: finite, and {same} however it waits."


def plural(count: int, what: str) -> str:
    """1 token, 8 tokens."""
    return f"{count} {what}{'s' * (count != 1)}"


def compare(
    workload: Workload, device: Device, settings: Settings, progress: Progress, key: str, x: float | None = None
) -> tuple[list[Series], list[Figure]]:
    """The series and figures of one workload, their keys beginning with `key`."""
    ops = workload.ops()
    times = in_turns(variants(workload, device), device, settings, progress)
    facts = {**workload.facts, "ops": ops, "workload": workload.title}
    published = {"per_op": study.PER_OP, "batch": study.BATCH} if key == "matmuls" and x is None else {}
    series = [
        Series(
            f"{key}_{name}",
            NAMES[name],
            "ms",
            samples,
            published.get(name),
            key if x is None else "sweep",
            x,
            facts=facts,
        )
        for name, samples in times.items()
    ]
    per_op, batch = times["per_op"], times["batch"]
    of_batch = bootstrap(lambda a, b: (a - b) / b, per_op, batch, seed=settings.seed)
    of_per_op = bootstrap(lambda a, b: (a - b) / a, per_op, batch, seed=settings.seed)
    label = WORKLOADS[key] if x is None else plural(int(x), "token")
    theirs = (Published(study.of_batch()), Published(study.of_per_op())) if published else (None, None)
    figures = [
        Figure.of(
            f"{key}_{part_of}",
            f"{label}: improvement, of the {what} time",
            "%",
            gain,
            FORMULAS[part_of],
            published_figure,
        )
        for part_of, what, gain, published_figure in zip(
            ("of_batch", "of_per_op"), ("batch", "per-op"), (of_batch, of_per_op), theirs, strict=True
        )
    ]
    if "commit" in times:
        gain = bootstrap(lambda b, c: (b - c) / b, batch, times["commit"], seed=settings.seed)
        figures.append(
            Figure.of(f"{key}_commit", f"{label}: committing after every layer", "%", gain, FORMULAS["commit"])
        )
    return series, figures


def part(progress: Progress, index: int, of: int, what: str) -> Progress:
    """The progress of part `index` of `of`."""
    return lambda fraction, _: progress((index + min(fraction, 1.0)) / of, what)


@torch.inference_mode()
def run_stream(settings: Settings, progress: Progress) -> Experiment:
    """Experiment 5."""
    device = Device(settings.device, settings.timeout)
    makers: dict[str, Callable[[], Workload]] = {
        "matmuls": lambda: workloads.matmuls(settings),
        "moe": lambda: workloads.moe(settings),
        "model": lambda: workloads.model(settings),
        "decode": lambda: workloads.model(settings, 1),
    }
    series: list[Series] = []
    figures: list[Figure] = []
    checks, notes = [], [] if device.asynchronous else [ON_A_CPU]
    if device.commits is not None:
        notes.append(f"Committing after every layer is not shown: {device.commits}.")
    weights = {key: 3 if key == "moe" else 1 for key in makers}  # the verdict is about the MoE layers
    try:
        for index, (key, make) in enumerate(makers.items()):
            share = dataclasses.replace(settings, seconds=settings.seconds * weights[key] / sum(weights.values()))
            progress(index / len(makers), key)
            try:
                workload = make()
            except ImportError as error:
                notes.append(f"{key} did not run: {error}.")
                continue
            checks.append(check(workload, device))
            new_series, new_figures = compare(workload, device, share, part(progress, index, len(makers), key), key)
            series += new_series
            figures += new_figures
            del workload
    finally:
        device.close()
    if not device.packed_ops:
        notes.append(
            f"metal_marlin has no {device.type} kernels: the MoE layers and the model run dense {settings.dtype}"
            " weights through torch's own ops, in the same order of work."
        )
    return dataclasses.replace(
        STREAM.missing(""),
        absent=None,
        method=(
            "The same ops, launched in the same order, timed on the wall clock from an idle device to an idle device."
            " The ways to wait take turns, in an order drawn anew each round, so that what drifts drifts for all."
            " Four workloads: plain matrix products; layers of router, experts and residual; a language model's forward"
            " on a prompt, and on a single token (in the models, “op” means a module without children:"
            " a linear, a norm, the experts)."
        ),
        arithmetic=(
            "improvement = (per-op - batch) / batch; the same difference over per-op is what a program that waits after"
            " every op would save. Intervals: 95 %, by resampling rounds (bootstrap). " + study.arithmetic()
        ),
        reading=(
            "Each dot is one run, the bar spans the middle half, the line is the median. If “wait once”"
            " is well left of “wait after every op”, queueing without waiting pays. Diamonds are the"
            " study's: another machine and another sequence of products, so compare the gap, not the place."
        ),
        series=tuple(series),
        figures=tuple(figures),
        checks=tuple(checks),
        notes=tuple(notes),
    )


@torch.inference_mode()
def run_sweep(settings: Settings, progress: Progress) -> Experiment:
    """The MoE layers of experiment 5 over batch sizes."""
    device = Device(settings.device, settings.timeout)
    counts = sorted({count for count in SWEEP if count <= settings.batch} | {settings.batch})
    series: list[Series] = []
    figures: list[Figure] = []
    checks = []
    share = dataclasses.replace(settings, seconds=settings.seconds / len(counts))
    try:
        for index, count in enumerate(counts):
            workload = workloads.moe(settings, count)
            checks.append(check(workload, device))
            report = part(progress, index, len(counts), plural(count, "token"))
            new_series, new_figures = compare(workload, device, share, report, f"tokens{count}", count)
            series += new_series
            figures += new_figures
    finally:
        device.close()
    return dataclasses.replace(
        BATCH_SWEEP.missing(""),
        absent=None,
        method="The MoE layers of experiment 5 with fewer tokens, down to one: decoding a single sequence.",
        arithmetic="As in experiment 5, for each batch size.",
        reading=(
            "Both axes grow by factors. Where the lines part, waiting costs a larger share: with few tokens an op is"
            " short and the wait is not."
        ),
        series=tuple(series),
        figures=tuple(figures),
        checks=tuple(checks),
        notes=() if device.asynchronous else (ON_A_CPU,),
        x_label="tokens in the batch",
    )


STREAM = Plan(
    "stream",
    "5",
    "PyTorch's stream: waiting after every op, or once",
    "How much time does a program lose that waits for the device after every op, instead of queueing everything?",
    run_stream,
    4.0,
)
BATCH_SWEEP = Plan(
    "sweep",
    "",
    "Waiting, by batch size",
    "At which batch sizes does waiting after every op matter?",
    run_sweep,
    2.0,
)
EXPERIMENTS = (STREAM, BATCH_SWEEP)
