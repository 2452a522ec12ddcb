"""Experts spread over the processes of a torch.distributed group: each holds some, all see every token.

Owns which rank holds which experts, the exchange of a layer (one all-reduce of the ranks' sums), the check at the start
that the ranks run the same model, and what a rank says when another one dies or stalls. Arithmetic is TrellisExperts',
moving bytes torch.distributed's: any backend that takes the tensors, with its own timeout. Attention, router and shared
experts are computed by every rank, on the same tokens. Numbers, bounds and how to start: docs/sharding.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from metal_marlin import _C
from metal_marlin._version import __version__
from metal_marlin.modules import TrellisExperts
from metal_marlin.packed import TrellisStack
from metal_marlin.weights import Checkpoint

__all__ = ["ExpertGroup", "ShardedExperts", "expert_range"]

TIMEOUT = 60.0  # seconds; METAL_MARLIN_SHARD_TIMEOUT sets another one
START_TIMEOUT = 600.0
LAST_WORDS = 2.0  # seconds in which ranks that saw an exchange fail look who else did
IDENTITY_BYTES = 4 << 20  # unquantized tensors up to this size tell one model from another: norms, routers

_groups: weakref.WeakValueDictionary[str, ExpertGroup] = weakref.WeakValueDictionary()
_made: dict[str, int] = {}  # ExpertGroups so far, by the name of the process group they were made from
_names = itertools.count()


def expert_range(num_experts: int, size: int, rank: int) -> range:
    """The experts of one of `size` ranks: neighbours, and one more on the first ranks if they don't divide evenly.

    ValueError: more ranks than experts, or no such rank. TypeError: no whole numbers.
    """
    for name, value in (("num_experts", num_experts), ("size", size), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected a whole number")
    if not 0 <= rank < size:
        raise ValueError(f"rank is {rank}; expected 0 to {size - 1}")
    if size > num_experts:
        raise ValueError(f"the group has {size} ranks; expected at most {num_experts}, one for each expert")
    least, more = divmod(num_experts, size)
    first = rank * least + min(rank, more)
    return range(first, first + least + (rank < more))


class ExpertGroup:
    """The ranks that hold a model's experts, and their exchanges.

    group          a torch.distributed process group, None for the default one; all of its ranks must make their
                   ExpertGroups in the same order
    timeout        seconds that an exchange may take, waiting for the slowest rank included; default: the environment's
                   METAL_MARLIN_SHARD_TIMEOUT, or 60
    start_timeout  seconds to wait for the other ranks before the first exchange, while they load their weights

    A group of its own is made of the given one's ranks and backend, so that the timeout is this one's. RuntimeError: no
    process group is there, or a rank didn't come; ValueError: a timeout that is not positive; TypeError: a timeout that
    is no number, a group that is none. Whatever goes wrong in an exchange is a RuntimeError on every rank that is still
    there, a few seconds after the timeout at the latest; the group can't be used after it.

    .rank, .size; .collectives, .nbytes, .seconds: exchanges so far, the bytes that this rank gave, the time they took
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        timeout: float | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "there is no process group; expected torchrun to start this program and"
                " torch.distributed.init_process_group('gloo') to have been called"
            )
        if timeout is None:
            timeout = _timeout_of(os.environ.get("METAL_MARLIN_SHARD_TIMEOUT"))
        outside: Any = dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives those who aren't in it
        if group is not None and group != outside and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group is {group!r}; expected a torch.distributed process group, or None for the default one"
            )
        for name, value in (("timeout", timeout), ("start_timeout", start_timeout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}; expected a number of seconds")
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a positive number of seconds")
        self.timeout, self.start_timeout = float(timeout), float(start_timeout)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group; expected a group of its own rank")
        self.collectives, self.nbytes, self.seconds = 0, 0, 0.0
        self.name = str(next(_names))
        _groups[self.name] = self
        self._global_rank = dist.get_rank()
        self._layers: list[dict[str, Any]] = []
        self._identities: dict[str, str] = {}
        self._started, self._epoch = -1, 0  # layers that the start covered; how many starts there were
        self._last = len(self._layers)  # the layer of the last exchange
        self._failure = ""
        base: Any = dist.group.WORLD if group is None else group
        self._store = _store_of(base)
        made = _made[base.group_name] = _made.get(base.group_name, 0) + 1
        self._meet(f"metal_marlin/{made}")
        self._group = dist.new_group(
            dist.get_process_group_ranks(base),
            timeout=timedelta(seconds=self.timeout),
            backend=dist.get_backend_config(base),
            use_local_synchronization=True,
        )
        self._store = _store_of(self._group)
        self._devices = {entry.split(":")[0] for entry in dist.get_backend_config(self._group).split(",")}

    # ------------------------------------------------------------------ before the first exchange

    def identify(self, checkpoint: Checkpoint) -> None:
        """Makes `start` compare this checkpoint with those of the other ranks: names, types and shapes of all tensors,
        and the contents of small unquantized ones, such as norms and routers. Reads no expert. Once a folder."""
        key = str(checkpoint.directory)
        if key in self._identities:
            return
        packed = {name for group in checkpoint.groups.values() for name in group.names.values()}
        digest = hashlib.sha256()
        for name in sorted(checkpoint.tensors):
            info = checkpoint.tensors[name]
            digest.update(repr((name, info.dtype, info.shape)).encode())
            if name not in packed and info.nbytes <= IDENTITY_BYTES:
                digest.update(checkpoint.tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._identities[key] = digest.hexdigest()

    def add(self, description: dict[str, Any]) -> int:
        """A layer's number. Layers must be added in the same order on every rank."""
        self._layers.append(description)
        self._last = len(self._layers)
        return len(self._layers) - 1

    def start(self) -> None:
        """Waits for the other ranks and compares versions, models and layers. The first exchange does it by itself.

        RuntimeError: a rank didn't come within start_timeout, or the ranks don't fit together; the message says how.
        """
        if self._started == len(self._layers):
            return
        self._epoch += 1
        facts = {
            "metal_marlin": __version__,
            "torch": torch.__version__.split("+")[0],
            "the CPU kernels (METAL_MARLIN_CPU)": _C.cpu_level(),
            "the number of sharded layers": len(self._layers),
            "the checkpoints' SHA-256": list(self._identities.values()),
        }
        theirs = [json.loads(text) for text in self._meet(f"start/{self._epoch}", json.dumps([facts, self._layers]))]
        for rank, (other, layers) in enumerate(theirs):
            first, first_layers = theirs[0]
            for fact, value in other.items():
                if value != first[fact]:
                    raise RuntimeError(
                        f"rank {rank} has {value} for {fact}, rank 0 has {first[fact]}; expected the same on every rank"
                    )
            for number, (layer, expected) in enumerate(zip(layers, first_layers, strict=True)):
                for name in layer.keys() | expected.keys():
                    if name != "experts" and layer.get(name) != expected.get(name):
                        raise RuntimeError(
                            f"rank {rank}'s sharded layer {number} has {name} {layer.get(name)}, rank 0's"
                            f" {expected.get(name)}; expected the same on every rank"
                        )
        for number, layer in enumerate(self._layers):
            held = [tuple(layers[number]["experts"]) for _, layers in theirs]
            ends = [0, *(end for _, end in held)]
            if [begin for begin, _ in held] != ends[:-1] or ends[-1] != layer["num_experts"]:
                raise RuntimeError(
                    f"sharded layer {number}: the ranks hold experts {', '.join(f'{a} to {b - 1}' for a, b in held)};"
                    f" expected each of 0 to {layer['num_experts'] - 1} once, in the order of the ranks"
                )
        self._started = len(self._layers)

    def _meet(self, place: str, text: str = "") -> list[str]:
        """What every rank has said at this place, once they all have; they may be busy loading weights before."""
        keys = [f"{place}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], text)
            silent = self._wait_for(keys, self.start_timeout)
            if not silent:
                return [self._store.get(key).decode() for key in keys]
            self._failure = (
                f"{_ranks(silent)} did not come within start_timeout={self.start_timeout:g} s, or failed before"
            )
        except dist.DistError as error:
            self._failure = f"the store of the process group is gone while the ranks meet: {_cause(error)}"
        raise RuntimeError(f"rank {self.rank} of {self.size}: {self._failure}")

    # ------------------------------------------------------------------ exchanges

    def sum(self, flat: Tensor, what: str) -> Tensor:
        """The sum over all ranks of a contiguous float32 tensor, which may be overwritten. `what` is for messages."""
        if self.size == 1:
            return flat
        data = flat if flat.device.type in self._devices else flat.cpu()
        self._run(lambda: dist.all_reduce(data, group=self._group), data.nbytes, what)
        return data.to(flat.device)

    def announce(self, layer: int, facts: dict[str, int]) -> None:
        """Compares a layer's call with those of the other ranks, if a pass through the model begins: buffers of
        different sizes would end the process inside of gloo. A pass begins when layers don't follow each other."""
        self._check_alive()
        self.start()
        begins, self._last = layer <= self._last, layer
        if self.size == 1 or not begins:
            return
        mine = torch.tensor([layer, *facts.values()], dtype=torch.int64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        if "cpu" not in self._devices:
            device = next(iter(self._devices))
            mine, every = mine.to(device), [tensor.to(device) for tensor in every]
        self._run(lambda: dist.all_gather(every, mine, group=self._group), mine.nbytes, "the pass's announcement")
        calls = [tensor.tolist() for tensor in every]
        for rank, call in enumerate(calls):
            for name, value, first in zip(("layer", *facts), call, calls[0], strict=True):
                if value != first:
                    raise RuntimeError(
                        f"rank {rank} runs a sharded layer with {name} {value}, rank 0 with {name} {first};"
                        " expected the same tokens on every rank"
                    )

    def _run(self, collective: Any, nbytes: int, what: str) -> None:
        self._check_alive()
        begin = time.monotonic()
        try:
            collective()
        except (RuntimeError, ValueError) as error:
            self._fail(what, error, time.monotonic() - begin)
        self.seconds += time.monotonic() - begin
        self.collectives += 1
        self.nbytes += nbytes

    def _check_alive(self) -> None:
        if self._failure:
            raise RuntimeError(f"the ranks' exchange has failed before, start all of them anew: {self._failure}")
        try:
            dist.get_group_rank(self._group, self._global_rank)
        except (RuntimeError, ValueError):
            raise RuntimeError(
                "the process group that holds the experts has been destroyed; expected it to live as long as the model"
            ) from None

    def _fail(self, what: str, error: Exception, seconds: float) -> NoReturn:
        """Ranks that saw an exchange fail tell each other through the store; the silent ones are the cause."""
        text = f"rank {self.rank} of {self.size}: {what} failed after {seconds:.1f} s (timeout={self.timeout:g} s):"
        text += f" {_cause(error)}."
        found: list[str] = []

        def ask() -> None:
            with suppress(dist.DistError):
                self._store.set(f"failed/{self.rank}", what)
                silent = self._wait_for([f"failed/{rank}" for rank in range(self.size)], LAST_WORDS)
                found.append(f" {_ranks(silent)} did not report: died or stalled." if silent else "")

        # a thread, for a store whose process is stopped doesn't answer, and waits for much longer than an exchange
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * LAST_WORDS)
        text += found[0] if found else " The store is silent too: its process, torchrun's or rank 0's, died or stalled."
        self._failure = text
        raise RuntimeError(text) from error

    def _wait_for(self, keys: Sequence[str], seconds: float) -> list[int]:
        """The ranks whose key was not there in time, or before one of them failed in an exchange."""
        end, pause = time.monotonic() + seconds, 0.001
        failed = [f"failed/{rank}" for rank in range(self.size)]
        while True:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            gone = failed[0] not in keys and any(self._store.check([failed[rank]]) for rank in missing)
            if not missing or gone or time.monotonic() > end:
                return missing
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ExpertGroup can't be pickled, it is a connection; expected state_dict() of the module")

    def __repr__(self) -> str:
        return f"ExpertGroup(rank={self.rank}, size={self.size}, timeout={self.timeout:g})"


def check_group(group: object) -> None:
    """TypeError for anything but an ExpertGroup."""
    if not isinstance(group, ExpertGroup):
        raise TypeError(f"group is {group!r}; expected an ExpertGroup, as ExpertGroup() makes of a process group")


class ShardedExperts(TrellisExperts):
    """TrellisExperts of which this process holds a part; forward takes the ids of the whole layer and gives its sum.

    gate_proj, up_proj, down_proj  this rank's experts, expert_range(num_experts, group.size, group.rank) of the layer
    total_experts                  of all ranks together
    group                          ExpertGroup

    Every rank must call it with the same tokens, in the same order of layers. hidden_states, top_k_index, top_k_weights
    and the result are those of TrellisExperts; the ranks' sums are float32, added by the backend, and rounded once.
    Gradients are those of the whole layer, on every rank, if every rank runs the same backward. ValueError: not this
    rank's number of experts, ids that name no expert. RuntimeError: as ExpertGroup; ranks whose routers disagree.
    """

    def __init__(
        self,
        gate_proj: TrellisStack,
        up_proj: TrellisStack,
        down_proj: TrellisStack,
        hidden_dim: int | None = None,
        intermediate_dim: int | None = None,
        *,
        total_experts: int,
        group: ExpertGroup,
        **options: Any,
    ) -> None:
        check_group(group)
        super().__init__(gate_proj, up_proj, down_proj, hidden_dim, intermediate_dim, **options)
        self.own = expert_range(total_experts, group.size, group.rank)
        if self.num_experts != len(self.own):
            raise ValueError(
                f"gate_proj has {self.num_experts} experts; expected {len(self.own)}, {self.own.start} to"
                f" {self.own.stop - 1} of {total_experts}, on rank {group.rank} of {group.size}"
            )
        self.total_experts, self.group = total_experts, group
        self.number = group.add(
            {
                "experts": [self.own.start, self.own.stop],
                "num_experts": total_experts,
                "hidden_dim": self.hidden_dim,
                "intermediate_dim": self.intermediate_dim,
                "activation": [self.activation, self.alpha, self.limit],
                "biases": [stack.bias is not None for stack in (gate_proj, up_proj, down_proj)],
            }
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        group: ExpertGroup,
        hidden_dim: int | None = None,
        intermediate_dim: int | None = None,
        *,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        **options: Any,
    ) -> ShardedExperts:
        """This rank's part of the experts `prefix`.E.`names`, such as model.layers.0.mlp.experts; no other expert's
        weights are read. `options` are activation, alpha and limit."""
        check_group(group)
        group.identify(checkpoint)
        total = checkpoint.count_experts(prefix, names)
        own = checkpoint.experts(prefix, names, expert_range(total, group.size, group.rank))
        gate, up, down = (TrellisStack.from_experts(tensors) for tensors in own)
        return cls(gate, up, down, hidden_dim, intermediate_dim, total_experts=total, group=group, **options)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        layer, x, weights = f"{self.group.name}/{self.number}", hidden_states.to(torch.float32), top_k_weights
        train = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        if train:
            x, weights = _ops.sharded_inputs(x, weights, layer)
        here = (top_k_index >= self.own.start) & (top_k_index < self.own.stop)
        local = torch.where(here, top_k_index - self.own.start, _C.NO_EXPERT)
        partial = super().forward(x, local, weights)
        held = torch.where(here, top_k_index + 1, 0)
        total: Tensor = _ops.sharded_sum(partial, top_k_index, held, layer, train)
        return total.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.own.start}..{self.own.stop - 1} of {self.total_experts}, {super().extra_repr()}"


# ---------------------------------------------------------------- the exchange as ops, so that compilers see one node

_ops = torch.ops.metal_marlin


for _schema in (
    "sharded_sum(Tensor partial, Tensor ids, Tensor held, str layer, bool train) -> Tensor",
    "sharded_inputs(Tensor x, Tensor weights, str layer) -> (Tensor, Tensor)",
    "sharded_inputs_backward(Tensor dx, Tensor dweights, str layer) -> (Tensor, Tensor)",
):  # not custom_op, whose first call imports all of torch._dynamo
    torch.library.define(f"metal_marlin::{_schema.partition('(')[0]}", "(" + _schema.partition("(")[2])


def _layer_of(name: str) -> tuple[ExpertGroup, int]:
    group, _, number = name.partition("/")
    if group not in _groups:
        raise RuntimeError("the ExpertGroup of these experts is gone; expected it to live as long as the model")
    return _groups[group], int(number)


@torch.library.impl("metal_marlin::sharded_sum", "CompositeExplicitAutograd")
def sharded_sum(partial: Tensor, ids: Tensor, held: Tensor, layer: str, train: bool) -> Tensor:
    """partial [..., H] float32 of this rank -> the sum over all ranks.

    One number a token goes along: the sum of (id + 1) over the slots that this rank computed, `held` [..., top_k].
    Over the ranks they must add up to that of the token's ids, or a slot was left out or computed twice.
    """
    group, number = _layer_of(layer)
    experts = group._layers[number]["num_experts"]
    wrong = (ids < _C.NO_EXPERT) | (ids >= experts)
    if wrong.any():
        value = int(ids[wrong][0])
        raise ValueError(f"top_k_index holds {value}; expected 0 to {experts - 1}, or -1 for none")
    hidden, top_k = partial.shape[-1], ids.shape[-1]
    rows = partial.numel() // hidden
    group.announce(number, {"tokens": rows, "hidden": hidden, "top_k": top_k, "gradients": int(train)})
    if not rows:
        return partial.clone()
    flat = torch.cat([partial.reshape(-1), held.sum(-1).reshape(-1).to(partial.dtype)])
    flat = group.sum(flat, f"the sum of sharded layer {number} over {rows} tokens")
    expected = (ids + 1).sum(-1).reshape(-1).to(flat.dtype)
    if not torch.equal(flat[rows * hidden :], expected):
        token = int((flat[rows * hidden :] != expected).nonzero()[0])
        raise RuntimeError(
            f"sharded layer {number}: the ranks chose different experts for token {token}: their hidden states differ;"
            " expected the same tokens, weights, seed and kind of processor on every rank"
        )
    return flat[: rows * hidden].view(partial.shape)


@torch.library.impl("metal_marlin::sharded_inputs", "CompositeExplicitAutograd")
def sharded_inputs(x: Tensor, weights: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Copies of x [..., H] and weights [..., top_k], whose gradients are summed over the ranks."""
    return x.clone(memory_format=torch.contiguous_format), weights.clone(memory_format=torch.contiguous_format)


@torch.library.impl("metal_marlin::sharded_inputs_backward", "CompositeExplicitAutograd")
def sharded_inputs_backward(dx: Tensor, dweights: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Sums of both over the ranks, in one exchange."""
    group, number = _layer_of(layer)
    flat = torch.cat([dx.reshape(-1), dweights.reshape(-1).to(torch.float32)])
    flat = group.sum(flat, f"the gradient of sharded layer {number}")
    return flat[: dx.numel()].view(dx.shape).clone(), flat[dx.numel() :].view(dweights.shape).to(dweights.dtype)


@torch.library.register_fake("metal_marlin::sharded_sum")
def _(partial: Tensor, ids: Tensor, held: Tensor, layer: str, train: bool) -> Tensor:
    return partial.new_empty(partial.shape)


@torch.library.register_fake("metal_marlin::sharded_inputs")
def _(x: Tensor, weights: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


@torch.library.register_fake("metal_marlin::sharded_inputs_backward")
def _(dx: Tensor, dweights: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    return dx.new_empty(dx.shape), dweights.new_empty(dweights.shape)


def _remember_layer(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.layer, ctx.inputs = inputs[2], [(tensor.shape, tensor.dtype) for tensor in inputs[:2]]


def _inputs_backward(ctx: Any, dx: Tensor | None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    given = next(tensor for tensor in (dx, dweights) if tensor is not None)
    grads = [
        given.new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip((dx, dweights), ctx.inputs, strict=True)
    ]
    return (*_ops.sharded_inputs_backward(*grads, ctx.layer), None)


torch.library.register_autograd("metal_marlin::sharded_sum", lambda ctx, grad: (grad, None, None, None, None))
torch.library.register_autograd("metal_marlin::sharded_inputs", _inputs_backward, setup_context=_remember_layer)


def _timeout_of(text: str | None) -> float:
    try:
        return TIMEOUT if not text else float(text)
    except ValueError:
        raise ValueError(f"METAL_MARLIN_SHARD_TIMEOUT is {text!r}; expected a number of seconds") from None


def _store_of(group: dist.ProcessGroup) -> Any:
    find = getattr(group, "get_group_store", None)  # older torch has the other one only
    return find() if find else dist.distributed_c10d._get_process_group_store(group)


def _cause(error: Exception) -> str:
    """The part of a message of torch.distributed's that says what happened."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first.rpartition("] ")[2].partition(". This is typically")[0].rstrip(".")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
