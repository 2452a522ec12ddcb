"""What every test shares: the backends and SIMD levels to run on, seeds that a failure prints, and conversions to and
from NumPy.

A test that takes `backend` runs on the CPU at every SIMD level and on the emulated MPS backend, `either` at the best
level and emulated; one that takes `cpu` checks what is promised of the CPU alone, such as equal bits for a row in
batches of any size.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the oracle's small products; before NumPy is imported

import dataclasses
import gc
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch

import metal_marlin._C as _C

# `benchmarks` is a folder of the repository and no part of the package; last, so that it shadows nothing
sys.path.append(str(Path(__file__).resolve().parent.parent))

GOLDEN = Path(__file__).parent / "golden"
DTYPES = ("float32", "bfloat16", "float16")
RATES = [(rate2, name) for name in reference.CODEBOOKS for rate2 in reference.rates2(name)]  # (2 * bits, codebook)


def rate_id(rate: tuple[int, str]) -> str:
    """pytest's name for one entry of RATES, such as mul1-2.5."""
    return f"{rate[1]}-{rate[0] / 2:g}"


DECODE_ROWS = 8  # csrc/shared/kernels.h: up to so many rows go to the GPU's decode kernels


@dataclass(frozen=True)
class Backend:
    """What runs the ops: the CPU at one SIMD level, or the MPS backend on the emulator, where CPU tensors stand for MPS
    ones."""

    device: str
    level: str | None = None
    emulated: bool = False

    def __str__(self) -> str:
        return "emulated" if self.emulated else f"{self.device}-{self.level}" if self.level else self.device

    def multiplied(self, p: reference.Packed, rows: int) -> reference.Packed:
        """The weight that this backend multiplies `rows` rows with: the GPU's decode kernels leave out the rounding of
        mul1's values to binary16 (metal/device.h), and so do the CPU's integers, which round the inputs (int16.h)."""
        if self.emulated:
            return reference.unrounded(p) if rows <= DECODE_ROWS else p
        limit = _C.cpu_input_limits()[self.level or _C.cpu_level()][p.codebook]
        if limit == 2**24:  # inputs stay float32
            return reference.before(p)
        return reference.integer(p, limit) if limit else p

    def multiplied_experts(self, m: reference.Experts, tokens: int) -> reference.Experts:
        """The same for a layer's experts."""
        stacks = {name: [self.multiplied(p, tokens) for p in getattr(m, name)] for name in ("gate", "up", "down")}
        return dataclasses.replace(m, **stacks)

    def put(self, value: Any, dtype: str | None = None) -> torch.Tensor:
        """A contiguous tensor on this device; None becomes the empty tensor that the ops take for "no bias"."""
        if value is None:
            return torch.empty(0, dtype=torch.float16, device=self.device)
        tensor = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
        return tensor.to(device=self.device, dtype=None if dtype is None else getattr(torch, dtype))

    def packed(self, p: reference.Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(trellis, suh, svh) of one matrix."""
        return self.put(p.trellis), self.put(p.suh), self.put(p.svh)

    def linear(self, x: torch.Tensor, p: reference.Packed, out_features: int) -> torch.Tensor:
        """trellis_linear on a NumPy weight."""
        return ops.trellis_linear(x, *self.packed(p), self.put(p.bias), p.codebook, out_features)

    def stack(self, experts: list[reference.Packed]) -> list[torch.Tensor]:
        """(trellis, table, suh, svh, bias) of one projection: all tiles back to back, a row (offset, 2 * bits,
        codebook) per expert."""
        sizes = [p.trellis.size for p in experts]
        table = [(sum(sizes[:e]), p.rate2, reference.CODEBOOKS.index(p.codebook)) for e, p in enumerate(experts)]
        bias = None if experts[0].bias is None else np.stack([p.bias for p in experts])
        flat = np.concatenate([p.trellis.reshape(-1) for p in experts])
        scales = (np.stack([p.suh for p in experts]), np.stack([p.svh for p in experts]))
        return [self.put(a) for a in (flat, np.array(table, np.int64), *scales, bias)]

    def moe_args(self, m: reference.Experts) -> list[Any]:
        """Everything that moe_trellis_swiglu takes after x, weights and ids."""
        stacks = [tensor for projection in (m.gate, m.up, m.down) for tensor in self.stack(projection)]
        return [*stacks, m.intermediate, m.activation, m.alpha, m.limit]

    def moe(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, m: reference.Experts) -> torch.Tensor:
        """moe_trellis_swiglu on NumPy experts."""
        return ops.moe_trellis_swiglu(x, weights, ids, *self.moe_args(m), formats_of(m))


def formats_of(m: reference.Experts) -> int:
    """The op's `formats`: which codebooks and rates occur, so that a GPU compiles for these alone."""
    found = {(p.codebook, p.rate2) for p in (*m.gate, *m.up, *m.down)}
    return sum(1 << 16 * reference.CODEBOOKS.index(codebook) + rate2 - 1 for codebook, rate2 in found)


class Ops:
    """torch.ops.metal_marlin; while a test runs emulated, every call is waited for and what the emulator finds is
    raised."""

    wait: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.metal_marlin, name)
        if self.wait is None:
            return op

        def call(*args: Any, **kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            self.wait()
            return result

        return call


ops = Ops()
torch.set_num_threads(1)  # pytest -n gives every core a process; tests of threads set their own count
#: Of the levels that multiply with the format's weights and float32 inputs, whatever the codebook, the last.
EXACT_LEVEL = [level for level, limits in _C.cpu_input_limits().items() if not any(limits.values())][-1]
_C.set_cpu_level(EXACT_LEVEL)  # for tests that name no level: they compare with the dense weights
CPU = [Backend("cpu", level) for level in _C.cpu_levels()]
EMULATED = Backend("cpu", emulated=True)


def running(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """request.param, switched on for the length of a test."""
    if request.param.emulated:
        emulator = request.getfixturevalue("emulated")
        ops.wait = emulator.synchronize
        yield request.param
        ops.wait = None
        return
    before = _C.cpu_level()
    if request.param.level:
        _C.set_cpu_level(request.param.level)
    yield request.param
    _C.set_cpu_level(before)


backend = pytest.fixture(params=[*CPU, EMULATED], ids=str, name="backend")(running)
cpu = pytest.fixture(params=CPU, ids=str, name="cpu")(running)
# for tests of what no SIMD level can change
either = pytest.fixture(params=[Backend("cpu"), EMULATED], ids=str, name="either")(running)


@pytest.fixture
def device() -> Backend:
    """The CPU at the level found at import: for how the ops fit PyTorch, where nobody waits for the emulator."""
    return Backend("cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name; METAL_MARLIN_SEED=N tries others. pytest shows the print when
    the test fails."""
    seed = int(os.environ.get("METAL_MARLIN_SEED", zlib.crc32(request.node.name.encode())))
    print(f"METAL_MARLIN_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads: puts the count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def array(tensor: torch.Tensor) -> np.ndarray:
    """float64 (or int64) copy of a tensor of any dtype and device."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor.long()).numpy()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that equality means identical: -0 differs from 0, and NaN equals itself."""
    return (
        tensor.detach().cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_close(got: torch.Tensor, want: np.ndarray, bound: np.ndarray, what: str = "") -> None:
    """Fails unless |got - want| <= bound everywhere, and says where it was worst and by how much."""
    got_array = array(got)
    assert got_array.shape == want.shape, f"{what}: shape {got_array.shape}, expected {want.shape}"
    if want.size == 0:
        return
    error = np.abs(got_array - want)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error / bound)), error.shape)
    message = f"{what}: at {tuple(map(int, worst))} got {got_array[worst]}, expected {want[worst]} +- {bound[worst]}"
    assert bool((error <= bound).all()), message


@pytest.fixture(scope="session")
def emulator_library() -> Any:
    """The Metal emulator, built and loaded once; tests that need it are skipped where it cannot run."""
    emulator = pytest.importorskip("emulator")
    if reason := emulator.unavailable():
        pytest.skip(reason)
    return emulator.load()


@pytest.fixture
def emulated(emulator_library: Any) -> Iterator[Any]:
    """The MPS backend on the emulator for the length of a test: CPU tensors stand for MPS ones. Synchronize before
    reading a result. What the emulator finds fails the test."""
    import emulator

    emulator.reset()
    _C.use_mps_emulator(emulator_library._name)
    yield emulator
    _C.use_mps_emulator(None)
    emulator.synchronize()


def _collect(metal: Any) -> None:
    """Frees what only cycles keep, such as the frames of caught exceptions, and waits for late handlers."""
    if _C.metal_objects():
        gc.collect()
    metal.settle()


@pytest.fixture
def metal(emulator_library: Any) -> Iterator[Any]:
    """The emulator's stand-in for Objective-C's runtime and Metal, for tests that look at its mistakes themselves."""
    import emulator
    from emulator import metal

    emulator.reset()
    if not _C.metal_objects():  # pytest keeps those of a test that failed
        _C.use_metal_fake(metal.path())
    yield metal
    _collect(metal)
    if not _C.metal_objects():
        _C.use_metal_fake(None)
        metal.forget()
    emulator.reset()


@pytest.fixture
def fake_metal(metal: Any) -> Iterator[Any]:
    """The same; afterwards, everything must have been released and nothing reported."""
    import emulator

    before = (_C.metal_objects(), metal.live())
    yield metal
    _collect(metal)
    assert (_C.metal_objects(), metal.live()) == before
    emulator.synchronize()
