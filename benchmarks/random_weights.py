"""Packed matrices of random bits, which are a legal trellis with the statistics of a real one."""

from __future__ import annotations

import torch

from metal_marlin import TrellisTensor


def random_tensor(k: int, n: int, codebook: str, bits: float, generator: torch.Generator) -> TrellisTensor:
    """A matrix [k, n] of random bits, scaled so that outputs have the size of inputs."""
    trellis = torch.randint(-(2**15), 2**15, (k // 16, n // 16, int(16 * bits)), dtype=torch.int16, generator=generator)
    suh = torch.randint(0, 2, (k,), generator=generator).mul(2).sub(1).div(k**0.5).half()
    svh = torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1).half()
    return TrellisTensor(trellis, suh, svh, codebook)
