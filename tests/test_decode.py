"""Decoding is exact: every codebook value and every golden tile, bit for bit, on every backend and SIMD level.

Other files use the oracle of reference.py; this one also pins the oracle itself to the golden data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import reference as ref
import torch
from conftest import GOLDEN, RATES, Backend, array, assert_close, ops, rate_id
from safetensors.numpy import load_file

import metal_marlin._C as _C

# SHA-256 of the 65,536 values as little-endian float16, from the format's description
TABLES = {
    "3inst": "ad88de2dcff5bb05fff2faec37cceceb43aa1c2e8203f9d81a6fbd6dd3393eea",
    "mcg": "95383563929baa9d1ae5de0be22490284382673620bdd85929feea7bdbef04a9",
    "mul1": "bc48d02cb1c14939dc47b90f870dd689d63e3b1ab69a157e65538db68677a6c8",
}
ZERO_STATES = {"3inst": 9, "mcg": 12, "mul1": 0}  # how many states mean 0


@pytest.fixture(params=[False, True], ids=["", "flush_denormal"])
def flush(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once as usual and once with the processor told to flush float32 subnormals, which must not touch float16 ones."""
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


def decode(backend: Backend, trellis: np.ndarray, codebook: str) -> np.ndarray:
    """float16 [rows, columns]: the codebook's values of any number of tiles, which the op wants in multiples of 8 x
    8."""
    rows, columns, width = trellis.shape
    full = np.zeros((ref.pad128(16 * rows) // 16, ref.pad128(16 * columns) // 16, width), np.int16)
    full[:rows, :columns] = trellis
    empty = backend.put(None)
    got = ops.dequantize(backend.put(full), empty, empty, codebook, 16 * rows, 16 * columns)
    assert got.dtype == torch.float32
    assert got.shape == (16 * rows, 16 * columns)
    values = got.cpu().numpy()
    half = values.astype(np.float16)
    assert np.array_equal(half.astype(np.float32).view(np.int32), values.view(np.int32)), (
        "a value that float16 does not have"
    )
    return half


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    different = np.argwhere(got.view(np.uint16) != want.view(np.uint16))
    first = tuple(different[0]) if len(different) else ()
    assert len(different) == 0, f"{len(different)} values differ, at {first} {got[first]} instead of {want[first]}"


@cache
def all_states(rate2: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tiles (64 x 72) and their states as uint16, in which all 65,536 states occur."""
    seed = 20 + rate2
    trellis = np.random.default_rng(seed).integers(-(2**15), 2**15, (64, 72, 8 * rate2), dtype=np.int16)
    states = ref.states(trellis)
    assert np.bincount(states.reshape(-1), minlength=65536).all(), f"seed {seed} misses states"
    return trellis, states.astype(np.uint16)


def test_constants_of_the_extension() -> None:
    """The extension's own lists agree with the format."""
    assert _C.CODEBOOKS == ref.CODEBOOKS
    assert _C.MULTIPLIERS == {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D, "3inst": 89226354}
    assert {name: tuple(_C.RATES2[name]) for name in _C.CODEBOOKS} == {name: ref.rates2(name) for name in ref.CODEBOOKS}
    assert (_C.HADAMARD, _C.TILE, _C.MAX_EXPERTS, _C.MAX_TOP_K) == (128, 16, 512, 32)


@pytest.mark.parametrize("codebook", ref.CODEBOOKS)
def test_oracle_table(codebook: str) -> None:
    table = ref.codebook(codebook)
    assert hashlib.sha256(table.view(np.uint16).astype("<u2").tobytes()).hexdigest() == TABLES[codebook]
    assert np.count_nonzero(table.view(np.uint16) == 0) == ZERO_STATES[codebook]


def test_oracle_rotation() -> None:
    """The oracle's Hadamard transform against the stages of the format's first implementation, in float16 and
    float32."""
    z = np.load(GOLDEN / "hadamard.npz")
    x16, x32, scale = (z[name].astype(np.float64) for name in ("x16", "x32", "scale"))
    exact = ref.rotate(x16 * scale)
    # float32: 7 butterflies and 2 products of the block's values; float16: the product and the result are rounded
    tolerance = 9 * ref.F32 * np.abs(ref.rotate(np.ones_like(x32))).max() * np.abs(x32).max() * np.abs(scale).max()
    assert np.abs(ref.rotate(x32) * scale - z["post_f32"]).max() <= tolerance
    tolerance = 2.0**-11 * (np.abs(exact) + np.linalg.norm((x16 * scale).reshape(-1, 128), axis=1).max())
    assert (np.abs(exact - z["pre_f16"].astype(np.float64)) <= tolerance).all()
    assert np.allclose(ref.rotate(ref.rotate(x32)), x32, rtol=0, atol=1e-13), "the rotation is its own inverse"


@pytest.mark.parametrize("codebook", ref.CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_golden_tiles(backend: Backend, flush: None, bits: int, codebook: str) -> None:
    z = np.load(GOLDEN / "decode.npz")
    packed, states = z[f"packed_{bits}"], z[f"states_{bits}"]
    assert np.array_equal(ref.states(packed), states)
    assert np.array_equal(ref.pack(states.astype(np.int64), 2 * bits), packed)
    assert_same(decode(backend, packed, codebook), z[f"values_{bits}_{codebook}"])


@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
def test_golden_half_rates(backend: Backend, flush: None, bits: float) -> None:
    z = np.load(GOLDEN / "half.npz")
    packed = z[f"packed_{bits}"].view(np.int16)
    assert np.array_equal(ref.pack(ref.states(packed), int(2 * bits)), packed)
    assert_same(decode(backend, packed, "mul1"), z[f"value_{bits}_mul1"].view(np.float16))


@pytest.mark.parametrize("codebook", ref.CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_golden_encoder_output(backend: Backend, bits: int, codebook: str) -> None:
    """Tiles that a quantizer chose: packed by the oracle, decoded by the op, they are as far from their source as was
    recorded."""
    z = np.load(GOLDEN / "encoder.npz")
    states = z[f"states_{bits}_{codebook}"].astype(np.int64)
    values = decode(backend, ref.pack(states, 2 * bits)[None], codebook)
    tiles = np.stack(
        [[values[row, 16 * tile + column] for row, column in map(ref.position, range(256))] for tile in range(3)]
    )
    assert_same(tiles, ref.codebook(codebook)[states])
    error = np.mean((tiles.astype(np.float64) - z[f"in_{bits}_{codebook}"]) ** 2)
    assert error == pytest.approx(float(z[f"mse_{bits}_{codebook}"]), rel=1e-6)  # recorded from float32 differences


@pytest.mark.parametrize("bits", range(1, 5))
def test_golden_quantizer_output(backend: Backend, bits: int) -> None:
    """A whole quantized matrix: its recorded distance from the original, plainly and weighted by the Hessian."""
    z = np.load(GOLDEN / "quantizer.npz")
    trellis, suh, svh = (z[f"{name}_{bits}"] for name in ("trellis", "suh", "svh"))
    weight, hessian = z["W"].astype(np.float64), z["H"].astype(np.float64)
    error = array(ops.dequantize(*map(backend.put, (trellis, suh, svh)), "mul1", 128, 128)) - weight
    # float32 rounding of about 1e-7 meets relative errors of 1e-2 and more
    assert np.sum(error**2) / np.sum(weight**2) == pytest.approx(float(z[f"wmse_{bits}"]), rel=1e-4)
    weighted = np.trace(error.T @ hessian @ error) / np.trace(weight.T @ hessian @ weight)
    assert weighted == pytest.approx(float(z[f"true_proxy_err_{bits}"]), rel=1e-4)


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_all_states(backend: Backend, flush: None, rate: tuple[int, str]) -> None:
    """Every state, at every rate, in ever new places of a tile."""
    rate2, codebook = rate
    trellis, states = all_states(rate2)
    got = decode(backend, trellis, codebook).reshape(64, 16, 72, 16).transpose(0, 2, 1, 3).reshape(64, 72, 256)
    order = [16 * row + column for row, column in map(ref.position, range(256))]
    assert_same(got[:, :, order], ref.codebook(codebook)[states])


def golden_experts() -> ref.Experts:
    """The four experts of moe_tiny.safetensors: hidden 256, intermediate 128, 2 / 2 / 3 bits, mul1."""
    tensors = load_file(GOLDEN / "moe_tiny.safetensors")

    def projection(kind: str) -> list[ref.Packed]:
        prefixes = [f"model.layers.0.mlp.experts.{e}.{kind}_proj" for e in range(4)]
        assert all(int(tensors[f"{prefix}.mul1"]) & 0xFFFFFFFF == 0x83DCD12D for prefix in prefixes)
        return [
            ref.Packed(*(tensors[f"{prefix}.{part}"] for part in ("trellis", "suh", "svh")), "mul1")
            for prefix in prefixes
        ]

    return ref.Experts(projection("gate"), projection("up"), projection("down"), 256, 128)


def test_golden_moe(backend: Backend) -> None:
    """A small mixture of experts made by exllamav3: routing from its logits, output against the recorded float64
    one."""
    z, m = np.load(GOLDEN / "moe_tiny_io.npz"), golden_experts()
    x, weights, ids = (z[name].astype(np.float64) for name in ("x", "weights", "selected"))
    oracle = ref.moe(x, weights, ids.astype(int), m)
    assert np.allclose(oracle, z["y_exact_f64"], rtol=0, atol=1e-12 * np.abs(oracle).max())
    got = backend.moe(backend.put(x, "float32"), backend.put(z["weights"]), backend.put(z["selected"]), m)
    used = backend.multiplied_experts(m, len(x))
    bound = ref.rounded(ref.moe_bound(x, weights, ids.astype(int), used), oracle, "float32")
    exact = np.array_equal(used.down[0].rotated, m.down[0].rotated)  # else mul1 without its rounding to binary16
    assert_close(got, z["y_exact_f64"] if exact else ref.moe(x, weights, ids.astype(int), used), bound)


def test_golden_routing(backend: Backend) -> None:
    """The recorded selection and weights of the golden mixture follow from its logits (identity as the gate's
    weight)."""
    z = np.load(GOLDEN / "moe_tiny_io.npz")
    logits = backend.put(z["router_logits"], "float32")
    gate, none = backend.put(np.eye(4, dtype=np.float32)), backend.put(None)
    weights, ids, got = ops.router(logits, gate, none, 2, "topk_softmax", False, 1.0, 1, 1)
    assert torch.equal(got, logits)
    assert np.array_equal(array(ids), z["selected"])
    recorded = z["weights"].astype(np.float64)
    assert_close(weights, recorded, 2.0**-10 * np.abs(recorded))  # recorded in float16
