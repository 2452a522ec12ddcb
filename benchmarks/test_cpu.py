"""Our ops in small cases under pytest-benchmark, to compare commits: pytest benchmarks/ [--benchmark-compare ...]."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.cpu.contender import Options
from benchmarks.cpu.ours import Ours
from benchmarks.cpu.shapes import CHECKS, SHAPES, check_weights, inputs, relative_error
from metal_marlin import _C

pytest.importorskip("pytest_benchmark")

PACKED = ("mul1 2", "mcg 3", "mul1 4")
CASES = [*(("T", v) for v in PACKED), *(("L2048", v) for v in PACKED), ("R32", "float32"), ("R512", "float32")]
TOKENS = (1, 16, 256)
COLD = 2**24


@pytest.fixture(params=_C.cpu_levels())
def ours(request: pytest.FixtureRequest) -> Iterator[Ours]:
    before = _C.cpu_level()
    with torch.inference_mode():
        yield Ours(Options(threads=torch.get_num_threads(), level=request.param))
    _C.set_cpu_level(before)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("key", "variant"), CASES)
def test_op(benchmark, ours, key, variant, tokens):
    shape = SHAPES[key]
    small, weights = CHECKS[shape.op], check_weights(CHECKS[shape.op])
    limit = next(v.limit for v in ours.variants(shape.op) if v.name == variant)
    given = inputs(small, tokens, (1,))
    work = ours.build(small, variant, 0, weights)
    work.load(given)
    work.run()
    assert relative_error(work.result(), work.expected(small, given, weights)) < limit
    ours.drop()
    work, given = ours.build(shape, variant, COLD, None), inputs(shape, tokens, (2,))
    benchmark.group = f"{shape.title}, {variant}, {tokens} tokens"
    benchmark.pedantic(work.run, setup=lambda: work.load(given), rounds=5, warmup_rounds=1)
    ours.drop()
