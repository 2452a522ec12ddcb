"""How transformers' loader is to treat memory: the options of `loading`, the check before it, and the cache of experts.

Owns what hf.py asks for when a model's weights are about to be loaded, and once they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metal_marlin import fit
from metal_marlin.cached import CachedWeightBuffers, cache_experts, check_readers
from metal_marlin.hf_plan import PROJECTIONS, Plan
from metal_marlin.weights import Checkpoint


@dataclass(frozen=True)
class Options:
    """See `loading`."""

    cache_bytes: int | None = None
    check: bool = True
    context: int | None = None
    copy: bool = False
    populate: bool = True
    readers: int = 2
    timeout: float = 30.0
    look_ahead: str = "router"
    bytes_per_second: float = 0.0


DEFAULTS = Options()
_options: ContextVar[Options] = ContextVar("metal_marlin_loading", default=DEFAULTS)


@contextlib.contextmanager
def loading(
    *,
    cache_bytes: int | None = None,
    check: bool = True,
    context: int | None = None,
    copy: bool = False,
    populate: bool = True,
    readers: int = 2,
    timeout: float = 30.0,
    look_ahead: str = "router",
    bytes_per_second: float = 0.0,
) -> Iterator[None]:
    """How from_pretrained loads EXL3 models inside of `with metal_marlin.hf.loading(...)`.

    transformers refuses arguments of from_pretrained that it doesn't know, so these are not its arguments.

    cache_bytes  keep so many bytes of the routed experts in memory, and read the others when they are needed; CPU only.
                 `model.metal_marlin_cache` is then a CachedWeightBuffers. None: all experts
    check        refuse a model that doesn't fit into free memory, with the numbers (python -m metal_marlin fit)
    context      tokens of KV cache that the check counts; default: 4096, or the model's most
    copy         copy the weights instead of mapping the files: for files that may change while the model is in use
    populate     read all that is mapped now, in order, rather than page by page when it is first used
    readers, timeout, look_ahead, bytes_per_second  as of CachedWeightBuffers
    """
    if cache_bytes is not None:
        whole = isinstance(cache_bytes, (int, float)) and not isinstance(cache_bytes, bool) and cache_bytes % 1 == 0
        if not whole or cache_bytes < 1:
            raise ValueError(f"cache_bytes is {cache_bytes!r}; expected a whole number of bytes, 1 or more")
        cache_bytes = int(cache_bytes)
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise ValueError(f"context is {context!r}; expected a number of tokens, 1 or more")
    check_readers(readers, timeout, look_ahead, bytes_per_second)
    if cache_bytes is not None and copy:
        raise ValueError("cache_bytes and copy were given; expected one of them: a cache copies what it reads")
    token = _options.set(
        Options(
            cache_bytes,
            check,
            context,
            copy,
            populate,
            readers,
            timeout,
            look_ahead,
            bytes_per_second,
        )
    )
    try:
        yield
    finally:
        _options.reset(token)


def current() -> Options:
    """The options of the innermost `loading`, or the defaults."""
    return _options.get()


def check_fit(
    checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype, gpu: bool, processes: int = 1
) -> None:
    """MemoryError with the numbers and the options if the model doesn't fit. ValueError: a cache on a GPU."""
    options = current()
    if options.cache_bytes is not None and gpu:
        raise ValueError("cache_bytes is set, and the model goes to a GPU; experts are cached on the CPU only")
    if not options.check:
        return
    need = fit.need_of(checkpoint, config, options.context, dtype)
    need = replace(need, experts=-(-need.experts // processes))  # this process's part, if they are spread
    free = fit.free_gpu_memory() if gpu else fit.free_memory()
    shorter = fit.longest_context(config, need, free.free, dtype) if options.cache_bytes is None else 0
    problem = fit.refusal(checkpoint.directory, need, free, options.cache_bytes, gpu=gpu, context=shorter)
    if problem:
        raise MemoryError(problem)


def install_cache(model: Any, plan: Plan, checkpoint: Checkpoint) -> CachedWeightBuffers:
    """Puts the experts of a loaded model, views of untouched files, behind a cache. ValueError: too small a budget."""
    options = current()
    config = model.config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    layers = {}
    for path, layer in plan.experts.items():
        groups = zip(*(layer.projection(projection) for projection in PROJECTIONS), strict=True)
        layers[path] = [[checkpoint.tensors[group.names["trellis"]] for group in expert] for expert in groups]
    if not layers:
        raise ValueError(f"cache_bytes is set; {type(model).__name__} has no quantized experts to keep in a cache")
    cache = cache_experts(
        model,
        layers,
        options.cache_bytes or 0,
        routers={path: router for path in layers if (router := router_of(model, path)) is not None},
        top_k=int(top_k),
        readers=options.readers,
        timeout=options.timeout,
        look_ahead=options.look_ahead,
        bytes_per_second=options.bytes_per_second,
    )
    checkpoint.check_files()  # the cache opened them by name
    return cache


def router_of(model: nn.Module, path: str) -> Callable[[Tensor], Tensor] | None:
    """What guesses the experts at `path` from hidden states: the router beside them, if it answers with ids."""
    block = model.get_submodule(path.rpartition(".")[0])
    gate = next((child for name, child in block.named_children() if name in ("gate", "router")), None)
    if gate is None:
        return None

    def guess(hidden_states: Tensor) -> Tensor:
        """int [tokens, top_k]; nothing where the router can't be asked like this."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        answer = gate(flat)
        parts = answer if isinstance(answer, tuple) else ()
        found = [part for part in parts if part.dtype in (torch.int64, torch.int32)]
        return found[-1] if found else flat.new_empty((len(flat), 0), dtype=torch.int64)

    return guess
