"""Medians, quartiles and bootstrap intervals. Owns the statistics; knows nothing of what the numbers mean.

Medians throughout, since timings have a long tail to one side: one sample in which the system did something else
moves a mean by any amount and a median by one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95
FEW = 20  # samples, below which blocks would leave too few different resamples


class Quartiles(NamedTuple):
    """The median and the middle half, in the unit of the samples."""

    low: float
    median: float
    high: float


class Interval(NamedTuple):
    """A statistic of the samples and its bootstrap confidence interval, in one unit."""

    value: float
    low: float
    high: float


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Quartiles with linear interpolation between ranks (Hyndman and Fan's type 7). ValueError: no samples."""
    if not len(samples):
        raise ValueError("no samples; expected at least one")
    return Quartiles(*(float(value) for value in np.quantile(np.asarray(samples, float), (0.25, 0.5, 0.75))))


def bootstrap(
    statistic: Callable[..., Any],
    *columns: Sequence[float],
    paired: bool = True,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    block: int | None = None,
) -> Interval:
    """`statistic` of the medians of `columns`, with its percentile bootstrap interval (Efron 1979), drawn in blocks.

    statistic  maps one number or array per column, elementwise, to the same shape: lambda a, b: (a - b) / b
    paired     sample i of every column comes from one round of measuring: rounds are resampled whole, so what slowed
               a whole round (a clock that dropped) cancels in differences and ratios. Needs columns of one length.
    seed       the interval is a function of the samples and of this alone
    block      consecutive rounds that are drawn together (the circular block bootstrap, Politis and Romano 1992): a
               machine that is slow for ten rounds gives ten samples that count for little more than one, and drawing
               them singly would make the interval too narrow. Default: `block_of` the number of samples

    With one sample the interval has no width to speak of; the caller says how many there were. ValueError: no
    columns, an empty one, or paired ones of different lengths.
    """
    arrays = [np.asarray(column, float) for column in columns]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("no samples; expected at least one in every column")
    if paired and len({array.size for array in arrays}) > 1:
        raise ValueError(f"paired columns have {[a.size for a in arrays]} samples; expected equally many")
    generator = np.random.default_rng(seed)
    picks = _picks(generator, arrays[0].size, resamples, block)
    medians = []
    for index, array in enumerate(arrays):
        if index and not paired:
            picks = _picks(generator, array.size, resamples, block)
        medians.append(np.median(array[picks], axis=1))
    draws = np.asarray(statistic(*medians), float)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return Interval(float(statistic(*(np.median(array) for array in arrays))), float(low), float(high))


def block_of(count: int) -> int:
    """The default block: the square root of the number of samples; single samples where there are few."""
    return round(count**0.5) if count >= FEW else 1


def _picks(generator: np.random.Generator, count: int, resamples: int, block: int | None) -> Any:
    """Indices [resamples, count]: blocks that begin anywhere and go on at the front when they reach the end."""
    length = min(block or block_of(count), count)
    starts = generator.integers(0, count, (resamples, -(-count // length), 1))
    return ((starts + np.arange(length)) % count).reshape(resamples, -1)[:, :count]
