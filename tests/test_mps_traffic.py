"""What the Metal kernels read of the packed weights, counted load by load in the emulator.

Two counts: the bytes that threadgroups read, each byte once a threadgroup, and the bytes of every load of every lane. A
lane of a decode kernel also loads the halfword before its own, from the cache line that its neighbour loads:
1 / (2 bits) more, whatever the number of tokens. Prefill kernels load each byte once a tile of rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metal_marlin
from metal_marlin import TrellisExperts, TrellisTensor

HIDDEN, INTER, EXPERTS, TOP_K = 256, 128, 6, 2
GATE, UP, DOWN = 3, 8, 4  # buffer slots of the packed weights (csrc/shared/kernels.h)
ROWS = 32  # rows of a prefill tile


def make_experts(bits: float, codebook: str) -> TrellisExperts:
    generator = torch.Generator().manual_seed(0)

    def one(k: int, n: int) -> TrellisTensor:
        trellis = torch.randint(
            -(2**15), 2**15, (k // 16, n // 16, int(16 * bits)), dtype=torch.int16, generator=generator
        )
        return TrellisTensor(trellis, torch.ones(k).half(), torch.ones(n).half(), codebook)

    sizes = (HIDDEN, INTER), (HIDDEN, INTER), (INTER, HIDDEN)
    return TrellisExperts.from_experts(*([one(k, n) for _ in range(EXPERTS)] for k, n in sizes))


def loads(emulated, experts: TrellisExperts, ids: torch.Tensor) -> tuple[int, int]:
    """(bytes of packed weights that threadgroups read, each byte once a threadgroup; bytes of all loads) of a call."""
    x, weights = torch.ones(len(ids), HIDDEN), torch.ones(ids.shape)
    with emulated.configured(check=True, races=False):
        emulated.reset()
        experts(x, ids, weights)
        emulated.synchronize()
        records = emulated.traffic()
    slots = {"moe_gate_up": (GATE, UP), "moe_down": (DOWN,)}
    packed = [r for r in records for kernel, own in slots.items() if r.kernel.startswith(kernel) and r.buffer in own]
    assert len(packed) == 3
    return sum(r.loaded_by_groups for r in packed), sum(r.loaded for r in packed)


def bytes_of(bits: float, experts: int) -> int:
    return int(experts * 3 * HIDDEN * INTER * bits / 8)


@pytest.mark.parametrize(("bits", "codebook"), [(2, "mul1"), (2.5, "mul1"), (3, "mcg"), (4, "3inst")])
def test_decode_reads_each_chosen_expert_once(emulated, bits: float, codebook: str) -> None:
    """One token or eight: the same experts are the same reads."""
    experts = make_experts(bits, codebook)
    for tokens in (1, 3, 8):
        ids = torch.tensor([[1, 4]] * tokens)
        by_groups, all_loads = loads(emulated, experts, ids)
        assert by_groups == bytes_of(bits, 2)
        assert all_loads == by_groups + by_groups / (2 * bits)  # the halfword before: 2 bytes for each 4 * bits bytes
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    by_groups, all_loads = loads(emulated, experts, ids)
    assert by_groups == bytes_of(bits, 4)
    assert all_loads == by_groups + by_groups / (2 * bits)


def test_prefill_reads_once_a_tile_of_rows(emulated) -> None:
    """An expert with n rows is read ceil(n / 32) times, every byte once each time."""
    bits = 2
    experts = make_experts(bits, "mul1")
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(np.stack([rng.permutation(3)[:TOP_K] for _ in range(60)]))
    rows = [int((ids == e).sum()) for e in range(3)]
    once, all_loads = loads(emulated, experts, ids)
    assert once == all_loads
    assert all_loads == bytes_of(bits, sum(-(-n // ROWS) for n in rows))


def test_ops_do_not_wait(emulated) -> None:
    """An op returns when it has encoded: the result is not there yet, and no dispatch has run."""
    experts = make_experts(2, "mul1")
    with emulated.configured(delay_us=20_000, commit_every=0):
        emulated.reset()
        experts(torch.ones(1, HIDDEN), torch.tensor([[1, 4]]), torch.ones(1, 2))
        assert emulated.stats()["dispatches"] == 0
        emulated.synchronize()
        assert emulated.stats()["dispatches"] == 2
        emulated.reset()
        experts(torch.ones(60, HIDDEN), torch.zeros(60, 2, dtype=torch.int64), torch.ones(60, 2))
        emulated.synchronize()
        assert emulated.stats()["dispatches"] == 4
        emulated.reset()
        metal_marlin.router(torch.ones(9, 16), torch.ones(8, 16), top_k=2)
        emulated.synchronize()
        assert emulated.stats()["dispatches"] == 1
