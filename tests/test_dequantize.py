"""dequantize: the dense weight of every rate, cropped sizes, and that it is the matrix which trellis_linear
multiplies by."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
import torch
from conftest import RATES, Backend, array, assert_close, ops, rate_id


def bound(p: ref.Packed) -> np.ndarray:
    """18 roundings: two rotations of 7 sums and a scaling, two scales. The transform keeps lengths, so a rounding
    moves an element by about F32 times the root mean square of its 128 x 128 block; the bound lets all 18 agree in
    sign, at four times that size."""
    k, n = p.rotated.shape
    blocks = p.rotated.reshape(k // 128, 128, n // 128, 128)
    rms = np.sqrt((blocks**2).mean(axis=(1, 3), keepdims=True)).repeat(128, 1).repeat(128, 3).reshape(k, n)
    return 4 * 18 * ref.F32 * np.abs(p.suh.astype(np.float64))[:, None] * rms * np.abs(p.svh.astype(np.float64))


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_rates(backend: Backend, rng: np.random.Generator, rate: tuple[int, str]) -> None:
    p = ref.random_packed(rng, 256, 384, *rate)
    w = ops.dequantize(*backend.packed(p), p.codebook, 256, 384)
    assert w.dtype == torch.float32
    assert w.shape == (256, 384)
    assert w.is_contiguous()
    assert_close(w, p.dense, bound(p))


@pytest.mark.parametrize("sizes", [(1, 1), (100, 130), (129, 127), (16, 384)], ids=str)
def test_padding(backend: Backend, rng: np.random.Generator, sizes: tuple[int, int]) -> None:
    """Cropping removes what padding holds, in both domains."""
    p = ref.random_packed(rng, *sizes, 5, "mul1", junk=True)
    w = ops.dequantize(*backend.packed(p), "mul1", *sizes)
    crop = np.s_[: sizes[0], : sizes[1]]
    assert w.shape == sizes
    assert_close(w, p.dense[crop], bound(p)[crop])
    empty = backend.put(None)
    rotated = ops.dequantize(backend.put(p.trellis), empty, empty, "mul1", *sizes)
    assert np.array_equal(array(rotated), p.rotated[crop])


def test_is_the_matrix_of_the_linear(backend: Backend, rng: np.random.Generator) -> None:
    """The rows of the identity, sent through trellis_linear, are the rows of the weight."""
    p = ref.random_packed(rng, 200, 300, 7, "mul1")
    y = backend.linear(backend.put(np.eye(200), "float32"), p, 300)
    w = ops.dequantize(*backend.packed(p), "mul1", 200, 300)
    used = backend.multiplied(p, 200)
    rounding = np.abs(used.dense - p.dense)[:200, :300]  # what this backend leaves out
    assert_close(y, array(w), bound(p)[:200, :300] + ref.linear_bound(np.eye(200), used, 300) + rounding)


def test_one_empty_scale(backend: Backend, rng: np.random.Generator) -> None:
    """Both scales empty mean the rotated domain; only one of them empty is a mistake."""
    trellis, suh, svh = backend.packed(ref.random_packed(rng, 128, 128, 4, "mcg"))
    empty = backend.put(None)
    for scales, name in (((suh, empty), "svh"), ((empty, svh), "suh")):
        with pytest.raises(RuntimeError, match=name):
            ops.dequantize(trellis, *scales, "mcg", 128, 128)
