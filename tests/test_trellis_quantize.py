"""trellis_quantize: streams decode to the values, are as good as promised, and are the same bits everywhere.

The oracle is a Viterbi search in NumPy, itself checked against trying every stream where there are few. A tile is
always 256 weights, and a path must end in the node where it began: the optimum is the best over all of those nodes.
search_levels.c has the same in C, for every SIMD level that a machine has, arm64's under qemu-user.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import CPU, GOLDEN, RATES, ops, rate_id, same_bits
from test_levels import FLAGS, ROOT, SANITIZER_OPTIONS, native_compiler

import metal_marlin.ops
from metal_marlin import _C

ORDER = np.array([16 * row + column for row, column in map(ref.position, range(256))])  # of trellis positions in a tile
# the source's standard deviation that each rate codes best, in units of mul1; the other two take 1.25 times as much
BEST_RMS = {2: 1.12, 3: 1.05, 4: 0.98, 5: 0.95, 6: 0.93, 7: 0.93, 8: 0.94, 10: 0.87, 12: 0.85, 14: 0.82, 16: 0.82}
# Mean squared error by variance of exllamav3's encoder on Gaussian tiles, at those sizes. Above 4 bits, the few weights
# beyond the codebook's largest value decide, and the figure is that of the sample.
EXLLAMAV3 = {2: 0.27231, 4: 0.06834, 6: 0.01738, 8: 0.004460}


def gaussian(rng: np.random.Generator, count: int, rate2: int, codebook: str) -> torch.Tensor:
    size = BEST_RMS[rate2] * (1 if codebook == "mul1" else 1.25)
    return torch.tensor(rng.normal(scale=size, size=(count, 16, 16)), dtype=torch.float32)


def decoded(packed: torch.Tensor, codebook: str) -> np.ndarray:
    """float32 [..., 16, 16], by the oracle."""
    tiles = np.empty((*packed.shape[:-1], 256), np.float32)
    tiles[..., ORDER] = ref.codebook(codebook)[ref.states(packed.numpy())]
    return tiles.reshape(*packed.shape[:-1], 16, 16)


def errors(tiles: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """float64 [count]: a tile's sum of squared differences."""
    return ((tiles.double() - values.double()) ** 2).sum(dim=(-2, -1)).numpy()


# ---------------------------------------------------------------- the oracle


