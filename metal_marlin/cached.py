"""Experts larger than memory: a bounded cache of their tiles, and the module that computes out of it.

Owns CachedWeightBuffers, one cache for all layers of a model, and CachedExperts, what stands in for a TrellisExperts.
Slots, reading, eviction and the readers' threads are C (csrc/memory/cache.c). Only tiles are cached: scales, one or two
percent of an expert, stay in memory. CPU only. Policies are compared in docs/memory.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metal_marlin import _C, ops
from metal_marlin.modules import TrellisExperts
from metal_marlin.packed import Packed, TrellisStack
from metal_marlin.safetensors_header import TensorInfo

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LOOK_AHEAD = ("router", "previous", "none")
#: Uses of any expert for each slot of the cache, after which a use counts half. From traces: docs/memory.md.
HALF_LIFE = 4.0
AHEAD_TOKENS = 4  # calls with more tokens use most experts anyway: nothing is guessed for them


@dataclass
class Statistics:
    """What a cache has done since it was made, or since the statistics were reset.

    hits, late, misses   uses of an expert, once for each call of a layer: it was there; it was on its way; it had to be
                         asked for
    prefetched, useful   experts asked for ahead of their use, and those of them that were then used
    evictions            experts that made room
    reads, bytes         experts read, and their bytes
    failures             reads that failed
    stalls, stall_ns     calls that had to wait, and for how long in all
    pending, filled, pinned  slots just now: asked for or being read; holding an expert; in use
    """

    hits: int
    late: int
    misses: int
    prefetched: int
    useful: int
    evictions: int
    reads: int
    bytes: int
    failures: int
    stalls: int
    stall_ns: int
    pending: int
    filled: int
    pinned: int

    @property
    def hit_rate(self) -> float:
        """Of all uses, those that did not have to wait for the whole of a read: hits and late ones. NaN if none."""
        uses = self.hits + self.late + self.misses
        return (self.hits + self.late) / uses if uses else float("nan")


def check_readers(readers: int, timeout: float, look_ahead: str, bytes_per_second: float) -> None:
    """ValueError, naming it, for an argument of CachedWeightBuffers that is out of range; TypeError for no number."""
    if look_ahead not in LOOK_AHEAD:
        raise ValueError(f"look_ahead is {look_ahead!r}; expected one of {', '.join(LOOK_AHEAD)}")
    if isinstance(readers, bool) or not isinstance(readers, int) or not 1 <= readers <= 64:
        raise ValueError(f"readers is {readers!r}; expected a whole number from 1 to 64")
    for name, value in (("timeout", timeout), ("bytes_per_second", bytes_per_second)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}; expected a number")
    if not 0 < timeout < 1e6:
        raise ValueError(f"timeout is {timeout!r}; expected seconds, more than 0 and less than 1e6")
    if bytes_per_second != 0 and not 1 <= bytes_per_second <= 1e15:
        raise ValueError(f"bytes_per_second is {bytes_per_second!r}; expected 1 to 1e15, or 0 for the disk's own speed")


class CachedWeightBuffers:
    """A cache of experts' tiles within a budget of bytes, for all layers of a model; may be used from many threads.

    layers            for each layer, for each expert, the trellises of its gate, up and down as their headers say
    budget_bytes      memory for tiles; rounded down to whole experts of the largest size
    top_k             experts of one token: what the cache must hold at least
    readers           threads that read, so reads in flight
    timeout           seconds until a read that doesn't end (a network's disk) is a TimeoutError
    look_ahead        what is read before it is asked for: "router", what the next layer's router says of this layer's
                      input; "previous", what the token before used; "none"
    bytes_per_second  a simulated disk, for measurements; 0: none

    ValueError: a budget below one token's experts, which the message states, or arguments that make no sense. OSError:
    a file that can't be opened, is truncated, or, later, has changed or can't be read; nothing wrong is ever computed.
    The readers do not survive a fork: in a forked process `acquire` is an OSError (it must load the model itself),
    `release` and `prefetch` do nothing, and statistics are zeros.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Sequence[TensorInfo]]],
        budget_bytes: int,
        *,
        top_k: int,
        readers: int = 2,
        timeout: float = 30.0,
        look_ahead: str = "router",
        half_life: float = HALF_LIFE,
        bytes_per_second: float = 0.0,
    ) -> None:
        check_readers(readers, timeout, look_ahead, bytes_per_second)
        if not 1e-3 <= half_life <= 1e6:
            raise ValueError(f"half_life is {half_life!r}; expected 0.001 to 1e6 times the number of slots")
        if not layers or not all(layers):
            raise ValueError("layers is empty, or one of them is; expected at least one expert each")
        self.slot_bytes = max(sum(part.nbytes for part in expert) for layer in layers for expert in layer)
        experts = sum(map(len, layers))
        least = top_k * self.slot_bytes
        if budget_bytes < least:
            raise ValueError(
                f"the cache of experts has {budget_bytes} bytes; expected at least {least}: {top_k} experts of a token,"
                f" {self.slot_bytes} bytes each"
            )
        self.slots = min(budget_bytes // self.slot_bytes, experts)
        self.top_k, self.timeout, self.look_ahead = top_k, timeout, look_ahead
        self._first = np.cumsum([0, *map(len, layers)]).tolist()
        files: dict[Path, int] = {}
        pieces = []
        for layer, first in zip(layers, self._first, strict=False):
            for e, expert in enumerate(layer):
                at = 0
                for part in expert:
                    file = files.setdefault(part.file, len(files))
                    pieces.append((first + e, file, part.begin, part.nbytes, at))
                    at += part.nbytes
        options = (experts, self.slots, self.slot_bytes, readers, half_life * self.slots, bytes_per_second)
        self._cache, address = _C.cache_open(tuple(files), np.array(pieces, np.int64).tobytes(), *options)
        slab = (ctypes.c_ubyte * (self.slots * self.slot_bytes)).from_address(address)
        slab.cache = self._cache  # type: ignore[attr-defined]  # its owner: the tensor refers to the array
        self.tiles = torch.frombuffer(slab, dtype=torch.int16)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_bytes

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Pins distinct experts of a layer, waits for them, and returns their slots. To be followed by `release`.

        OSError: more experts than slots, or as above. TimeoutError: the disk stalls. KeyboardInterrupt ends the wait.
        Then none is pinned.
        """
        return _C.cache_acquire(self._cache, self._items(layer, experts, distinct=True), self.timeout)

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Unpins what `acquire` has pinned. Experts that are never released stay for good.

        ValueError: one of them is not pinned; then nothing is unpinned.
        """
        items = self._items(layer, experts, distinct=True)
        try:
            _C.cache_release(self._cache, items)
        except ValueError:
            raise ValueError(
                f"experts are {list(experts)} of layer {layer}, and one of them is not in use; expected experts that"
                " were acquired and not released since"
            ) from None

    @contextlib.contextmanager
    def use(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """with cache.use(layer, experts) as slots: the experts are there until the end of the block."""
        items = self._items(layer, experts, distinct=True)
        slots = _C.cache_acquire(self._cache, items, self.timeout)
        try:
            yield slots
        finally:
            _C.cache_release(self._cache, items)

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Asks for experts, the likeliest first, and returns at once; how many of them are now to be read.

        Takes no room from what is in use, being read, or itself read ahead a moment ago.
        """
        return _C.cache_prefetch(self._cache, self._items(layer, experts))

    def statistics(self, *, reset: bool = False) -> Statistics:
        return Statistics(**_C.cache_statistics(self._cache, reset))

    def _items(self, layer: int, experts: Sequence[int], distinct: bool = False) -> list[int]:
        """Their numbers in the cache. ValueError, TypeError: no such layer or experts."""
        if not isinstance(layer, int) or not 0 <= layer < len(self._first) - 1:
            error = ValueError if isinstance(layer, int) else TypeError
            raise error(f"layer is {layer!r}; expected a whole number from 0 to {len(self._first) - 2}")
        first, end = self._first[layer], self._first[layer + 1]
        try:
            items = [first + operator.index(e) for e in experts]
        except TypeError:
            raise TypeError(f"experts are {experts!r}; expected whole numbers from 0 to {end - first - 1}") from None
        if items and not first <= min(items) <= max(items) < end:
            raise ValueError(f"experts are {list(experts)}; expected 0 to {end - first - 1}, as layer {layer} has")
        if distinct and len(set(items)) < len(items):
            raise ValueError(f"experts are {list(experts)}; expected each of them once")
        return items

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedWeightBuffers:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a model with a cache of experts can't be pickled: load it where it is needed, or without cache_bytes"
        )


class CachedStack(Packed):
    """One projection of a layer's experts, whose tiles are in a cache: scales, and a table that every call rewrites."""

    suh: Tensor
    svh: Tensor
    bias: Tensor | None

    def __init__(self, stack: TrellisStack, cache: CachedWeightBuffers, places: Sequence[int]) -> None:
        super().__init__()
        self.k, self.n, self.rates2, self.codebooks = stack.k, stack.n, stack.rates2, stack.codebooks
        self.formats, self.num_experts = stack.formats, stack.num_experts
        self.register_buffer("suh", stack.suh)
        self.register_buffer("svh", stack.svh)
        self.register_buffer("bias", stack.bias)
        self.cache, self.places = cache, tuple(places)
        rows = stack.make_table("cpu").numpy()
        rows[:, 0] = 0
        self._tables = _Tables(rows)

    def bound(self, experts: Sequence[int], slots: Sequence[int]) -> _Bound:
        """The stack as the op takes it, for a call that uses these experts in these slots."""
        table, rows = self._tables.own()
        size, places = self.cache.slot_bytes // 2, self.places
        for e, slot in zip(experts, slots, strict=True):
            rows[e, 0] = slot * size + places[e]
        buffers = self._buffers  # nn.Module looks in three places for each, and a token asks for every layer's
        return _Bound(self.cache.tiles, table, buffers["suh"], buffers["svh"], buffers["bias"], self.formats)  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}trellis" in state_dict:
            args[-1].append(
                f"{prefix}trellis: the tiles of cached experts are read from the checkpoint's files and can't be"
                " replaced; load the model without cache_bytes"
            )
            tiles = (f"{prefix}trellis", f"{prefix}table")
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tiles}
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Tables:
    """A table for each thread, since two may be within a call at once, and the numbers in it."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self._rows, self._local = rows, threading.local()

    def own(self) -> tuple[Tensor, NDArray[np.int64]]:
        """The calling thread's."""
        found: tuple[Tensor, NDArray[np.int64]] | None = getattr(self._local, "found", None)
        if found is None:
            rows = self._rows.copy()
            found = self._local.found = torch.from_numpy(rows), rows
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tables:
        return _Tables(self._rows)


