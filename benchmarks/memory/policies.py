"""Cache policies on routing traces, offline: hit rates of least recently used, ours, Belady's optimum, and look-ahead.

A trace is int64 [tokens, layers, top_k]: the experts that each token used. The cache is one for all layers, as
CachedWeightBuffers is. `ours` is the rule of csrc/memory/cache.c, written again: a use counts half after `half_life`
uses of anything. Reads ahead are taken to arrive in time, so rates with look-ahead are upper bounds; what they cost is
`reads`, with those that were in vain.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Trace = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Of one policy on one trace: uses that found their expert, and experts read, both for each use."""

    hits: float
    reads: float


def items_of(trace: Trace, experts: int) -> list[list[int]]:
    """The trace as one list of item numbers for each layer of each token."""
    tokens, layers, top_k = trace.shape
    flat = trace + experts * np.arange(layers)[None, :, None]
    return [list(step) for step in flat.reshape(tokens * layers, top_k).tolist()]


def replay(
    trace: Trace,
    experts: int,
    slots: int,
    *,
    half_life: float | None = None,
    ahead: Trace | None = None,
    protect: int = 4,
) -> Outcome:
    """Least recently used if half_life is None, else ours; `ahead` [tokens, layers, n]: read before it, -1: none."""
    steps = items_of(trace, experts)
    wanted: list[list[int]] = [[] for _ in steps]
    if ahead is not None:
        wanted = [[i for i in step if i >= 0] for step in _shift(ahead, experts)]
    worth: dict[int, float] = {}
    last: dict[int, int] = {}
    fresh: dict[int, int] = {}  # read ahead at this step and not used since
    here: set[int] = set()
    hits = reads = uses = tick = 0

    def protected(item: int, now: int) -> bool:
        return item in fresh and now - fresh[item] <= protect

    def victim(kept: set[int], now: int) -> int | None:
        free = [i for i in here if i not in kept]
        if not free:
            return None
        if half_life is None:
            return min(free, key=lambda i: (protected(i, now), last.get(i, -1)))
        return min(free, key=lambda i: (protected(i, now), worth.get(i, -math.inf), last.get(i, -1)))

    for now, (step, guess) in enumerate(zip(steps, wanted, strict=True)):
        for item in guess:
            if item not in here:
                if len(here) >= slots:
                    out = victim(set(fresh), now)
                    if out is None:
                        break
                    here.discard(out)
                here.add(item)
                fresh[item] = now
                reads += 1
        kept = set(step)
        for item in step:
            uses += 1
            tick += 1
            if item in here:
                hits += 1
            else:
                if len(here) >= slots:
                    out = victim(kept, now)
                    assert out is not None, "fewer slots than experts of a step"
                    here.discard(out)
                    fresh.pop(out, None)
                here.add(item)
                reads += 1
            fresh.pop(item, None)
            last[item] = tick
            if half_life is not None:
                age = tick / half_life
                worth[item] = math.log2(2 ** max(worth.get(item, -math.inf) - age, -1000) + 1) + age
    return Outcome(hits / uses, reads / uses)


def belady(trace: Trace, experts: int, slots: int) -> Outcome:
    """The offline optimum: evicts what is used again last (Belady, IBM Systems Journal 5(2), 1966)."""
    flat = [item for step in items_of(trace, experts) for item in step]
    following, seen = [len(flat)] * len(flat), dict[int, int]()
    for place in range(len(flat) - 1, -1, -1):
        following[place] = seen.get(flat[place], len(flat) + flat[place])
        seen[flat[place]] = place
    here: dict[int, int] = {}
    queue: list[tuple[int, int]] = []
    hits = 0
    for place, item in enumerate(flat):
        if item in here:
            hits += 1
        elif len(here) >= slots:
            while True:
                use, out = heapq.heappop(queue)
                if here.get(out) == -use:
                    del here[out]
                    break
        here[item] = following[place]
        heapq.heappush(queue, (-following[place], item))
    return Outcome(hits / len(flat), 1 - hits / len(flat))


def _shift(ahead: Trace, experts: int) -> list[list[int]]:
    tokens, layers, count = ahead.shape
    flat = np.where(ahead >= 0, ahead + experts * np.arange(layers)[None, :, None], -1)
    return [list(step) for step in flat.reshape(tokens * layers, count).tolist()]


def previous_token(trace: Trace) -> Trace:
    """The guess that a token uses the experts of the one before it; the first token has none."""
    return np.concatenate([np.full_like(trace[:1], -1), trace[:-1]])


def accuracy(ahead: Trace, trace: Trace) -> float:
    """The part of the experts used that was guessed."""
    found = (ahead[:, :, :, None] == trace[:, :, None, :]).any(2)
    return float(found.mean())


def random_trace(
    tokens: int, layers: int, experts: int, top_k: int, *, skew: float = 0.6, sticky: float = 0.4, seed: int = 0
) -> Trace:
    """Routing of a larger model, made up: each layer has favourites (Zipf with exponent `skew`, in its own order), and
    each slot keeps its expert from token to token with probability `sticky`."""
    rng = np.random.default_rng(seed)
    odds = np.arange(1, experts + 1) ** -skew
    odds = np.stack([rng.permutation(odds / odds.sum()) for _ in range(layers)])
    trace = np.empty((tokens, layers, top_k), np.int64)
    for token in range(tokens):
        keys = np.log(odds) + rng.gumbel(size=odds.shape)  # Gumbel top-k: sampling without replacement
        if token:
            for layer in range(layers):
                keep = trace[token - 1, layer][rng.random(top_k) < sticky]
                keys[layer, keep] = math.inf
        trace[token] = np.argsort(-keys, axis=1)[:, :top_k]
    return trace


def table(trace: Trace, experts: int, part: float, half_life: float, guesses: dict[str, Trace]) -> dict[str, Any]:
    """All policies at one size of cache, `part` of the experts: {policy: Outcome}."""
    slots = max(trace.shape[2], round(part * experts * trace.shape[1]))
    rows: dict[str, Any] = {
        "least recently used": replay(trace, experts, slots),
        "ours": replay(trace, experts, slots, half_life=half_life * slots),
        "Belady's optimum": belady(trace, experts, slots),
    }
    for name, guess in guesses.items():
        rows[f"ours, {name}"] = replay(trace, experts, slots, half_life=half_life * slots, ahead=guess)
    return rows
