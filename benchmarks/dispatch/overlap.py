"""Experiment 6 and what fusing bought: router, one expert's product, all experts at once and one by one.

Owns the overlap arithmetic. The layer is in layers.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.dispatch import layers, study
from benchmarks.dispatch.device import Device
from benchmarks.dispatch.layers import DenseMoE, MoE
from benchmarks.dispatch.result import Experiment, Fact, Figure, Plan, Progress, Published, Series, Settings
from benchmarks.dispatch.rounds import in_turns
from benchmarks.dispatch.spread import Interval, bootstrap
from benchmarks.dispatch.stream import SWEEP, TOLERANCE, part, plural


def potential(router: Any, experts: Any) -> Any:
    """The most that running a router beside experts can save, as a part of running one after the other.

    One after the other takes r + e. Side by side takes at least max(r, e): the longer of the two is still to be done.
    The saving is r + e - max(r, e) = min(r, e), so the part is min(r, e) / (r + e): at most a half, when r = e.
    """
    if isinstance(router, float) and isinstance(experts, float):
        return min(router, experts) / (router + experts)
    import numpy as np

    return np.minimum(router, experts) / (router + experts)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def check(layer: MoE, x: Tensor) -> list[str]:
    """Sentences for the report. AssertionError: the router or the ways to compute experts disagree."""
    weights, ids = layer.route(x)
    router = layer.gate_weight.T if isinstance(layer, DenseMoE) else layer.router.weight
    scores = torch.softmax(x.cpu().double() @ router.cpu().double().T, -1)  # MPS has no float64
    want, _ = scores.topk(ids.shape[-1])
    picked = scores.gather(-1, ids.cpu())
    # near ties may be picked either way: what counts is that the picked scores are the largest
    error = float((picked - want).abs().max())
    assert error < TOLERANCE[x.dtype], f"the router's picks are {error:.1e} below the best scores"
    error = relative_error(weights.cpu(), (picked / picked.sum(-1, keepdim=True)).float())
    assert error < TOLERANCE[x.dtype], f"the router's weights are off by {error:.1e}"
    together, one_by_one = layer.together(x, weights, ids), layer.one_by_one(x, weights, ids)
    assert bool(torch.isfinite(together).all()), "the experts' output is not finite"
    error = relative_error(together, one_by_one)
    assert error < TOLERANCE[x.dtype], f"{layer.together_name} and the loop differ by {error:.1e}"
    return [
        "The router's picks and weights agree with a softmax in float64.",
        f"{layer.together_name[0].upper()}{layer.together_name[1:]} and {layer.loop_name} agree within {error:.0e}"
        " of the largest value.",
    ]


@torch.inference_mode()
def run_overlap(settings: Settings, progress: Progress) -> Experiment:
    """Experiment 6."""
    s, device = settings, Device(settings.device, settings.timeout)
    try:
        layer, x = layers.of(s), layers.tokens(s, s.batch)
        checks = check(layer, x)
        weights, ids = layer.route(x)
        dense = torch.randn(s.hidden, s.intermediate, generator=torch.Generator().manual_seed(s.seed))
        matrix = dense.div_(s.hidden**0.5).to(s.device, x.dtype)
        works: dict[str, tuple[str, Callable[[], object], Published | None]] = {
            "router": ("router", lambda: layer.route(x), study.ROUTER),
            "gemm": (f"one product [{s.batch}, {s.hidden}] x [{s.hidden}, {s.intermediate}]", lambda: x @ matrix,
                     study.EXPERT_GEMM),
            "experts": (f"all experts: {layer.together_name}", lambda: layer.together(x, weights, ids), None),
            "layer": ("router, then all experts", lambda: layer.together(x, *layer.route(x)), None),
        }  # fmt: skip
        if not isinstance(layer, DenseMoE):
            works["trellis"] = ("the same product, packed 2-bit", lambda: layer.expert(x), None)
        times = in_turns({name: work for name, (_, work, _) in works.items()}, device, s, progress)
    finally:
        device.close()
    facts: dict[str, Fact] = {
        "batch": s.batch,
        "hidden": s.hidden,
        "intermediate": s.intermediate,
        "top_k": s.top_k,
        "form": layer.form,
    }
    series = [
        Series(name, title, "ms", times[name], published, "times", facts=facts)
        for name, (title, _, published) in works.items()
    ]
    router, gemm, experts = times["router"], times["gemm"], times["experts"]

    def interval(statistic: Callable[..., Any], *columns: tuple[float, ...]) -> Interval:
        return bootstrap(statistic, *columns, seed=s.seed)

    figures = [
        Figure.of(
            "potential",
            "overlap potential, all experts as measured",
            "%",
            interval(lambda r, e: potential(r, e), router, experts),
            "min(router, experts) / (router + experts)",
        ),
        Figure.of(
            "study_potential",
            "overlap potential, as the study counts it",
            "%",
            interval(lambda r, g: r / (r + s.top_k * g), router, gemm),
            f"router / (router + {s.top_k} x one product)",
            Published(study.overlap()),
        ),
        Figure.of(
            "layer_sum",
            "router and experts in one go, over the two alone",
            "x",
            interval(lambda layer, r, e: layer / (r + e), times["layer"], router, experts),
            "layer / (router + experts); below 1: the stream overlaps already, or a wait was saved",
        ),
    ]
    derivation = (
        "One after the other, router and experts take r + e. Side by side they take at least max(r, e), for the"
        " longer one"
        " has still to be done. So at most r + e - max(r, e) = min(r, e) is saved, which is min(r, e) / (r + e) of"
        " the time:"
        " never more than a half. It is a bound, not a forecast: a layer's experts need their own router's result,"
        " so the"
        " router could only run beside another batch's experts, and both would share the same cores and memory."
        f" The study: 2.82 / (2.82 + 4 x 9.45) = {study.overlap():.1%}, with one product standing for each of the top-k"
        " experts. Its router time of 2.82 ms came with a spread of 9.37 ms, more than three times the figure itself."
        " An expert here has three products, not one, and a batch of tokens routes to all experts, so a"
        " router's share of a whole layer is smaller than the study's way of counting says."
    )
    return dataclasses.replace(
        OVERLAP.missing(""),
        absent=None,
        method="Each part alone, from an idle device to an idle device, in turns.",
        arithmetic=derivation,
        reading=(
            "The shorter the router's bar next to the experts', the less there is to gain from running them side by"
            " side. Diamonds are the study's, on another machine."
        ),
        series=tuple(series),
        figures=tuple(figures),
        checks=tuple(checks),
        notes=tuple(_notes(s, device, layer)),
    )


def _notes(s: Settings, device: Device, layer: MoE) -> list[str]:
    notes = [f"The layer: {layer.form}; {s.experts} experts of {s.hidden} x {s.intermediate}, top {s.top_k}."]
    if not s.study_sizes:
        notes.append(
            f"Sizes differ from the study's (batch 128, hidden 4096, intermediate 14336, top 4): this run has batch"
            f" {s.batch},"
            f" hidden {s.hidden}, intermediate {s.intermediate}, top {s.top_k}. Its milliseconds are shown for"
            " orientation only."
        )
    if not device.asynchronous:
        notes.append("A CPU runs one op after the other on all its threads: there is no queue to overlap on.")
    if not device.packed_ops:
        notes.append(
            f"metal_marlin's ops have no {device.type} kernels: the router is torch ops (product, softmax, top-k), all"
            f" experts at once are {layer.together_name}."
        )
    return notes


@torch.inference_mode()
def run_fusion(settings: Settings, progress: Progress) -> Experiment:
    """All experts at once against one by one, over batch sizes."""
    s, device = settings, Device(settings.device, settings.timeout)
    counts = sorted({count for count in SWEEP if count <= s.batch} | {s.batch})
    share = dataclasses.replace(s, seconds=s.seconds / len(counts))
    series: list[Series] = []
    figures: list[Figure] = []
    checks: list[str] = []
    try:
        layer = layers.of(s)
        for index, count in enumerate(counts):
            x = layers.tokens(s, count)
            checks = check(layer, x)
            weights, ids = layer.route(x)
            works: dict[str, Callable[[], object]] = {
                "together": functools.partial(layer.together, x, weights, ids),
                "loop": functools.partial(layer.one_by_one, x, weights, ids),
            }
            times = in_turns(works, device, share, part(progress, index, len(counts), f"{count} tokens"))
            hit = int(ids.unique().numel())
            found: dict[str, Fact] = {"batch": count, "experts_hit": hit, "form": layer.form}
            names = {"together": layer.together_name, "loop": layer.loop_name}
            series += [
                Series(f"{name}{count}", names[name], "ms", times[name], None, "fusion", count, facts=found)
                for name in works
            ]
            gain = bootstrap(lambda loop, together: loop / together, times["loop"], times["together"], seed=s.seed)
            figures.append(
                Figure.of(
                    f"gain{count}",
                    f"{plural(count, 'token')}, {hit} experts hit: loop / together",
                    "x",
                    gain,
                    "of the medians",
                )
            )
    finally:
        device.close()
    notes = [f"The layer: {layer.form}; {s.experts} experts of {s.hidden} x {s.intermediate}, top {s.top_k}."]
    if not device.packed_ops:
        notes.append(
            f"metal_marlin's fused op has no {device.type} kernels: “together” is {layer.together_name}, which sorts"
            " the rows by expert on the device and does not ask the host anything."
        )
    return dataclasses.replace(
        FUSION.missing(""),
        absent=None,
        method=(
            "The same layer, input and routing. The loop does what a model without a fused op does: it asks the host"
            " which"
            " experts were hit, gathers each one's rows, multiplies three times, and adds the result in. That question"
            " is a wait in itself, so the loop cannot be queued ahead."
        ),
        arithmetic="loop / together, of the medians; 1 x would mean that fusing bought nothing.",
        reading="The gap between the lines is what computing all experts at once buys, at that number of tokens.",
        series=tuple(series),
        figures=tuple(figures),
        checks=tuple(f"At the largest batch: {sentence[0].lower()}{sentence[1:]}" for sentence in checks),
        notes=tuple(notes),
        x_label="tokens in the batch",
    )


OVERLAP = Plan(
    "overlap",
    "6",
    "Router beside experts: what overlap could bring",
    "If a router could run while experts compute, how much time could that save at most?",
    run_overlap,
    2.0,
)
FUSION = Plan(
    "fusion",
    "",
    "All experts at once, or one by one",
    "What does computing all routed experts in one op buy over looping over them?",
    run_fusion,
    2.5,
)
EXPERIMENTS = (OVERLAP, FUSION)
