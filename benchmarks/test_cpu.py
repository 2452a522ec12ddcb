"""The cases of `python -m benchmarks cpu` under pytest-benchmark: pytest benchmarks/ [--benchmark-compare ...]."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.cases import KINDS, RATES, ROWS
from metal_marlin import _C

pytest.importorskip("pytest_benchmark")


@pytest.fixture(params=_C.cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_level()
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level(before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("codebook", "bits"), RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_op(benchmark, level, kind, codebook, bits, rows):
    case = KINDS[kind](rows, codebook, bits)
    case.check()
    benchmark.group = f"{case.name}, {rows} rows"
    benchmark.pedantic(case.ours, rounds=5, warmup_rounds=1)
