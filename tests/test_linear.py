"""trellis_linear and its backward against the oracle: dtypes, shapes, strides, rates, padding, non-finite input,
batch invariance."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DTYPES, RATES, Backend, array, assert_close, ops, rate_id, same_bits

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 64, 70, 150)  # on both sides of any switch from decode to prefill


@cache
def weight(
    in_features: int, out_features: int, rate2: int, codebook: str, bias: bool = False, junk: bool = False
) -> ref.Packed:
    rng = np.random.default_rng([in_features, out_features, rate2, len(codebook)])
    return ref.random_packed(rng, in_features, out_features, rate2, codebook, bias, junk)


def inputs(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return backend.put(rng.normal(size=shape), dtype)


def check(backend: Backend, x: torch.Tensor, p: ref.Packed, out_features: int, what: str = "") -> torch.Tensor:
    """Runs the op on x [..., in] and compares with the oracle on the very values of x."""
    y = backend.linear(x, p, out_features)
    dtype = str(x.dtype).removeprefix("torch.")
    assert (y.dtype, y.device, y.shape) == (x.dtype, x.device, (*x.shape[:-1], out_features)), what
    assert y.is_contiguous(), what
    rows = array(x).reshape(-1, x.shape[-1])
    weight = backend.multiplied(p, len(rows))
    want = ref.linear(rows, weight, out_features)
    assert_close(
        y.reshape(-1, out_features), want, ref.rounded(ref.linear_bound(rows, weight, out_features), want, dtype), what
    )
    return y


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_rates_dtypes_rows(backend: Backend, rng: np.random.Generator, rate: tuple[int, str]) -> None:
    p = weight(256, 384, *rate)
    for dtype in DTYPES:
        for rows in ROWS if dtype == "float32" else (1, 6, 70):
            check(backend, inputs(backend, rng, (rows, 256), dtype), p, 384, f"{dtype}, {rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """More columns and rows of weights than one thread's share, and a bias."""
    for size_in, size_out in ((1280, 128), (128, 1920), (1152, 640)):
        p = weight(size_in, size_out, 5, "mul1", bias=True)
        for rows in (1, 40):
            check(
                backend,
                inputs(backend, rng, (rows, size_in), dtype),
                p,
                size_out,
                f"{size_in} x {size_out}, {rows} rows",
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_results_are_rounded_float32_ones(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Between reading x and writing y all is float32, so the half types give exactly the rounded float32 result."""
    p = weight(200, 384, 8, "mul1", bias=True)
    for rows in (1, 70):
        x = inputs(backend, rng, (rows, 200), dtype)
        assert same_bits(backend.linear(x, p, 384), backend.linear(x.float(), p, 384).to(x.dtype))
        grad = inputs(backend, rng, (rows, 384), dtype)
        back = [ops.trellis_linear_backward(g, *backend.packed(p), "mul1", 200) for g in (grad, grad.float())]
        assert same_bits(back[0], back[1].to(grad.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3), (1, 1, 2, 1)], ids=str)
def test_batch_shapes(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    p = weight(128, 256, 4, "mcg", bias=True)
    x = inputs(backend, rng, (*shape, 128), dtype)
    y = check(backend, x, p, 256)
    flat = backend.linear(x.reshape(-1, 128), p, 256)
    assert same_bits(y.reshape(-1, 256), flat), "the batch's shape is only a shape"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (100, 130), (127, 129), (129, 127), (200, 16), (16, 200), (384, 250)], ids=str
)
def test_padding(backend: Backend, rng: np.random.Generator, sizes: tuple[int, int], bias: bool) -> None:
    """Sizes that are not multiples of 128: NaN, Inf and huge numbers in the padding of suh, svh and bias stay there."""
    p = weight(*sizes, 6, "mul1", bias, junk=True)
    for dtype in DTYPES:
        for rows in (1, 5, 40):
            check(backend, inputs(backend, rng, (rows, sizes[0]), dtype), p, sizes[1], f"{dtype}, {rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Views give the bits of their contiguous copies."""
    p = weight(200, 256, 3, "mul1")
    whole = inputs(backend, rng, (6, 400, 5), dtype)
    views = {
        "every second feature": whole[:, ::2, 0],
        "transposed": whole[0, :200].t(),
        "permuted": whole[:, :200].permute(2, 0, 1),
        "offset": whole.permute(0, 2, 1)[1:, 2:, 37:237],
        "odd offset of a row": whole.reshape(-1)[1:601].reshape(3, 200),
        "expanded rows": whole[0, :200, 0].expand(4, 3, 200),
        "expanded features": whole[:, :1, 0].expand(6, 200),
        "one row of a slice": whole[2, 100:300, 3],
    }
    for name, x in views.items():
        y = check(backend, x, p, 256, name)
        assert same_bits(y, backend.linear(x.contiguous(), p, 256)), name


@pytest.mark.parametrize("rate", [(2, "3inst"), (4, "mul1"), (5, "mul1"), (12, "mcg")], ids=rate_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(cpu: Backend, rng: np.random.Generator, rate: tuple[int, str], dtype: str) -> None:
    """A row's result has the same bits alone, in any batch, and at any place of it."""
    p = weight(256, 384, *rate)
    x = inputs(cpu, rng, (max(ROWS), 256), dtype)
    y = cpu.linear(x, p, 384)
    for rows in ROWS:
        assert same_bits(cpu.linear(x[:rows], p, 384), y[:rows]), f"first {rows} of {max(ROWS)} rows"
        assert same_bits(cpu.linear(x[-rows:], p, 384), y[-rows:]), f"last {rows} of {max(ROWS)} rows"
    order = torch.from_numpy(rng.permutation(max(ROWS))).to(cpu.device)
    assert same_bits(cpu.linear(x[order], p, 384), y[order]), "permuted rows"


def test_more_rows_than_one_pass_holds(cpu: Backend, rng: np.random.Generator) -> None:
    """1100 rows, forward and backward: every part of the batch as if it were alone."""
    p = weight(128, 256, 5, "mul1", bias=True)
    x, grad = inputs(cpu, rng, (1100, 128), "float32"), inputs(cpu, rng, (1100, 256), "float32")
    y = check(cpu, x, p, 256)
    args = (*cpu.packed(p), "mul1", 128)
    dx = ops.trellis_linear_backward(grad, *args)
    for part in (slice(0, 1), slice(500, 520), slice(1023, 1100)):
        assert same_bits(cpu.linear(x[part], p, 256), y[part]), str(part)
        assert same_bits(ops.trellis_linear_backward(grad[part], *args), dx[part]), str(part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_input(backend: Backend, rng: np.random.Generator, poison: float, dtype: str) -> None:
    """As in a dense layer, one NaN or Inf makes its row non-finite, while other rows keep their bits."""
    p = weight(200, 130, 4, "mul1", bias=True)
    for rows in (1, 3, 40):
        x = inputs(backend, rng, (rows, 200), dtype)
        clean = backend.linear(x, p, 130)
        for row, feature in ((0, 0), (rows - 1, 199), (rows // 2, 128)):
            dirty = x.clone()
            dirty[row, feature] = poison
            y = backend.linear(dirty, p, 130)
            assert not torch.isfinite(y[row]).any(), f"row {row} of {rows}"
            others = torch.arange(rows) != row
            assert same_bits(y[others], clean[others]), f"row {row} of {rows} changed others"


def test_extreme_values(backend: Backend) -> None:
    """Dead outputs are exactly zero, too large ones become Inf, and float16 subnormals count, even if the processor
    flushes float32's."""
    p = weight(128, 128, 8, "mcg")
    svh = p.svh.copy()
    svh[::3] = 0
    x = np.random.default_rng(5).normal(size=(2, 128))
    y = backend.linear(backend.put(x, "float32"), ref.Packed(p.trellis, p.suh, svh, "mcg"), 128)
    assert (y[:, ::3] == 0).all()
    assert (y[:, 1::3] != 0).all()
    huge = backend.linear(
        backend.put(x * 1000, "float16"), ref.Packed(p.trellis, p.suh, (p.svh * 1000).astype(np.float16), "mcg"), 128
    )
    want = ref.linear(
        array(backend.put(x * 1000, "float16")),
        ref.Packed(p.trellis, p.suh, (p.svh * 1000).astype(np.float16), "mcg"),
        128,
    )
    sure = np.abs(want) > 66000
    assert sure.any()
    assert np.array_equal(array(huge)[sure], np.sign(want[sure]) * np.inf)
    tiny = ref.Packed(p.trellis, (p.suh.astype(np.float64) * 2.0**-14).astype(np.float16), p.svh, "mcg")
    small = backend.put(x * 2.0**-16, "float16")
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            check(backend, backend.put(x, "float32"), tiny, 128, f"subnormal suh, flush {flush}")
            check(backend, small, p, 128, f"subnormal x and y, flush {flush}")
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(256, 384), (200, 130)], ids=str)
def test_backward(cpu: Backend, rng: np.random.Generator, sizes: tuple[int, int], dtype: str) -> None:
    """grad W^T, that is the same chain with suh and svh exchanged; junk in the padding stays there here too."""
    for rate2, codebook in ((4, "mul1"), (7, "mul1"), (6, "3inst")):
        p = weight(*sizes, rate2, codebook, junk=True)
        for shape in ((), (0,), (1,), (2, 3), (40,)):
            grad = inputs(cpu, rng, (*shape, sizes[1]), dtype)
            got = ops.trellis_linear_backward(grad, *cpu.packed(p), codebook, sizes[0])
            assert got.dtype == grad.dtype
            assert got.shape == (*shape, sizes[0])
            rows = array(grad).reshape(-1, sizes[1])
            want = rows @ p.dense[: sizes[0], : sizes[1]].T
            suh, svh = p.suh[: sizes[0]].astype(np.float64), p.svh.astype(np.float64)
            scales = np.zeros(p.rotated.shape[0])
            scales[: sizes[0]] = suh
            bound = ref.chain_bound(rows, svh, p.rotated.T, scales)[:, : sizes[0]] + 4 * ref.F32 * np.abs(want)
            assert_close(
                got.reshape(-1, sizes[0]), want, ref.rounded(bound, want, dtype), f"{codebook} {rate2 / 2} {shape}"
            )


def test_backward_strides(cpu: Backend, rng: np.random.Generator) -> None:
    """Autograd hands over expanded gradients, such as that of sum()."""
    p = weight(200, 130, 4, "mul1")
    one = inputs(cpu, rng, (1, 1), "float32")
    args = (*cpu.packed(p), "mul1", 200)
    assert same_bits(
        ops.trellis_linear_backward(one.expand(3, 130), *args),
        ops.trellis_linear_backward(one.expand(3, 130).contiguous(), *args),
    )
