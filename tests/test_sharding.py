"""Experts spread over processes: results against one process and the oracle, what a rank reads and sends, and ranks
that make mistakes, die or stall. Real processes and gloo; what they do is in sharded.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import ranks
import reference as ref
import sharded
import torch
from conftest import EXACT_LEVEL, array, assert_close, same_bits
from safetensors.torch import save_file

import metal_marlin._C as _C
from metal_marlin import Checkpoint, TrellisExperts, TrellisMoE, TrellisRouter
from metal_marlin.sharding import expert_range

EXPERTS, TOP_K = 5, 3
U = 2.0**-24


@pytest.fixture(scope="module")
def experts() -> ref.Experts:
    rates = ((4, "mul1"), (5, "mul1"), (6, "mcg"), (8, "3inst"))
    return ref.random_experts(np.random.default_rng(11), EXPERTS, *sharded.SIZES, rates, bias=True, junk=True)


@pytest.fixture(scope="module")
def folder(experts: ref.Experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer's experts, and a norm that tells it from others."""
    return write(tmp_path_factory.mktemp("experts"), experts, 1.0)


def write(directory: Path, experts: ref.Experts, norm: float) -> Path:
    tensors = {"model.norm.weight": torch.full((200,), norm)}
    for name in ("gate", "up", "down"):
        for e, packed in enumerate(getattr(experts, name)):
            tensors |= checkpoints.group(f"{sharded.PREFIX}.{e}.{name}_proj", packed)
    save_file(tensors, directory / "model.safetensors")
    return directory


def reordered(x: np.ndarray, weights: np.ndarray, ids: np.ndarray, m: ref.Experts) -> np.ndarray:
    """How far two sums of the same float32 terms may be apart, whatever the order: each is off by at most k roundings
    of the terms' sizes, k terms of which k - 1 are added and one rounding is the product's (Higham, Accuracy and
    Stability of Numerical Algorithms, 4.2). Empty ranks add zero, which rounds nothing."""
    size = np.zeros((len(x), m.hidden))
    for slot in range(ids.shape[1]):
        column = slice(slot, slot + 1)
        size += np.abs(ref.moe(x, weights[:, column], np.maximum(ids[:, column], 0), m)) * (ids[:, column] >= 0)
    return 2 * ids.shape[1] * U * 1.01 * size + 1e-30


@pytest.mark.parametrize(("size", "exact"), [(1, True), (2, True), (2, False), (4, True)])
def test_forward(experts: ref.Experts, folder: Path, tmp_path: Path, size: int, exact: bool) -> None:
    """Five experts on 1, 2 and 4 ranks: the result of one process within the bound, the same bits on every rank."""
    level = EXACT_LEVEL if exact else _C.cpu_levels()[-1]
    before = _C.cpu_level()
    every = ranks.values(ranks.run(tmp_path, size, sharded.forward, folder, level))
    checkpoint = Checkpoint(folder)
    _C.set_cpu_level(level)
    try:
        alone = TrellisExperts.from_experts(*checkpoint.experts(sharded.PREFIX), *sharded.SIZES)
        compare(experts, alone, every, exact)
    finally:
        _C.set_cpu_level(before)
    for rank, found in enumerate(every):
        own = expert_range(EXPERTS, size, rank)
        assert found["own"] == (own.start, own.stop)
        groups = [
            checkpoint.groups[f"{sharded.PREFIX}.{e}.{name}_proj"] for e in own for name in ("gate", "up", "down")
        ]
        assert found["read"] == {name for g in groups for part, name in g.names.items() if part not in ("mul1", "mcg")}
        markers, tables = sum(4 for g in groups if g.codebook != "3inst"), 24 * 3 * len(own)
        assert found["held"] == sum(g.nbytes for g in groups) - markers + tables
        for (tokens, _), (collectives, nbytes) in zip(sharded.CALLS, found["sent"], strict=True):
            announcement = (1, 8 * 5) if size > 1 else (0, 0)
            data = (1, 4 * tokens * (200 + 1)) if size > 1 and tokens else (0, 0)
            assert (collectives, nbytes) == (announcement[0] + data[0], announcement[1] + data[1])
    assert sum(found["own"][1] - found["own"][0] for found in every) == EXPERTS


