"""Small cases of `python -m benchmarks dispatch` under pytest-benchmark: the ways to wait, and fused against looped.

`pytest benchmarks/test_dispatch.py [--benchmark-compare ...]`. Under pytest-xdist each runs once, as a test.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.dispatch import layers, sizes, stream, workloads
from benchmarks.dispatch.device import Device, default_kind
from benchmarks.dispatch.overlap import check
from benchmarks.dispatch.result import Settings

pytest.importorskip("pytest_benchmark")

SETTINGS = Settings(**sizes.defaults(default_kind(), quick=True))
TOKENS = (1, 8)


@pytest.fixture
def device():
    found = Device(SETTINGS.device)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def waited(device, work):
    def both():
        work()
        device.wait()

    return both


@pytest.mark.parametrize("way", stream.NAMES)
@pytest.mark.parametrize("name", ["matmuls", "moe"])
def test_ways_to_wait(benchmark, device, name, way):
    workload = getattr(workloads, name)(SETTINGS)
    ways = stream.variants(workload, device)
    if way not in ways:
        pytest.skip(str(device.commits))
    stream.check(workload, device)
    benchmark.group = workload.title
    benchmark.pedantic(waited(device, ways[way]), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("way", ["together", "one_by_one"])
def test_experts(benchmark, device, way, count):
    layer, x = layers.of(SETTINGS), layers.tokens(SETTINGS, count)
    check(layer, x)
    weights, ids = layer.route(x)
    benchmark.group = f"experts, {count} tokens, {layer.form}"
    benchmark.pedantic(waited(device, lambda: getattr(layer, way)(x, weights, ids)), rounds=5, warmup_rounds=1)


def test_dense_forms_agree(device):
    """The dense layer that GPUs without our kernels run: grouped, batched and looped are one function."""
    layer = layers.DenseMoE(dataclasses.replace(SETTINGS, dtype="float32"))
    for count in TOKENS:
        x = layers.tokens(dataclasses.replace(SETTINGS, dtype="float32"), count)
        weights, ids = layer.route(x)
        want = layer.one_by_one(x, weights, ids)
        torch.testing.assert_close(layer.together_batched(x, weights, ids), want, rtol=1e-4, atol=1e-5)
        if layer.grouped:
            torch.testing.assert_close(layer.together_grouped(x, weights, ids), want, rtol=1e-4, atol=1e-5)
