"""Which rate each group of matrices gets: a budget of bits spent where it lowers the error most.

Owns the groups' measured errors, the allocation, recipes, and what is printed of them. A group is what must or should
share a rate: q, k and v of a layer; o; gate and up of its dense or shared feed-forward part; all experts' gate and up;
all experts' down (exllamav3 reads the experts of a projection with one kernel and refuses a layer that mixes rates
there). Bits are counted as exllamav3 counts them: coded weights of all linear layers but the head, without scales.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metal_marlin import _C
from metal_marlin.hf_plan import PROJECTIONS
from metal_marlin.quantize.calibrate import Calibration, Routed
from metal_marlin.quantize.matrix import DISTORTION, gaussian_search, quantize_matrices
from metal_marlin.quantize.source import HEAD, Experts, Matrix, Part, Source

MEASURED_TOKENS = 16384
# Without calibration: how much an error in a weight counts, by what the group is called; measured on small models
GUESSED = (("experts.", 1.0), ("shared_expert", 8.0), ("mlp.", 2.0), ("", 8.0))


def groups_of(source: Source) -> dict[str, list[Matrix]]:
    """{group: its matrices}, in the model's order; the head apart."""
    result: dict[str, list[Matrix]] = {}
    for matrix in source.everything():
        result.setdefault(matrix.group, []).append(matrix)
    return result


def mean_bits(source: Source, rates: dict[str, int]) -> float:
    """Bits per weight of all linear layers but the head."""
    counted = [m for m in source.everything() if m.group != HEAD]
    return sum(m.weights * rates[m.group] for m in counted) / 2 / max(1, sum(m.weights for m in counted))


def uniform(source: Source, bits: float, head_bits: float) -> dict[str, int]:
    """The same rate everywhere."""
    return {group: round(2 * (head_bits if group == HEAD else bits)) for group in groups_of(source)}


def from_recipe(source: Source, recipe: dict[str, Any], codebook: str, head_bits: float) -> dict[str, int]:
    """{"rates": {pattern: bits}}: every group by the last pattern (fnmatch) that it matches; the head may be left out.

    ValueError: malformed, a rate that the codebook lacks, a pattern without groups, a group without a rate.
    """
    patterns = recipe.get("rates")
    if not isinstance(patterns, dict) or not all(type(bits) in (int, float) for bits in patterns.values()):
        raise ValueError(f"recipe: rates is {patterns!r}; expected a table of group or pattern and bits")
    groups = groups_of(source)
    rates = {HEAD: round(2 * head_bits)} if HEAD in groups else {}
    for pattern, bits in patterns.items():
        if 2 * bits not in _C.RATES2[codebook]:
            allowed = ", ".join(f"{rate / 2:g}" for rate in _C.RATES2[codebook])
            raise ValueError(f"recipe: {pattern} has {bits:g} bits; expected, for {codebook}, one of {allowed}")
        found = [group for group in groups if fnmatch.fnmatchcase(group, pattern)]
        if not found:
            raise ValueError(f"recipe: {pattern} matches none of the groups {', '.join(list(groups)[:6])}, ...")
        rates |= dict.fromkeys(found, round(2 * bits))
    missing = [group for group in groups if group not in rates]
    if missing:
        raise ValueError(f"recipe: gives no rate for {', '.join(missing[:6])}; expected one for every group")
    return rates


def allocate(
    source: Source, errors: dict[str, float] | None, bits: float, head_bits: float, codebook: str
) -> dict[str, int]:
    """Rates with mean_bits at most `bits` that minimize the sum of the groups' errors.

    errors  of each group at distortion 1 (`measure`); None: guessed from what groups are called. From the lowest rates,
            the step that gains most per bit comes first: the optimum, but for the last step, as distortion is convex
    """
    groups = {group: found for group, found in groups_of(source).items() if group != HEAD}
    sizes = {group: sum(m.weights for m in found) for group, found in groups.items()}
    if errors is None:
        total = sum(sizes.values())
        errors = {g: next(f for word, f in GUESSED if word in g) * size / total for g, size in sizes.items()}
    steps = _C.RATES2[codebook]
    rates = dict.fromkeys(groups, steps[0])
    left = 2 * bits * sum(sizes.values()) - sum(steps[0] * size for size in sizes.values())
    while True:
        best: tuple[float, str, int] | None = None
        for group, size in sizes.items():
            at = steps.index(rates[group])
            if at + 1 == len(steps) or (steps[at + 1] - steps[at]) * size > left + 1e-6:
                continue
            step = steps[at + 1] - steps[at]
            gain = errors[group] * (DISTORTION[steps[at]] - DISTORTION[steps[at + 1]]) / (step * size)
            if best is None or gain > best[0]:
                best = (gain, group, step)
        if best is None:
            break
        rates[best[1]] += best[2]
        left -= best[2] * sizes[best[1]]
    if any(m.group == HEAD for m in source.everything()):
        rates[HEAD] = round(2 * head_bits)
    return rates