def compare(m: ref.Experts, alone: TrellisExperts, every: list[dict[str, Any]], exact: bool) -> None:
    first = every[0]
    for found in every[1:]:
        for name in ("y", "grads"):
            assert all(same_bits(a, b) for a, b in zip(found[name], first[name], strict=True)), name
        assert same_bits(found["nobody"], first["nobody"])
    for call, y in zip(sharded.CALLS, first["y"], strict=True):
        x, ids, weights = sharded.inputs(*call, EXPERTS)
        single = alone(x, ids, weights)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        args = array(x), array(weights), array(ids), m
        bound, dtype = reordered(*args), call[1]
        for ends in (single, y):  # each is rounded once to its dtype
            bound = bound + (0 if dtype == "float32" else ref.ROUNDOFF[dtype] * np.abs(array(ends)))
        assert_close(y, array(single), bound, f"one process, {call}")
        if len(every) == 1:
            assert same_bits(y, single)
        if exact:
            want = ref.moe(*args)
            assert_close(y, want, ref.rounded(ref.moe_bound(*args), want, dtype), f"the oracle, {call}")
    x, ids, weights = sharded.inputs(9, "float32", EXPERTS)
    x.requires_grad_()
    weights.requires_grad_()
    alone(x, ids, weights).backward(torch.ones_like(x))
    for name, got, want in zip(("x", "weights"), first["grads"], (x.grad, weights.grad), strict=True):
        assert want is not None
        size = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=16 * U * size, msg=lambda text, name=name: f"{name}: {text}")
    ids[2, 1] = ids[4, 0] = _C.NO_EXPERT
    args = array(x), array(weights), array(ids), m
    assert_close(first["nobody"], array(alone(x.detach(), ids, weights)), reordered(*args), "slots without an expert")
    gate = torch.randn(EXPERTS, 200, generator=torch.Generator().manual_seed(5))
    block = TrellisMoE(TrellisRouter(gate, 2), alone)(x.detach())
    torch.testing.assert_close(first["block"], block, rtol=0, atol=8 * U * float(block.detach().abs().max()))
    assert same_bits(first.get("compiled", first["block"]), first["block"])


MISTAKES = {
    "timeout": ("timeout is 0;", "positive"),
    "start_timeout": ("start_timeout is nan", "positive"),
    "text": ("timeout is '60'; expected a number of seconds",),
    "a backend": ("group is 'gloo'; expected a torch.distributed process group, or None",),
    "not a group": ("group is None; expected an ExpertGroup",),
    "tokens": ("rank 1 .* tokens 5, rank 0 .* tokens 4", "same tokens"),
    "top-k": ("rank 1 .* top_k 2, rank 0 .* top_k 3",),
    "ids": ("top_k_index holds 5", "0 to 4, or -1"),
    "negative ids": ("top_k_index holds -2",),
    "weights": ("ids has 3 experts a token; weights has 2",),
    "gradients": ("rank 1 .* gradients 0, rank 0 .* gradients 1",),
    "routing": ("layer 0: the ranks chose different experts for token 1", "hidden states differ"),
    "pickle": ("can't be pickled", "state_dict"),
    "whole": ("gate_proj has 5 experts; expected [23], .* of 5, on rank [01] of 2",),
    "few": ("the group has 2 ranks; expected at most 1",),
    "version": ("rank 1 has 0.1 for metal_marlin, rank 0 has 0.0",),
    "model": ("rank 1 has .* for the checkpoints' SHA-256, rank 0 has", "same on every rank"),
    "level": ("rank 1 has scalar for the CPU kernels .METAL_MARLIN_CPU.",),
    "layer": ("rank 1's sharded layer 0 has activation .*gelu.*rank 0's .*silu",),
    "missing layer": ("rank 1 has 0 for the number of sharded layers, rank 0 has 1",),
    "destroyed": ("process group that holds the experts has been destroyed|ExpertGroup of these experts is gone",),
    "no group": ("no process group; expected torchrun", "init_process_group"),
}


