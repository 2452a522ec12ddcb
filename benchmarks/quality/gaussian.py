"""Weight error on Gaussian data: every codebook and rate, and the scalar formats, against the bound 2^(-2 R)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.quality.scalar import Scalar
from metal_marlin import _C, ops
from metal_marlin.quantize.matrix import BEST_RMS


@dataclass(frozen=True)
class Loss:
    """Mean squared error per variance of `name` at `bits`; `bound` is Shannon's for a Gaussian source."""

    name: str
    bits: float
    error: float

    @property
    def bound(self) -> float:
        return float(2 ** (-2 * self.bits))


def trellis(tiles: int, seed: int = 0) -> list[Loss]:
    """Every codebook at every rate, on `tiles` tiles of 256 weights; scales of rows and columns aren't counted."""
    data = torch.randn(tiles, 16, 16, generator=torch.Generator().manual_seed(seed))
    result = []
    for codebook in _C.CODEBOOKS:
        for rate2 in _C.RATES2[codebook]:
            scaled = data * BEST_RMS[codebook][rate2]
            values = ops.trellis_quantize(scaled, rate2, codebook)[1]
            error = float((scaled - values).square().mean() / scaled.square().mean())
            result.append(Loss(codebook, rate2 / 2, error))
    return result


def scalars(formats: list[Scalar], weights: int, seed: int = 0) -> list[Loss]:
    """The scalar formats on about `weights` weights, at their bits with scales."""
    data = torch.randn(max(1, weights // 256), 256, generator=torch.Generator().manual_seed(seed))
    power = data.square().mean()
    return [Loss(f.name, f.bits, float((data - f.round(data)).square().mean() / power)) for f in formats]