class Trellis:
    """Closed paths through the windows of a circular stream; values [2^window], bits[t] new ones at position t."""

    def __init__(self, x: np.ndarray, values: np.ndarray, bits: list[int]) -> None:
        self.x, self.values, self.bits = x.astype(np.float64), values.astype(np.float64), bits
        self.window = len(values).bit_length() - 1

    def nodes(self, t: int) -> int:
        return 1 << (self.window - self.bits[t % len(self.bits)])

    def distance(self, t: int) -> np.ndarray:
        squares: np.ndarray = (self.x[t % len(self.x)] - self.values) ** 2
        return squares

    def forward(self, begin: int, start: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """The least cost of a way around, from all nodes or from one, to each node, and each step's choices."""
        costs, choices = np.full(self.nodes(begin), np.inf if start is not None else 0.0), []
        if start is not None:
            costs[start] = 0
        for t in range(begin, begin + len(self.x)):
            ways = costs.repeat(len(self.values) // len(costs)) + self.distance(t)
            ways = ways.reshape(-1, self.nodes(t + 1))
            choices.append(ways.argmin(axis=0))
            costs = ways.min(axis=0)
        return costs, choices

    def backward(self) -> np.ndarray:
        """The least cost of a way around from each node at position 0, to anywhere."""
        costs = np.zeros(self.nodes(0))
        for t in reversed(range(len(self.x))):
            ways = np.tile(costs, len(self.values) // len(costs)) + self.distance(t)
            costs = ways.reshape(self.nodes(t), -1).min(axis=1)
        return costs

    def optimum(self) -> float:
        """From every node to itself, but for those that even an open path there, or from there, rules out."""
        bound, best = np.maximum(self.backward(), self.forward(0, None)[0]), np.inf
        for node in np.argsort(bound):
            if bound[node] >= best:
                break
            best = min(best, float(self.forward(0, int(node))[0][node]))
        return best

    def two_searches(self) -> float:
        """As exllamav3 means it: open from the middle to the middle; then closed at that path's node at position 0."""
        middle = len(self.x) // 2
        costs, choices = self.forward(middle, None)
        node = int(costs.argmin())
        for t in reversed(range(len(self.x), middle + len(self.x))):
            state = int(choices[t - middle][node]) * self.nodes(t + 1) + node
            node = state >> self.bits[t % len(self.bits)]
        return float(self.forward(0, node)[0][node])


def trellis_of(tile: torch.Tensor, rate2: int, codebook: str) -> Trellis:
    bits = np.diff(ref.last_bit(rate2), prepend=0).tolist()
    return Trellis(tile.reshape(256).numpy()[ORDER], ref.codebook(codebook), bits)


@pytest.mark.parametrize("bits", [[1] * 8, [2] * 5, [1, 2] * 3])
@pytest.mark.parametrize("window", [3, 5])
def test_oracle_against_every_stream(rng: np.random.Generator, window: int, bits: list[int]) -> None:
    for _ in range(5):
        trellis = Trellis(rng.normal(size=len(bits)), rng.normal(size=1 << window), bits)
        total, ends = sum(bits), np.cumsum(bits)
        best = np.inf
        for stream in range(1 << total):
            twice = stream << total | stream  # so that no window wraps
            states = [(twice >> (total - end)) % (1 << window) for end in ends]
            best = min(best, sum(trellis.distance(t)[state] for t, state in enumerate(states)))
        assert trellis.optimum() == pytest.approx(best, rel=1e-12)
        assert trellis.two_searches() >= best * (1 - 1e-12)


# ---------------------------------------------------------------- what the op promises


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_streams(rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """Tiles of a random stream's values come back as that stream; any tile's values are its stream's."""
    rate2, codebook = rate
    planted = torch.tensor(rng.integers(-(2**15), 2**15, (3, 8 * rate2)), dtype=torch.int16)
    tiles = torch.cat([torch.tensor(decoded(planted, codebook)), gaussian(rng, 3, rate2, codebook)])
    packed, values = metal_marlin.ops.trellis_quantize(tiles, rate2, codebook)
    assert (packed.dtype, packed.shape) == (torch.int16, (6, 8 * rate2))
    assert (values.dtype, values.shape) == (torch.float32, (6, 16, 16))
    assert np.array_equal(values.numpy(), decoded(packed, codebook))
    assert torch.equal(packed[:3], planted)
    assert torch.equal(values[:3], tiles[:3])


@pytest.mark.parametrize("rate", RATES, ids=rate_id)
def test_levels_give_the_same_bits(rng: np.random.Generator, rate: tuple[int, str]) -> None:
    tiles, before, results = gaussian(rng, 1, *rate), _C.cpu_level(), []
    try:
        for backend in CPU:
            _C.set_cpu_level(backend.level)
            results.append(ops.trellis_quantize(tiles, *rate))
    finally:
        _C.set_cpu_level(before)
    assert all(same_bits(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_threads_and_neighbours_change_nothing(rng: np.random.Generator, threads: None) -> None:
    tiles, results = gaussian(rng, 7, 4, "mul1"), []
    for count in (1, 2, 3, 4, 4, 1):
        torch.set_num_threads(count)
        results.append(ops.trellis_quantize(tiles, 4, "mul1"))
    alone = [ops.trellis_quantize(tile[None], 4, "mul1") for tile in tiles]
    results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    assert all(same_bits(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("rate", [(2, "mul1"), (3, "mul1"), (4, "mcg"), (6, "3inst")], ids=rate_id)
def test_no_worse_than_two_searches(rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """On the mean; a single tile may be worse by what either is above the optimum."""
    tiles = gaussian(rng, 3, *rate)
    got = errors(tiles, ops.trellis_quantize(tiles, *rate)[1])
    assert got.sum() <= sum(trellis_of(tile, *rate).two_searches() for tile in tiles) * (1 + 1e-6)


@pytest.mark.parametrize("rate", [(7, "mul1"), (8, "mcg"), (12, "3inst"), (16, "mul1")], ids=rate_id)
def test_near_the_optimum(rng: np.random.Generator, rate: tuple[int, str]) -> None:
    """Float32 costs are off by a few millionths; most tiles reach the optimum, and none of these is far."""
    tile = gaussian(rng, 1, *rate)
    (got,), best = errors(tile, ops.trellis_quantize(tile, *rate)[1]), trellis_of(tile[0], *rate).optimum()
    assert best * (1 - 1e-5) <= got <= best * 1.01


@pytest.mark.parametrize("codebook", ref.CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_golden_encoder(bits: int, codebook: str) -> None:
    """The tiles that exllamav3's encoder was given, and the error that it reached."""
    z = np.load(GOLDEN / "encoder.npz")
    tiles = np.empty((3, 256), np.float32)
    tiles[:, ORDER] = z[f"in_{bits}_{codebook}"]
    source = torch.tensor(tiles).reshape(3, 16, 16)
    got = errors(source, ops.trellis_quantize(source, 2 * bits, codebook)[1]).sum() / 768
    assert got <= float(z[f"mse_f32_{bits}_{codebook}"]) * (1 + 1e-5)  # with float32 costs and without its mistakes
    assert got <= float(z[f"mse_{bits}_{codebook}"]) * 1.001  # as it is; once, its mistakes meet a better node


@pytest.mark.parametrize("rate2", EXLLAMAV3)
def test_distortion_of_a_gaussian_source(rng: np.random.Generator, rate2: int) -> None:
    """Not above exllamav3's encoder, but for 1 % that the mean of 64 tiles varies by."""
    tiles = gaussian(rng, 64, rate2, "mul1")
    error = errors(tiles, ops.trellis_quantize(tiles, rate2, "mul1")[1])
    assert error.sum() / float((tiles.double() ** 2).sum()) < EXLLAMAV3[rate2] * 1.01


# ---------------------------------------------------------------- as an op


def test_shapes_and_strides(rng: np.random.Generator) -> None:
    tiles = gaussian(rng, 6, 16, "mul1").reshape(2, 3, 16, 16)
    packed, values = ops.trellis_quantize(tiles, 16, "mul1")
    assert (packed.shape, values.shape) == ((2, 3, 128), (2, 3, 16, 16))
    turned = tiles.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    for got, want in zip(ops.trellis_quantize(turned, 16, "mul1"), (packed, values), strict=True):
        assert same_bits(got, want)
    one = ops.trellis_quantize(tiles[1, 2], 16, "mul1")
    assert same_bits(one[0], packed[1, 2])
    assert same_bits(one[1], values[1, 2])
    for shape in ((0, 16, 16), (2, 0, 16, 16)):
        packed, values = ops.trellis_quantize(torch.empty(shape), 5, "mul1")
        assert (packed.shape, packed.dtype, values.shape) == ((*shape[:-2], 40), torch.int16, shape)


def test_extreme_tiles() -> None:
    """All zero, all alike, and as large as is allowed: streams all the same, that decode to the values."""
    tiles = torch.stack([torch.full((16, 16), v) for v in (0.0, -0.0, 1.0, 1e-30, 65504.0, -65504.0)])
    for rate in RATES[:3]:
        packed, values = ops.trellis_quantize(tiles, *rate)
        assert np.array_equal(values.numpy(), decoded(packed, rate[1]))
    assert values[4].mean() > 2
    assert values[5].mean() < -2


def test_schema_and_fake_kernel(rng: np.random.Generator) -> None:
    args = (gaussian(rng, 2, 16, "mcg"), 16, "mcg")
    torch.library.opcheck(ops.trellis_quantize, args, test_utils=("test_schema", "test_faketensor"))


def test_a_gradient_is_refused(rng: np.random.Generator) -> None:
    tiles = gaussian(rng, 1, 16, "mul1").requires_grad_()
    values = ops.trellis_quantize(tiles, 16, "mul1")[1]
    with pytest.raises(RuntimeError, match="trellis_quantize is not differentiable"):
        values.sum().backward()


def spoiled(value: float) -> torch.Tensor:
    tiles = torch.zeros(2, 3, 16, 16)
    tiles[1, 1, 5, 7] = value
    return tiles


GOOD = torch.zeros(2, 16, 16)
BAD: list[tuple[Any, Any, Any, str]] = [
    (spoiled(float("nan")), 4, "mul1", r"tiles.*nan.*tile 4, row 5, column 7.*finite"),
    (spoiled(float("inf")), 4, "mul1", r"tiles.*inf.*tile 4, row 5, column 7.*finite"),
    (spoiled(-float("inf")), 4, "mul1", r"tiles.*-inf.*tile 4.*finite"),
    (spoiled(1e20), 4, "mul1", r"tiles.*1e\+20.*tile 4.*65504"),
    (GOOD.half(), 4, "mul1", r"tiles.*float16.*float32"),
    (GOOD.double(), 4, "mul1", r"tiles.*float64.*float32"),
    (GOOD[:, :15], 4, "mul1", r"tiles.*\[2, 15, 16\].*16, 16"),
    (GOOD[..., :8], 4, "mul1", r"tiles.*\[2, 16, 8\].*16, 16"),
    (GOOD[0, 0], 4, "mul1", r"tiles.*\[16\].*16, 16"),
    (torch.tensor(1.0), 4, "mul1", r"tiles.*\[\].*16, 16"),
    (GOOD, 0, "mul1", r"rate2 is 0;.*2 to 16"),
    (GOOD, 1, "mul1", r"rate2 is 1;"),
    (GOOD, 9, "mul1", r"rate2 is 9;.*3, 5 or 7"),
    (GOOD, 18, "mul1", r"rate2 is 18;"),
    (GOOD, -4, "mul1", r"rate2 is -4;"),
    (GOOD, 2**40 + 4, "mul1", r"rate2 is 1099511627780;"),
    (GOOD, 5, "mcg", r"rate2 is 5;.*mcg"),
    (GOOD, 5, "3inst", r"rate2 is 5;.*3inst"),
    (GOOD, 4, "mul2", r"codebook is 'mul2'.*mul1"),
]


@pytest.mark.parametrize(("tiles", "rate2", "codebook", "says"), BAD, ids=range(len(BAD)))
def test_bad_input(tiles: torch.Tensor, rate2: int, codebook: str, says: str) -> None:
    with pytest.raises(RuntimeError, match=f"metal_marlin::trellis_quantize: {says}"):
        ops.trellis_quantize(tiles, rate2, codebook)


def test_not_on_the_gpu(emulated: Any) -> None:
    with pytest.raises(RuntimeError, match=r"tiles is on the MPS device.*CPU"):
        ops.trellis_quantize(GOOD, 4, "mul1")


def test_the_table_of_states_survives_level_changes(rng: np.random.Generator) -> None:
    """It is built once, by whatever level runs first; a level that is not exact in its products must not spoil it."""
    script = (
        "import torch, metal_marlin._C as c; from metal_marlin import ops; c.set_cpu_level(c.cpu_levels()[-1])\n"
        "t = torch.arange(256.).reshape(16, 16) / 64 - 2\n"
        "print([ops.trellis_quantize(t, 16, b)[1].double().sum().item() for b in c.CODEBOOKS])"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    tile = torch.arange(256.0).reshape(16, 16) / 64 - 2
    want = [ops.trellis_quantize(tile, 16, name)[1].double().sum().item() for name in ref.CODEBOOKS]
    assert done.stdout.strip() == str(want)


# ---------------------------------------------------------------- search_levels.c


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, text=True, capture_output=True, cwd=folder)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def program(compiler: list[str], target: Path, *flags: str) -> Path:
    """The search compiled with `flags`, the rest of the CPU backend quickly."""
    csrc, parts = ROOT / "csrc", target.parent / "cpu"
    parts.mkdir()
    search = [ROOT / "tests" / "search_levels.c", *sorted((csrc / "quantize").glob("*.c"))]
    run([*compiler, *FLAGS, "-O1", "-c", *map(str, sorted((csrc / "cpu").glob("*.c")))], parts)
    run([*compiler, *FLAGS, *flags, *map(str, [*search, *parts.glob("*.o")]), "-lm", "-o", str(target)], parts)
    return target


def quick_check(*command: str | Path) -> list[str]:
    """Runs it; returns the levels that it found."""
    done = subprocess.run(
        [*map(str, command), "quick"], text=True, capture_output=True, env=os.environ | SANITIZER_OPTIONS
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert int(lines[-1][0]) > 1000
    assert lines[-1][2:] == ["0", "failed"]
    return lines[0][1:]


def test_native_program(tmp_path: Path) -> None:
    """Under sanitizers where the compiler has them."""
    compiler, flags = native_compiler(), ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    probe = [*compiler, *flags, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True).returncode:
        flags = []
    found = quick_check(program(compiler, tmp_path / "search_levels", "-O1", *flags))
    assert found == list(dict.fromkeys(level.split("-")[0] for level in _C.cpu_levels()))


@pytest.mark.slow
def test_arm64_program(tmp_path: Path) -> None:
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None or importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs qemu-aarch64 (Debian's package qemu-user) and ziglang")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    built = program(zig, tmp_path / "search_levels")
    assert quick_check(qemu, "-cpu", "cortex-a72", built) == ["scalar", "neon"]