def test_mistakes(experts: ref.Experts, folder: Path, tmp_path: Path) -> None:
    """Each is a message that names what differs, on every rank, and the next good call works."""
    other = tmp_path / "other"
    other.mkdir()
    every = ranks.values(ranks.run(tmp_path, 2, sharded.mistakes, folder, write(other, experts, 2.0)))
    for found in every:
        assert found.keys() == MISTAKES.keys()
        for name, patterns in MISTAKES.items():
            for pattern in patterns:
                assert re.search(pattern, found[name]), f"{name}: {found[name]}"


def test_subgroups(tmp_path: Path) -> None:
    every = ranks.values(ranks.run(tmp_path, 4, sharded.subgroups))
    assert [found[:3] for found in every] == [[0, 2, 101.0], [0, 2, 1010.0], [1, 2, 101.0], [1, 2, 1010.0]]
    assert all("not in the group" in found[3] for found in every)


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    first, second = ranks.run(tmp_path, 2, sharded.late)
    assert "rank 1 did not come within start_timeout=0.5 s" in first.value
    assert second.error is None


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies(folder: Path, tmp_path: Path, victim: int) -> None:
    """The others end with its number, at once and a few seconds to look who is there."""
    outcomes = ranks.run(tmp_path, 4, sharded.loses, folder, "dies", victim)
    check_the_others(outcomes, victim)
    assert outcomes[victim].exitcode == -9


@pytest.mark.parametrize("victim", [1])
def test_a_rank_that_stalls(folder: Path, tmp_path: Path, victim: int) -> None:
    """The others end with its number after the timeout."""
    outcomes = ranks.run(tmp_path, 2, sharded.loses, folder, "stalls", victim, stalls=victim)
    check_the_others(outcomes, victim)
    assert "timeout=2 s" in outcomes[0].value


def check_the_others(outcomes: list[ranks.Outcome], victim: int) -> None:
    named: list[list[str]] = []
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert (outcome.value, outcome.error) == (None, None)
            continue
        assert outcome.error is None, outcome.error
        assert f"rank {rank} of {len(outcomes)}: " in outcome.value
        silent = re.search(
            r"failed after .* s .*: .*\. ranks? ([0-9, ]+) did not report: died or stalled", outcome.value
        )
        assert silent, outcome.value
        named.append(silent[1].split(", "))
        assert str(victim) in named[-1]
        assert outcome.exitcode == 0, f"rank {rank} must end by itself"
        assert outcome.seconds < 30
    assert [str(victim)] in named, "the last of them has seen what all others reported"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Made:
    made = checkpoints.build(tmp_path_factory.mktemp("model"), "qwen3_moe")  # six experts, three of them for a token
    made.write(shards=2)
    return made