@torch.no_grad()
def measure(source: Source, rows: Tensor, codebook: str, bits: float) -> dict[str, float]:
    """{group: squared error of its layer's output, relative to that output, per unit of distortion}.

    A few calibration rows go through the unquantized model. In each layer every group in turn goes through the whole
    method with Gaussian noise for the search, so the error has the shape that feedback gives it, and the layer runs.
    """
    count = min(-(-MEASURED_TOKENS // rows.shape[1]), len(rows))
    state = Calibration(source, rows[torch.linspace(0, len(rows) - 1, count).round().long()])
    rate2 = min(_C.RATES2[codebook], key=lambda rate: abs(rate / 2 - bits))
    result: dict[str, float] = {}
    for part in source.layers:
        state.load(part)
        moments = _moments(state, part)
        before = state.outputs(part, count)
        size = before.square().sum(-1)
        found: dict[str, list[Matrix]] = {}
        for matrix in part.everything():
            found.setdefault(matrix.group, []).append(matrix)
        for group, matrices in found.items():
            kept = [state.get(matrix) for matrix in matrices]
            for matrix, weight in zip(matrices, kept, strict=True):
                padded = torch.zeros(1, matrix.k, matrix.n)
                padded[0, : matrix.in_features, : matrix.out_features] = weight
                search = gaussian_search(matrix.seed)
                _, coded = quantize_matrices(
                    padded, moments(matrix)[None], rate2, codebook, [matrix.seed], search=search
                )  # fmt: skip
                state.put(matrix, coded[0, : matrix.in_features, : matrix.out_features].contiguous())
            change = (state.outputs(part, count) - before).square().sum(-1) / size.clamp_min(1e-30)
            result[group] = float(change.mean()) / DISTORTION[rate2]
            for matrix, weight in zip(matrices, kept, strict=True):
                state.put(matrix, weight)
        state.state = before
        state.unload(part)
    return result


def _moments(state: Calibration, part: Part) -> Callable[[Matrix], Tensor]:
    """Second moments of every matrix's inputs in the unquantized layer; those of experts when asked for."""
    dense, records = state.moments(part, part.matrices, record_experts=bool(part.experts))
    routed = {path: Routed(calls) for path, calls in records.items()}
    places: dict[str, tuple[Experts, int, str]] = {}
    for experts in part.experts:
        for (e, projection), matrix in experts.matrices.items():
            places[matrix.name] = (experts, e, projection)

    def moments(matrix: Matrix) -> Tensor:
        if matrix.name in dense:
            return dense[matrix.name]
        experts, e, projection = places[matrix.name]
        stand_in: Any = state.source.model.get_submodule(experts.path)
        inner = (lambda x: stand_in.inner(x, e)) if projection == PROJECTIONS[2] else None
        return routed[experts.path].moments(e, matrix.k, inner)[0]

    return moments


def describe(source: Source, rates: dict[str, int], codebook: str) -> list[str]:
    """The plan, as lines: for every kind of group how many layers have it, at which rates, and the mean."""
    kinds: dict[str, list[str]] = {}
    for group in groups_of(source):
        kind = ".".join("*" if word.isdigit() else word for word in group.split("."))
        kinds.setdefault(kind, []).append(group)
    lines = [f"rates        {mean_bits(source, rates):.4g} bits per weight, codebook {codebook}"]
    for kind, groups in kinds.items():
        values = [rates[group] / 2 for group in groups]
        shown = " ".join(f"{value:g}" for value in values) if len(set(values)) > 1 else f"{values[0]:g}"
        lines.append(f"  {kind:<42} {shown}")
    return lines
