"""One matrix, or a batch of equal size, to EXL3: rotations, channel scales, one global scale, error feedback, search.

Owns the numbers of the method and nothing of models or files. The search for a tile's bits is the op
`metal_marlin::trellis_quantize` in C; everything here feeds it. Sources: the format (docs/format.md); incoherence by
randomized Hadamard transforms and trellis codes, QTIP (arXiv:2406.11235); error feedback through the LDL factors of the
inputs' second moments, LDLQ, QuIP (arXiv:2307.13304).

W [k, n] is what y = x @ W multiplies with; it is coded as W = diag(suh) H What H diag(svh). With inputs of second
moments M = E[x^T x], the error that counts is tr((W - Wq)^T M (W - Wq)), called proxy error below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metal_marlin import _C

TILE, BLOCK = _C.TILE, _C.HADAMARD
COLUMN_CHUNK_BYTES = 2**28  # of one float32 working matrix in the feedback loop
RIDGE = 0.03  # added to M's diagonal, as a share of its mean
BALANCE = 0.25  # how much of the inputs' sizes goes into suh; 0: none, each row of What gets the same variance
SAMPLE_TILES = 12  # of each matrix, to find its scale
DEAD = 1e-7  # a channel whose weights are smaller than this share of the mean channel's is as good as zero
TINY = 1e-12  # so is one whose weights are smaller than this: two float16 scales reach no further
SPREAD = 0.12  # the scale is sought in this range around the Gaussian optimum

# Mean squared error per variance of a Gaussian source, and the standard deviation at which it is best, by 2 * bits.
# Measured with the format's search on 200 tiles; half rates and what lies between by interpolation in the logarithm.
DISTORTION = {2: 0.2723, 3: 0.1366, 4: 0.0683, 5: 0.0345, 6: 0.01738, 7: 0.0088, 8: 0.00446, 10: 0.001147}
DISTORTION |= {12: 0.000298, 14: 0.0000789, 16: 0.0000206}
BEST_RMS = {
    "mul1": {2: 1.12, 3: 1.04, 4: 0.98, 5: 0.95, 6: 0.93, 7: 0.935, 8: 0.94, 10: 0.87, 12: 0.85, 14: 0.82, 16: 0.82},
    "mcg": {2: 1.43, 4: 1.22, 6: 1.16, 8: 1.15, 10: 1.08, 12: 1.01, 14: 0.97, 16: 0.97},
}
BEST_RMS["3inst"] = BEST_RMS["mcg"]

# (tiles float32 [count, 16, 16], rate2, codebook) -> (packed int16 [count, 8 * rate2], values float32 [count, 16, 16])
Search = Callable[[Tensor, int, str], tuple[Tensor, Tensor]]


@dataclass
class Coded:
    """One coded matrix: trellis int16 [k/16, n/16, 8 * rate2], suh float16 [k], svh float16 [n].

    proxy   proxy error per proxy energy tr(W^T M W), with M as given (0: exact, 1: as bad as zeros)
    weight  squared error per squared weight
    """

    trellis: Tensor
    suh: Tensor
    svh: Tensor
    proxy: float
    weight: float


def trellis_search(tiles: Tensor, rate2: int, codebook: str) -> tuple[Tensor, Tensor]:
    """The search in C."""
    from metal_marlin import ops

    packed, values = ops.trellis_quantize(tiles, rate2, codebook)
    return packed, values


def gaussian_search(seed: int = 0) -> Search:
    """Stands in for the search: adds white noise of its size on Gaussian data, and no bits. For estimates."""
    generator = torch.Generator().manual_seed(seed)

    def search(tiles: Tensor, rate2: int, codebook: str) -> tuple[Tensor, Tensor]:
        size = math.sqrt(DISTORTION[rate2]) * BEST_RMS[codebook][rate2]
        noise = torch.randn(tiles.shape, generator=generator)
        return torch.empty(len(tiles), 0, dtype=torch.int16), tiles + size * noise

    return search


@functools.cache
def hadamard() -> Tensor:
    """float32 [128, 128], Sylvester's order, orthogonal."""
    h = torch.ones(1, 1)
    while len(h) < BLOCK:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(BLOCK)


def rotate_rows(a: Tensor) -> Tensor:
    """Every block of 128 along the last axis times H."""
    return (a.reshape(*a.shape[:-1], -1, BLOCK) @ hadamard()).reshape(a.shape)