@pytest.mark.parametrize(("how", "size"), [("shard_experts", 4), ("DistributedConfig", 2)])
def test_models(made: checkpoints.Made, tmp_path: Path, how: str, size: int) -> None:
    """transformers' loader reads, and the model computes, what one process does; six experts on 4 and 2 ranks.

    With exact kernels: where inputs are rounded to integers, another order of additions may round the next layer's
    differently.
    """
    if how == "DistributedConfig":
        pytest.importorskip("transformers.distributed.expert_parallel", reason="needs transformers 5.23")
    before = _C.cpu_level()
    _C.set_cpu_level(EXACT_LEVEL)
    try:
        with sharded.hf.loading(copy=True):
            alone = sharded.Qwen3MoeForCausalLM.from_pretrained(made.directory, dtype=torch.float32)
        ids = torch.arange(1, 12).reshape(1, -1)
        with torch.no_grad():
            logits = alone(ids).logits
        text = alone.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    finally:
        _C.set_cpu_level(before)
    sizes = {name: tensor.nbytes for name, tensor in alone.state_dict().items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    every = ranks.values(ranks.run(tmp_path, size, sharded.model, made.directory, how, EXACT_LEVEL))
    for rank, found in enumerate(every):
        own = expert_range(6, size, rank)
        assert found["layers"] == [(own.start, own.stop, 6)] * 2
        assert found["problems"] == [[], [], []]
        torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-4 * float(logits.std()))
        assert torch.equal(found["text"], text)
        others = re.compile(rf"\.experts\.({'|'.join(str(e) for e in range(6) if e not in own)})\.")
        markers = re.compile(r"\.experts\..*\.(mul1|mcg)$")  # known from the headers' check
        assert found["read"] == {name for name in made.tensors if not others.search(name) and not markers.search(name)}
        assert found["held"] == sum(sizes.values()) - experts + found["experts held"]
        # 11 tokens, then 4 one by one: an announcement a pass and an exchange a layer
        assert found["sent"] == (5 * (1 + 2), 5 * 40 + 2 * (11 + 4) * 4 * (192 + 1))
    assert sum(found["experts held"] for found in every) == experts


def test_what_distributed_configs_ask_for(made: checkpoints.Made, tmp_path: Path) -> None:
    """Anything but splitting experts is refused, by name."""
    pytest.importorskip("transformers.distributed.expert_parallel", reason="needs transformers 5.23")
    for found in ranks.values(ranks.run(tmp_path, 2, sharded.refused, made.directory)):
        for name, pattern in {
            "attention": "tp_size=2, tp_plan=None, ep_size=1; expected .* no tp_plan",
            "a plan": "tp_plan=.*colwise.*; expected .* no tp_plan",
            "data": "fsdp_size is 2; expected 1",
            "all_to_all": "ep_implementation is 'all_to_all'; expected 'auto'",
            "both": "distributed_config is set inside of shard_experts",
        }.items():
            assert re.search("NotImplementedError: .*" + pattern, found[name]), f"{name}: {found[name]}"


def test_the_page(tmp_path: Path) -> None:
    """docs/sharding.md's examples, under torchrun as it says."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "sharding.md").read_text()
    whole, part = re.findall(r"```python\n(.*?)```", page, re.S)
    end = "dist.destroy_process_group()"
    assert end in whole
    used = """one = block(Checkpoint("models/tiny-moe"), "model.layers.0", ExpertGroup())
assert one(torch.ones(2, 256)).any()
"""
    script = tmp_path / "model.py"
    script.write_text(whole.replace(end, part + used + end))
    assert "torchrun --standalone --nproc-per-node 2 model.py" in page
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DESCRIPTION\nThe "), done.stdout


def test_expert_range() -> None:
    for experts in (1, 5, 16, 512):
        for size in range(1, min(experts, 9) + 1):
            parts = [expert_range(experts, size, rank) for rank in range(size)]
            assert [e for part in parts for e in part] == list(range(experts))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="the group has 5 ranks; expected at most 4"):
        expert_range(4, 5, 0)
    with pytest.raises(ValueError, match="rank is 2; expected 0 to 1"):
        expert_range(4, 2, 2)
    with pytest.raises(TypeError, match="size is '2'; expected a whole number"):
        expert_range(4, "2", 0)  # type: ignore[arg-type]


def test_shard_experts_wants_an_expert_group() -> None:
    hf_sharding = pytest.importorskip("metal_marlin.hf_sharding")
    with pytest.raises(TypeError, match="group is None; expected an ExpertGroup"), hf_sharding.shard_experts(None):
        pytest.fail("it went on")
