"""Sharded experts in transformers' models: `with shard_experts(ExpertGroup())` around from_pretrained, or its own
from_pretrained(..., distributed_config=DistributedConfig(...)).

Owns which DistributedConfigs are taken, and the style in a model's expert-parallel plan that says that the experts
module exchanges its sums itself (sharding.py). With a DistributedConfig, transformers starts the process group, and
wants `accelerate`; its own styles would split parameters that packed experts don't have, only evenly, and add in the
activations' dtype. Contract: transformers/distributed/expert_parallel.py (transformers 5.23).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist

from metal_marlin.sharding import ExpertGroup, check_group

logger = logging.getLogger("transformers.metal_marlin")
STYLE = "metal_marlin_experts"
_asked: ContextVar[ExpertGroup | None] = ContextVar("shard_experts", default=None)


@contextmanager
def shard_experts(group: ExpertGroup) -> Iterator[None]:
    """Inside of it, from_pretrained of an EXL3 folder loads this rank's part of every layer's quantized experts, and
    everything else whole. All ranks must load the same model. `group` is used by the model from then on. TypeError: it
    is no ExpertGroup."""
    check_group(group)
    token = _asked.set(group)
    try:
        yield
    finally:
        _asked.reset(token)


def expert_group(config: Any) -> ExpertGroup | None:
    """The group that shard_experts or a model's DistributedConfig asks for, None if neither does.

    NotImplementedError names what isn't done: splitting anything but experts, or exchanging them in another way.
    """
    asked = getattr(config, "distributed_config", None)
    given = _asked.get()
    if asked is None or given is not None:
        if asked is not None:
            raise NotImplementedError("distributed_config is set inside of shard_experts; expected one of the two")
        return given
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    for name in ("pp_size", "dp_replicate_size", "fsdp_size"):
        if (getattr(asked, name, 1) or 1) != 1:
            value = getattr(asked, name)
            raise NotImplementedError(
                f"distributed_config.{name} is {value}; expected 1: EXL3 models are split by experts only"
            )
    tp_size, ep_size = getattr(asked, "tp_size", 1) or 1, getattr(asked, "ep_size", 1) or 1
    if tp_size == ep_size == 1:
        return None
    tp_plan = getattr(asked, "tp_plan", None)
    if ep_size != tp_size or tp_plan:
        raise NotImplementedError(
            f"distributed_config has tp_size={tp_size}, tp_plan={tp_plan!r}, ep_size={ep_size}; expected tp_size and"
            f" ep_size={ranks} and no tp_plan: EXL3 models are split by experts only, and all ranks see the same tokens"
        )
    implementation = getattr(asked, "ep_implementation", "auto")
    if implementation != "auto":
        raise NotImplementedError(
            f"distributed_config.ep_implementation is {implementation!r}; expected 'auto': packed experts exchange"
            " their float32 sums themselves"
        )
    group = ExpertGroup()
    if group.rank == 0:
        logger.warning("the experts are split over %d ranks; everything else is loaded whole by every rank", group.size)
    return group


def set_plan(model: Any, experts: Iterable[str]) -> None:
    """Makes `experts`, paths of modules, the model's whole plan. transformers insists on a tensor-parallel one too, but
    drops from it what the expert-parallel one has, so that nothing stays."""
    try:
        from transformers.distributed.expert_parallel import ExpertParallelLayer
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
    except ImportError as error:
        raise NotImplementedError(f"distributed_config needs transformers 5.23 or newer for EXL3 ({error})") from error

    class ExchangesItself(ExpertParallelLayer):
        def install_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            return module

    if STYLE not in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(STYLE, ExchangesItself())
    model.ep_plan = {replace_layer_number_by_wildcard(path): STYLE for path in experts}
    model.tp_plan = dict(model.ep_plan)