@dataclass
class _Bound:
    """A Stack (ops.py)."""

    trellis: Tensor
    table: Tensor
    suh: Tensor
    svh: Tensor
    bias: Tensor | None
    formats: int


class CachedExperts(nn.Module):
    """TrellisExperts whose tiles are in a cache: the same arguments, the same result.

    A call whose experts all fit into the cache gives the same bits. One with more (a long prompt, a small cache) runs
    in parts, experts in ascending order, and adds them in float32: it differs by float32's rounding. Its gradient is
    refused: a backward pass would need the tiles again. torch.compile leaves it as it is. Its state_dict has the scales
    only, and takes no tiles: they are the files'.

    experts      what it stands in for; its tiles are not touched
    cache, layer the cache, and which of its layers this is
    """

    def __init__(self, experts: TrellisExperts, cache: CachedWeightBuffers, layer: int) -> None:
        super().__init__()
        self.hidden_dim, self.intermediate_dim = experts.hidden_dim, experts.intermediate_dim
        self.activation, self.alpha, self.limit = experts.activation, experts.alpha, experts.limit
        self.num_experts = experts.num_experts
        stacks = [getattr(experts, name) for name in PROJECTIONS]
        at = np.zeros((len(PROJECTIONS) + 1, self.num_experts), np.int64)
        at[1:] = [[a * b * c for a, b, c in stack.shapes] for stack in stacks]
        places = at.cumsum(axis=0)
        for name, stack, place in zip(PROJECTIONS, stacks, places.tolist(), strict=False):
            self.add_module(name, CachedStack(stack, cache, place))
        if "act_fn" in experts._modules:
            self.add_module("act_fn", experts._modules["act_fn"])
        self.cache, self.layer = cache, layer
        self._next: tuple[CachedExperts, Callable[[Tensor], Tensor] | None] | None = None
        self._previous: list[int] = []

    def look_ahead_to(self, layer: CachedExperts, router: Callable[[Tensor], Tensor] | None) -> None:
        """The layer that runs next, and what guesses its experts, int [tokens, n], from this one's input."""
        self._next = layer, router  # in a tuple: the next layer is no child of this one

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise NotImplementedError(
                "experts in a cache have no gradient; call the model within torch.no_grad() or inference_mode(), or, to"
                " train, load it without cache_bytes"
            )
        few = top_k_index.numel() <= AHEAD_TOKENS * top_k_index.shape[-1]
        needed = sorted(set(top_k_index.reshape(-1).tolist())) if few else torch.unique(top_k_index).tolist()
        needed = [e for e in needed if e != _C.NO_EXPERT]
        if needed and not 0 <= needed[0] <= needed[-1] < self.num_experts:
            raise ValueError(
                f"top_k_index has {needed[0]} to {needed[-1]}; expected 0 to {self.num_experts - 1}, or"
                f" {_C.NO_EXPERT} for no expert"
            )
        room = self.cache.slots
        if len(needed) <= room:
            with self.cache.use(self.layer, needed) as slots:
                if few:
                    self._guess(hidden_states)
                y = self._run(hidden_states, top_k_index, top_k_weights, needed, slots)
        else:
            y = self._run_in_parts(hidden_states, top_k_index, top_k_weights, needed, room)
        last = needed if few else top_k_index.reshape(-1, top_k_index.shape[-1])[-1].tolist()
        self._previous = [e for e in last if e != _C.NO_EXPERT]
        return y

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[int], slots: Sequence[int]) -> Tensor:
        gate, up, down = (getattr(self, name).bound(experts, slots) for name in PROJECTIONS)
        return ops.moe_trellis_swiglu(
            x, weights, ids, gate, up, down, intermediate=self.intermediate_dim, activation=self.activation,
            alpha=self.alpha, limit=self.limit,
        )  # fmt: skip

    def _run_in_parts(self, x: Tensor, ids: Tensor, weights: Tensor, needed: Sequence[int], room: int) -> Tensor:
        rows, ids, weights = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, ids, weights))
        total = torch.zeros(rows.shape, dtype=torch.float32)
        half = max(self.cache.top_k, room // 2) if room > self.cache.top_k else room  # the next part is read meanwhile
        parts = [needed[i : i + half] for i in range(0, len(needed), half)]
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            with self.cache.use(self.layer, part) as slots:
                self.cache.prefetch(self.layer, following)
                token, slot = torch.isin(ids, torch.tensor(part, dtype=ids.dtype)).nonzero(as_tuple=True)
                one, weight = ids[token, slot].unsqueeze(-1), weights[token, slot].unsqueeze(-1).float()
                y = self._run(rows[token].float(), one, weight, part, slots)
            total.index_add_(0, token, y)
        return total.to(x.dtype).view(x.shape)

    def _guess(self, x: Tensor) -> None:
        """Reads ahead for the layer that runs next."""
        if self._next is None or self.cache.look_ahead == "none":
            return
        following, router = self._next
        if router is not None and self.cache.look_ahead == "router":
            guess = router(x)
            likely = list(dict.fromkeys(guess.t().reshape(-1).tolist()))  # every token's best, then its second best
        else:
            likely = following._previous
        if likely:
            self.cache.prefetch(following.layer, likely)

    def extra_repr(self) -> str:
        sizes = f"hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}"
        return f"{sizes}, activation={self.activation!r}, slots={self.cache.slots} of {self.cache.slot_bytes} bytes"


def cache_experts(
    model: nn.Module,
    layers: Mapping[str, Sequence[Sequence[TensorInfo]]],
    budget_bytes: int,
    *,
    routers: dict[str, Callable[[Tensor], Tensor]] | None = None,
    **options: Any,
) -> CachedWeightBuffers:
    """Puts CachedExperts into the place of a model's TrellisExperts, and returns their cache.

    layers   {path of a TrellisExperts: for each expert, the headers' trellises of gate, up, down}, in running order
    routers  {path: what guesses this layer's experts, int [tokens, n], from hidden states [..., H]}, where there is one
    options  as of CachedWeightBuffers
    """
    cache = CachedWeightBuffers(list(layers.values()), budget_bytes, **options)
    made = []
    for i, path in enumerate(layers):
        experts = CachedExperts(model.get_submodule(path), cache, i)  # type: ignore[arg-type]
        model.set_submodule(path, experts)
        made.append(experts)
    paths = list(layers)
    for i, experts in enumerate(made):
        following = (i + 1) % len(made)
        router = (routers or {}).get(paths[following]) if following else None  # the next token's input isn't there yet
        experts.look_ahead_to(made[following], router)
    return cache
