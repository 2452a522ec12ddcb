"""What the ranks of test_sharding.py do; runs in processes of its own (ranks.py)."""

from __future__ import annotations

import copy
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
import transformers
from transformers import Qwen3MoeForCausalLM  # here, so that ranks are forked with them

import metal_marlin._C as _C
import metal_marlin.hf as hf
from metal_marlin import Checkpoint, TrellisExperts, TrellisMoE, TrellisRouter, sharding
from metal_marlin.sharding import ExpertGroup, ShardedExperts

PREFIX = "model.layers.0.mlp.experts"
SIZES = (200, 130)  # hidden, intermediate
CALLS = ((1, "float32"), (7, "float32"), (40, "bfloat16"), (33, "float16"), (0, "float32"))


class Reads(Checkpoint):
    """Remembers which tensors were read."""

    def __init__(self, directory: Path) -> None:
        self.read: set[str] = set()
        super().__init__(directory, copy=True)  # to count bytes

    def tensor(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().tensor(name)


def inputs(tokens: int, dtype: str, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids, weights: the same on every rank."""
    random = torch.Generator().manual_seed(1000 * seed + tokens)
    x = torch.randn(tokens, SIZES[0], generator=random).to(getattr(torch, dtype))
    scores = torch.rand(tokens, experts, generator=random)
    weights, ids = scores.topk(3, dim=-1)
    return x, ids, weights / weights.sum(-1, keepdim=True)


def raised(call: Any, *args: Any) -> str:
    """The message of what a call raises."""
    try:
        call(*args)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def forward(rank: int, size: int, directory: Path, level: str) -> dict[str, Any]:
    """One layer on all kinds of batches, with gradients; what was read, held and exchanged."""
    _C.set_cpu_level(level)
    group, checkpoint = ExpertGroup(timeout=20), Reads(directory)
    group.identify(checkpoint)
    checkpoint.read.clear()  # of the markers and of what tells models apart
    experts = ShardedExperts.from_checkpoint(checkpoint, PREFIX, group, *SIZES)
    group.start()
    found: dict[str, Any] = {"y": [], "sent": [], "read": checkpoint.read, "own": (experts.own.start, experts.own.stop)}
    found["held"] = sum(tensor.nbytes for tensor in experts.state_dict().values())
    for call in CALLS:
        before = group.collectives, group.nbytes
        found["y"].append(experts(*inputs(*call, experts.total_experts)))
        found["sent"].append((group.collectives - before[0], group.nbytes - before[1]))
    x, ids, weights = inputs(9, "float32", experts.total_experts)
    x.requires_grad_()
    weights.requires_grad_()
    y = experts(x, ids, weights)
    y.backward(torch.ones_like(y))
    found["grads"] = x.grad, weights.grad
    ids[2, 1] = ids[4, 0] = _C.NO_EXPERT
    found["nobody"] = experts(x.detach(), ids, weights.detach())
    router = TrellisRouter(torch.randn(experts.total_experts, SIZES[0], generator=torch.Generator().manual_seed(5)), 2)
    block = TrellisMoE(router, experts)
    found["block"] = block(x.detach())
    if size != 2 or any(_C.cpu_input_limits()[level].values()):  # once is enough
        return found
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found["compiled"] = compiled(x.detach())
    return found


def mistakes(rank: int, size: int, directory: Path, other: Path) -> dict[str, str]:
    """Bad input that every rank must survive and name, and good calls between."""
    found: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {
        "timeout": {"timeout": 0}, "start_timeout": {"start_timeout": float("nan")}, "text": {"timeout": "60"},
        "a backend": {"group": "gloo"},
    }  # fmt: skip
    for name, one in options.items():
        found[name] = raised(lambda one=one: ExpertGroup(**one))
    found["not a group"] = raised(lambda: ShardedExperts.from_checkpoint(Checkpoint(directory), PREFIX, None))
    group, checkpoint = ExpertGroup(timeout=20), Checkpoint(directory)
    experts = ShardedExperts.from_checkpoint(checkpoint, PREFIX, group, *SIZES)
    good = inputs(4, "float32", experts.total_experts)
    want = experts(*good)

    def check(name: str, call: Any, *args: Any) -> None:
        found[name] = raised(call, *args)
        assert torch.equal(experts(*good), want), f"a good call after {name}"

    x, ids, weights = good
    check("tokens", experts, *inputs(4 + rank, "float32", experts.total_experts))
    check("top-k", experts, x, ids[:, : 3 - rank], weights[:, : 3 - rank])
    check("ids", experts, x, ids.index_fill(0, torch.tensor([1]), experts.total_experts), weights)
    check("negative ids", experts, x, ids.index_fill(0, torch.tensor([1]), -2), weights)
    check("weights", experts, x, ids, weights[:, :2])
    check("gradients", experts, x.clone().requires_grad_(rank == 0), ids, weights)
    drifted = ids.clone()
    drifted[1] = (ids[1] + rank) % experts.total_experts
    check("routing", experts, x, drifted, weights)
    check("pickle", pickle.dumps, experts)
    assert torch.equal(copy.deepcopy(experts)(*good), want)
    whole = TrellisExperts.from_experts(*checkpoint.experts(PREFIX), *SIZES)
    stacks = whole.gate_proj, whole.up_proj, whole.down_proj
    check("whole", lambda: ShardedExperts(*stacks, *SIZES, total_experts=5, group=group))
    check("few", lambda: ShardedExperts(*stacks, *SIZES, total_experts=1, group=group))

    def with_another(change: Any) -> Any:
        strange = ExpertGroup(timeout=20)
        change(strange)
        return strange.start

    sharding.__version__, version = f"0.{rank}", sharding.__version__
    found["version"] = raised(with_another(lambda group: None))
    sharding.__version__ = version
    found["model"] = raised(with_another(lambda group: group.identify(Checkpoint(other if rank else directory))))
    level = _C.cpu_level()
    _C.set_cpu_level("scalar" if rank else level)
    found["level"] = raised(with_another(lambda group: None))
    _C.set_cpu_level(level)
    options = {"activation": "gelu" if rank else "silu"}
    found["layer"] = raised(
        with_another(lambda group: ShardedExperts.from_checkpoint(checkpoint, PREFIX, group, *SIZES, **options))
    )
    found["missing layer"] = raised(
        with_another(lambda group: None if rank else ShardedExperts.from_checkpoint(checkpoint, PREFIX, group, *SIZES))
    )
    dist.destroy_process_group()
    found["destroyed"] = raised(experts, *good)
    found["no group"] = raised(ExpertGroup)
    return found


def subgroups(rank: int, size: int) -> list[Any]:
    """Two groups of two ranks each, neither of which is the default one."""
    found: list[Any] = []
    parts = [dist.new_group(part) for part in ([0, 2], [1, 3])]
    group = ExpertGroup(parts[rank % 2], timeout=20)
    group.add({"num_experts": 2, "experts": [rank // 2, rank // 2 + 1]})
    group.start()
    found += [group.rank, group.size, group.sum(torch.tensor([10.0**rank]), "a test").item()]
    found.append(raised(ExpertGroup, parts[1 - rank % 2]))
    return found


def late(rank: int, size: int) -> str:
    """Rank 1 never comes to the start."""
    group = ExpertGroup(timeout=20)
    group.start_timeout = 0.5
    group.add({"num_experts": 2, "experts": [rank, rank + 1]})
    if rank == 1:
        time.sleep(1.0)
        return ""
    return raised(group.start)


def loses(rank: int, size: int, directory: Path, how: str, victim: int) -> str:
    """A rank dies or stalls between two layers; the others run into the next exchange."""
    group = ExpertGroup(timeout=20 if how == "dies" else 2)
    experts = ShardedExperts.from_checkpoint(Checkpoint(directory), PREFIX, group, *SIZES)
    good = inputs(3, "float32", experts.total_experts)
    experts(*good)
    if rank == victim:
        if how == "dies":
            ranks.die()
        time.sleep(300)
    first = raised(experts, *good)
    with suppress(RuntimeError):
        assert raised(experts, *good).startswith("RuntimeError: the ranks' exchange has failed before"), "a second call"
    return first


def model(rank: int, size: int, directory: Path, how: str, level: str) -> dict[str, Any]:
    """A whole transformers model, under shard_experts or by transformers' own DistributedConfig."""
    from transformers.distributed import DistributedConfig

    _C.set_cpu_level(level)

    transformers.utils.logging.disable_progress_bar()
    load = Qwen3MoeForCausalLM.from_pretrained
    read: set[str] = set()
    tensor = Checkpoint.tensor

    def reading(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        read.add(name)
        return tensor(checkpoint, name)

    Checkpoint.tensor = reading  # type: ignore[method-assign]
    if how == "shard_experts":
        with hf.shard_experts(ExpertGroup(timeout=20)), hf.loading(copy=True):  # copies, to count bytes
            loaded, info = load(directory, dtype=torch.float32, output_loading_info=True)
    else:
        # transformers asks for accelerate wherever there is a device map, but needs nothing of it for a single device
        transformers.integrations.accelerate.is_accelerate_available = lambda: True
        config = DistributedConfig(tp_size=size, ep_size=size)
        with hf.loading(copy=True):
            loaded, info = load(directory, dtype=torch.float32, distributed_config=config, output_loading_info=True)
    ids = torch.arange(1, 12).reshape(1, -1)
    with torch.no_grad():
        logits = loaded(ids).logits
    group = next(m.group for m in loaded.modules() if isinstance(m, ShardedExperts))
    before = group.collectives, group.nbytes
    text = loaded.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    layers = [m for m in loaded.modules() if isinstance(m, ShardedExperts)]
    return {
        "logits": logits,
        "text": text,
        "read": read,
        "sent": (group.collectives - before[0], group.nbytes - before[1]),
        "layers": [(layer.own.start, layer.own.stop, layer.total_experts) for layer in layers],
        "held": sum(t.nbytes for t in loaded.state_dict().values()),
        "experts held": sum(t.nbytes for layer in layers for t in layer.state_dict().values()),
        "problems": [sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")],
    }


def refused(rank: int, size: int, directory: Path) -> dict[str, str]:
    """DistributedConfigs that ask for what isn't done."""
    from transformers.distributed import DistributedConfig

    transformers.integrations.accelerate.is_accelerate_available = lambda: True
    load = Qwen3MoeForCausalLM.from_pretrained
    found = {}
    for name, options in (
        ("attention", {"tp_size": size}),
        ("a plan", {"tp_size": size, "ep_size": size, "tp_plan": {"model.layers.*.self_attn.q_proj": "colwise"}}),
        ("data", {"tp_size": 1, "ep_size": size, "fsdp_size": size}),
        ("all_to_all", {"tp_size": size, "ep_size": size, "ep_implementation": "all_to_all"}),
    ):
        found[name] = raised(lambda options=options: load(directory, distributed_config=DistributedConfig(**options)))

    def both() -> None:
        with hf.shard_experts(ExpertGroup()):
            load(directory, distributed_config=DistributedConfig(tp_size=size, ep_size=size))

    found["both"] = raised(both)
    return found