def rotate_columns(a: Tensor) -> Tensor:
    """H times every block of 128 along the last axis but one."""
    *batch, k, n = a.shape
    return (hadamard() @ a.reshape(*batch, k // BLOCK, BLOCK, n)).reshape(a.shape)


def feedback(m: Tensor) -> Tensor:
    """L of M = L D L^T with D block diagonal in blocks of 16; L's diagonal blocks are identities, returned as zeros.

    m [B, k, k], positive definite. LinAlgError if it isn't.
    """
    batch, k, _ = m.shape
    c = torch.linalg.cholesky(m)
    blocks = c.view(batch, k // TILE, TILE, k // TILE, TILE)
    diagonal = torch.diagonal(blocks, dim1=1, dim2=3).permute(0, 3, 1, 2)  # [B, k/16, 16, 16]
    eye = torch.eye(TILE).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal, eye, upper=False)
    blocks = torch.einsum("brisj,bsjl->brisl", blocks, inverse)
    torch.diagonal(blocks, dim1=1, dim2=3).zero_()
    return blocks.reshape(batch, k, k)


def random_signs(size: int, seed: int) -> Tensor:
    """+-1, float32 [size]."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).float().mul_(2).sub_(1)


def quantize_matrices(
    weights: Tensor,
    moments: Tensor | None,
    rate2: int,
    codebook: str,
    seeds: Sequence[int],
    *,
    search: Search = trellis_search,
    tick: Callable[[int], None] = lambda tiles: None,
) -> tuple[list[Coded], Tensor]:
    """Codes weights, float32 [B, k, n] with k and n multiples of 128, at rate2 / 2 bits.

    moments  M of each, float32 [B, k, k] or [1, k, k]; None: the identity
    seeds    of the random signs, one for each matrix
    tick     is told how many tiles have been searched since the last call

    Returns them and, float32 [B, k, n], the matrices that their codes stand for.
    """
    batch, k, n = weights.shape
    m = _regularized(moments, k)
    signs = torch.stack([random_signs(k + n, seed) for seed in seeds])
    # output channels: equal column sizes; a dead channel is exactly zero, whatever its codes say
    size = weights.square().mean(1).sqrt()  # [B, n]
    mean = size.mean(1, keepdim=True)
    alive = size > (DEAD * mean).clamp_min(TINY)
    svh = signs[:, k:] * torch.where(alive, size / mean.clamp_min(1e-30), 0.1)
    w = rotate_rows(torch.where(alive, 1.0, 0.0).unsqueeze(1) * weights / svh.unsqueeze(1))
    # input channels
    rows = w.square().mean(2).sqrt()  # [B, k]
    used = rows > DEAD * rows.mean(1, keepdim=True)  # scales of what is smaller would not fit float16 beside the others
    typical = rows.sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp_min(1)
    rows = torch.where(used, rows, torch.where(typical > 0, 0.1 * typical, 1.0))
    suh = rows
    if m is not None:
        input_size = torch.diagonal(m, dim1=1, dim2=2).sqrt()  # [B, k]
        suh = rows * (rows * input_size / (rows * input_size).log().mean(1, keepdim=True).exp()).pow(-BALANCE)
    source = (w / suh.unsqueeze(2)).square().mean((1, 2)).sqrt()  # RMS per unit of suh
    target = BEST_RMS[codebook][rate2]
    suh = suh * torch.where(source > 0, source / target, 1.0).unsqueeze(1)
    shift = _shift(suh)
    svh, w = svh / shift, w * shift.unsqueeze(2)
    suh = ((suh * shift).clamp_min(2.0**-24) * signs[:, :k]).half().float()
    factor = None if m is None else _feedback_of(m, suh)
    found = _scale(_rotated(w, suh), factor, rate2, codebook, search, tick)
    suh = (suh / found.unsqueeze(1)).half().float()
    w = _rotated(w, suh)
    trellis = torch.empty(batch, k // TILE, n // TILE, 8 * rate2, dtype=torch.int16)
    what = torch.empty_like(w)
    chunk = max(1, COLUMN_CHUNK_BYTES // (4 * batch * k * TILE)) * TILE
    for begin in range(0, n, chunk):
        columns = slice(begin, min(begin + chunk, n))
        codes = trellis[:, :, columns.start // TILE : columns.stop // TILE]
        _feed_back(w[:, :, columns], factor, what[:, :, columns], codes, rate2, codebook, search, tick)
    # back: the output scales that are best for these codes
    q = rotate_rows(rotate_columns(what) * suh.unsqueeze(2))
    mq = q if m is None else m @ q
    power = (q * mq).sum(1)
    best = (weights * mq).sum(1) / power.clamp_min(1e-30)
    ratio = (best / svh).clamp(0.5, 2.0)
    svh = torch.where(alive & (power > 0), svh * ratio, 0.0).half()
    coded = q * svh.float().unsqueeze(1)
    error = weights - coded
    exact = moments if moments is not None else None
    loss, energy = (((a * (a if exact is None else exact @ a)).double().sum((1, 2))) for a in (error, weights))
    proxy = (loss / energy.clamp_min(1e-300)).tolist()
    plain = (error.double().square().sum((1, 2)) / weights.double().square().sum((1, 2)).clamp_min(1e-300)).tolist()
    halves = suh.half()
    result = [Coded(trellis[b], halves[b], svh[b], proxy[b], plain[b]) for b in range(batch)]
    return result, coded


def _regularized(moments: Tensor | None, k: int) -> Tensor | None:
    """Adds RIDGE; where nothing was seen (or nothing finite), the identity."""
    if moments is None:
        return None
    mean = torch.diagonal(moments, dim1=1, dim2=2).mean(1)
    good = (mean > 1e-20) & torch.isfinite(moments).all(-1).all(-1)
    eye = torch.eye(k)
    scaled = torch.where(good[:, None, None], moments, eye) / torch.where(good, mean, 1.0)[:, None, None]
    return scaled + RIDGE * eye


def _shift(suh: Tensor) -> Tensor:
    """[B, 1] the power of two that takes tiny scales to where float16 has all its bits, and large ones below its
    largest number; svh makes up for it."""
    up = (-13 - suh.amin(1, keepdim=True).log2()).ceil().clamp(0, 24)
    return torch.exp2(torch.minimum(up, (14 - suh.amax(1, keepdim=True).log2()).floor()))


def _rotated(w: Tensor, suh: Tensor) -> Tensor:
    return rotate_columns(w / suh.unsqueeze(2))


def _feedback_of(m: Tensor, suh: Tensor) -> Tensor:
    """L of the rotated inputs' second moments, scales included."""
    scaled = m * (suh.unsqueeze(2) * suh.unsqueeze(1))
    scaled = rotate_rows(rotate_columns(scaled))
    scaled = (scaled + scaled.mT) / 2
    ridge = torch.diagonal(scaled, dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(scaled.shape[-1])
    for share in (0.0, 1e-4, 1e-2):
        try:
            return feedback(scaled + share * ridge)
        except RuntimeError:  # LinAlgError is one
            continue
    raise ValueError("second moments of the inputs: not positive definite, even with 1 % on the diagonal")


def _scale(
    w: Tensor, factor: Tensor | None, rate2: int, codebook: str, search: Search, tick: Callable[[int], None]
) -> Tensor:
    """[B] the factor on w that codes best: a parabola through three scales of sample tiles around the Gaussian optimum.

    What is coded is w plus errors fed back, whose variance the factors give: the sample stands for both.
    """
    batch, k, n = w.shape
    inflation = torch.ones(batch)
    if factor is not None:
        inflation = (1 + DISTORTION[rate2] * factor.square().sum((1, 2)) / k).sqrt()
    if rate2 > 8 or search is not trellis_search:  # the optimum is flat there
        return 1 / inflation
    tiles = w.view(batch, k // TILE, TILE, n // TILE, TILE).permute(0, 1, 3, 2, 4).reshape(batch, -1, TILE, TILE)
    count = min(SAMPLE_TILES, tiles.shape[1])
    sample = tiles[:, torch.linspace(0, tiles.shape[1] - 1, count).long()]
    scales = torch.tensor([1 - SPREAD, 1.0, 1 + SPREAD])
    tried = (sample.unsqueeze(0) * scales.view(3, 1, 1, 1, 1)).reshape(-1, TILE, TILE).contiguous()
    values = search(tried, rate2, codebook)[1]
    tick(len(tried))
    low, middle, high = (tried - values).view(3, batch, -1).double().square().sum(2) / scales.view(3, 1).double() ** 2
    curve = low - 2 * middle + high
    step = torch.where(curve > 0, (low - high) / (2 * curve.clamp_min(1e-300)), torch.zeros(()).double())
    return (1 + SPREAD * step.clamp(-1, 1)).float() / inflation


def _feed_back(
    w: Tensor,
    factor: Tensor | None,
    what: Tensor,
    codes: Tensor,
    rate2: int,
    codebook: str,
    search: Search,
    tick: Callable[[int], None],
) -> None:
    """Codes strips of 16 rows from the last to the first, each with the errors of the later ones fed back."""
    batch, k, n = w.shape
    error = torch.zeros(batch, k, n)
    for r in reversed(range(0, k, TILE)):
        strip = w[:, r : r + TILE]
        if factor is not None and r + TILE < k:
            strip = strip + factor[:, r + TILE :, r : r + TILE].mT @ error[:, r + TILE :]
        tiles = strip.reshape(batch, TILE, n // TILE, TILE).transpose(1, 2).reshape(-1, TILE, TILE).contiguous()
        packed, values = search(tiles, rate2, codebook)
        tick(len(tiles))
        values = values.view(batch, n // TILE, TILE, TILE).transpose(1, 2).reshape(batch, TILE, n)
        what[:, r : r + TILE] = values
        error[:, r : r + TILE] = w[:, r : r + TILE] - values
        if packed.shape[1]:
            codes[:, r // TILE] = packed.view(batch, n // TILE, -1)
