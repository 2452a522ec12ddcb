"""What buffering costs in memory: single, double, N-fold, by formula, checked against the allocator where there is one.

Owns the formulas. They are plain arithmetic on sizes; nothing here needs a device.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.dispatch import layers
from benchmarks.dispatch.device import Device
from benchmarks.dispatch.layers import DenseMoE
from benchmarks.dispatch.result import Experiment, Figure, Plan, Progress, Published, Series, Settings
from benchmarks.dispatch.sizes import element_bytes

MIB = 2.0**20
BUFFERS = (1, 2, 4, 8)
SLACK = 0.05  # by which an allocator may differ: blocks are rounded up, products take a workspace


def buffered_bytes(
    batch: int, intermediate: int, size: int, buffers: int = 1, top_k: int = 1, layers: int | None = None
) -> int:
    """Bytes of activation buffers: buffers x batch x top_k x intermediate x size.

    size     bytes of one number
    buffers  1 single, 2 double, N-fold; no more than `layers` can be in use at a time, if that is given
    top_k    experts a token visits, each with a row of its own; the study counts 1
    """
    in_use = buffers if layers is None else min(buffers, layers)
    return in_use * batch * top_k * intermediate * size


def layer_peak_bytes(batch: int, hidden: int, intermediate: int, size: int, top_k: int) -> int:
    """The most bytes of intermediates that layers.DenseMoE.together_grouped holds at once.

    With P = batch x top_k rows: gathered rows P x hidden, gate, up, silu(gate) and their product P x intermediate each;
    or, later, silu(gate) gone, the down product and its weighted copy P x hidden each.
    """
    pairs = batch * top_k
    return max(pairs * hidden + 4 * pairs * intermediate, 3 * pairs * hidden + 3 * pairs * intermediate) * size


@torch.inference_mode()
def run(settings: Settings, progress: Progress) -> Experiment:
    """The memory analysis."""
    s, size = settings, element_bytes(settings.dtype)
    device = Device(s.device, s.timeout)
    study_sizes = (128, 14336, 2)
    series = []
    for count in BUFFERS:
        one = {
            "study": ("the study's count, at its sizes", buffered_bytes(*study_sizes, count)),
            "rows": ("a row for every routed expert, at this run's sizes",
                     buffered_bytes(s.batch, s.intermediate, size, count, s.top_k)),
            "peak": ("all intermediates of an unfused layer",
                     count * layer_peak_bytes(s.batch, s.hidden, s.intermediate, size, s.top_k)),
        }  # fmt: skip
        for key, (name, value) in one.items():
            published = Published({1: 3.5, 2: 7.0}[count]) if key == "study" and count in (1, 2) else None
            series.append(Series(f"{key}{count}", name, "MiB", (value / MIB,), published, "buffers", count))
    checks, notes = [], []
    try:
        progress(0.3, "allocator")
        for count in BUFFERS if device.allocated_bytes() is not None else ():
            allocated = _allocate(s, device, count)
            predicted = buffered_bytes(s.batch, s.intermediate, size, count, s.top_k)
            name = "the same rows, by the allocator's count"
            series.append(Series(f"allocator{count}", name, "MiB", (allocated / MIB,), None, "buffers", count))
            tolerance = SLACK * predicted + count * 1024
            assert abs(allocated - predicted) <= tolerance, f"{count} buffers: {allocated} bytes, predicted {predicted}"
        if device.allocated_bytes() is None:
            notes.append(
                "PyTorch keeps no count of a CPU's memory: the formulas are not checked against an allocator here."
            )
        else:
            checks.append("The allocator's count of 1, 2, 4 and 8 buffers agrees with the formula.")
        progress(0.6, "peak")
        peak = _peak(s, device)
        if peak is not None:
            predicted = layer_peak_bytes(s.batch, s.hidden, s.intermediate, size, s.top_k)
            series.append(
                Series("measured_peak", "an unfused layer's peak, measured", "MiB", (peak / MIB,), None, "buffers", 1)
            )
            notes.append(
                f"One unfused layer took {peak / MIB:,.1f} MiB at its peak by the allocator; the formula says"
                f" {predicted / MIB:,.1f} MiB, and does not count what a product takes to work in."
            )
    finally:
        device.close()
    if not s.study_sizes:
        notes.append("The study's lines are at its own sizes, the others at this run's.")
    return dataclasses.replace(
        MEMORY.missing(""),
        absent=None,
        method="Arithmetic on sizes; where PyTorch counts what it allocates, the same buffers are made and counted.",
        arithmetic=(
            "bytes(N) = N x batch x top-k x intermediate x bytes of a number; N is at most the number of layers,"
            " since a"
            " layer uses one buffer at a time. The study counts one row a token: 128 x 14336 x 2 = 3,670,016 bytes ="
            " 3.5 MiB (it writes 3.5 MB), 7 MiB for two. But a token visits top-k experts, each with a row of its"
            " own, so a"
            " batch of 128 with top-k 4 needs 14 MiB a buffer. All intermediates of an unfused layer, with P = batch"
            " x top-k:"
            " (P x hidden + 4 P x intermediate) x bytes, or (3 P x hidden + 3 P x intermediate) x bytes if that is"
            " more."
        ),
        reading="Twice the buffers, twice the bytes. Diamonds are the figures that the study printed.",
        series=tuple(series),
        figures=_variations(s, size),
        checks=tuple(checks),
        notes=tuple(notes),
        x_label="buffers",
    )


def _variations(s: Settings, size: int) -> tuple[Figure, ...]:
    """Two buffers, with one size at a time changed."""
    base = {"batch": s.batch, "intermediate": s.intermediate, "size": size, "top_k": s.top_k}
    changes: dict[str, tuple[str, dict[str, int], int]] = {
        "single": ("one buffer", {}, 1),
        "double": ("two buffers", {}, 2),
        "layers": (f"a buffer for each of {s.layers} layers", {}, s.layers),
        "batch": ("two, batch x 4", {"batch": 4 * s.batch}, 2),
        "token": ("two, one token", {"batch": 1}, 2),
        "wide": ("two, intermediate x 2", {"intermediate": 2 * s.intermediate}, 2),
        "top_k": ("two, top-k x 2", {"top_k": 2 * s.top_k}, 2),
        "dtype": (f"two, {2 if size == 4 else 4} bytes a number", {"size": 2 if size == 4 else 4}, 2),
    }
    figures = []
    for key, (name, change, buffers) in changes.items():
        sizes = {**base, **change}
        formula = f"{buffers} x {sizes['batch']} x {sizes['top_k']} x {sizes['intermediate']} x {sizes['size']}"
        value = buffered_bytes(**sizes, buffers=buffers) / MIB
        published = Published({1: 3.5, 2: 7.0}[buffers], note="without top-k") if key in ("single", "double") else None
        figures.append(Figure(key, name, "MiB", value, formula=formula, study=published if s.study_sizes else None))
    return tuple(figures)


def _allocate(s: Settings, device: Device, buffers: int) -> int:
    """Bytes by which the allocator's count grows while `buffers` buffers live."""
    device.wait()
    before = device.allocated_bytes() or 0
    dtype = getattr(torch, s.dtype)
    made = [torch.empty(s.batch * s.top_k, s.intermediate, device=s.device, dtype=dtype) for _ in range(buffers)]
    grown = (device.allocated_bytes() or 0) - before
    del made
    return grown


def _peak(s: Settings, device: Device) -> int | None:
    if device.type not in ("cuda", "xpu"):
        return None
    layer, x = layers.of(s), layers.tokens(s, s.batch)
    if not isinstance(layer, DenseMoE) or not layer.grouped:
        return None
    weights, ids = layer.route(x)
    layer.together_grouped(x, weights, ids)  # a product's workspace is made once and kept
    return device.peak_bytes(lambda: layer.together_grouped(x, weights, ids))


MEMORY = Plan(
    "memory",
    "",
    "What buffering costs in memory",
    "How many bytes do single, double and N-fold buffers of a layer's intermediates take?",
    run,
    0.3,
)
EXPERIMENTS = (MEMORY,)
