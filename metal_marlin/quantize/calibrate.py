"""Calibration: rows of text through the model, one decoder layer at a time, and what its linear layers see of them.

Owns the state (hidden states of every row between two layers), the loading of one layer in float32, and the second
moments of inputs. No more than one layer of the model is in memory. Experts see the tokens that the router sends them,
weighted as the router weights them: an expert's error counts by that much in the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metal_marlin.hf_activation import Activation, _swiglu_oai
from metal_marlin.hf_plan import PROJECTIONS
from metal_marlin.quantize.source import Experts, Matrix, Part, Source

ENOUGH = 16  # tokens per input channel from which an expert's own tokens are all it needs
FORWARD_TOKENS = 4096  # go through a layer at once, a row at least
FALLBACK_TOKENS = 4096  # of the layer, for an expert that has too few of its own


class _Stop(Exception):
    """Ends a forward pass whose rest isn't needed."""


class ExpertsStandIn(nn.Module):
    """In the place of a transformers experts module, with weights that can be exchanged one by one.

    weights  {(expert, projection): float32 [in, out]}; biases the same, [out]
    record   None, or a list that gets (x, ids, router weights) of every call, whose result is then zeros
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts = experts.shape.experts
        self.weights: dict[tuple[int, str], Tensor] = {}
        self.biases: dict[tuple[int, str], Tensor] = {}
        self.record: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, weights = top_k_index.reshape(len(x), -1), top_k_weights.reshape(len(x), -1).float()
        if self.record is not None:
            self.record.append((x.clone(), ids.to(torch.int32), weights.clone()))
            return torch.zeros_like(hidden_states)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows, slots = torch.where(ids == e)
            if len(rows):
                out = self.linear(self.inner(x[rows], e), e, "down_proj")
                y.index_add_(0, rows, out * weights[rows, slots].unsqueeze(1))
        return y.view_as(hidden_states)

    def linear(self, x: Tensor, e: int, projection: str) -> Tensor:
        y = x @ self.weights[e, projection]
        bias = self.biases.get((e, projection))
        return y if bias is None else y + bias

    def inner(self, x: Tensor, e: int) -> Tensor:
        """What enters an expert's down projection, [tokens, intermediate]."""
        return activate(
            self.experts.shape.activation, self.linear(x, e, "gate_proj"), self.linear(x, e, "up_proj")
        )  # fmt: skip


def activate(kind: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """The activations of moe_trellis_swiglu."""
    if kind.activation == "swiglu_oai":
        return _swiglu_oai(gate, up, kind.alpha, kind.limit)
    if kind.activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if kind.activation == "gelu_tanh" else "none") * up


class Calibration:
    """Rows on their way through the model.

    rows  int64 [count, length]; state: float32 [count, length, hidden] before the layer that comes next
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.state = self._embed()

    # ------------------------------------------------------------------ one layer

    def load(self, part: Part, *, plain: bool = True, matrices: bool = True) -> None:
        """Puts a part's tensors into the model, in float32, and its experts behind stand-ins."""
        for experts in part.experts:
            module = self.source.modules[experts.path]
            if not isinstance(self.source.model.get_submodule(experts.path), ExpertsStandIn):
                self.source.model.set_submodule(experts.path, ExpertsStandIn(experts))
                self.source.modules[experts.path] = module
            if matrices:
                for e in range(experts.shape.experts):
                    for projection in PROJECTIONS:
                        self.put(experts.matrices[e, projection], self.source.weight(experts.matrices[e, projection]))
        for name, path in part.plain.items() if plain else ():
            self._set(path, self.source.plain(name, path))
        for matrix in part.matrices if matrices else ():
            self.put(matrix, self.source.weight(matrix))

    def put(self, matrix: Matrix, weight: Tensor) -> None:
        """Makes `weight`, float32 [in_features, out_features], a matrix's weight from now on."""
        bias = self.source.bias(matrix)
        place = self._place(matrix)
        if place is not None:
            stand_in, key = place
            stand_in.weights[key] = weight
            if bias is not None:
                stand_in.biases[key] = bias[: matrix.out_features].float()
            return
        self._set(f"{matrix.path}.weight", weight.T.contiguous())
        if bias is not None:
            self._set(f"{matrix.path}.bias", bias[: matrix.out_features])

    def get(self, matrix: Matrix) -> Tensor:
        """A matrix's weight as it is now, float32 [in_features, out_features]."""
        place = self._place(matrix)
        if place is not None:
            return place[0].weights[place[1]]
        weight: Tensor = self.source.model.get_submodule(matrix.path).weight
        return weight.detach().T

    def unload(self, part: Part) -> None:
        """Frees a part's tensors."""
        for experts in part.experts:
            module: Any = self.source.model.get_submodule(experts.path)
            module.weights.clear()
            module.biases.clear()
        names = [*part.plain.values(), *(f"{m.path}.{leaf}" for m in part.matrices for leaf in ("weight", "bias"))]
        for path in names:
            parent, _, leaf = path.rpartition(".")
            owner = self.source.model.get_submodule(parent)
            if isinstance(getattr(owner, leaf, None), nn.Parameter):
                setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).to("meta"), requires_grad=False))

    @torch.no_grad()
    def moments(
        self,
        part: Part,
        wanted: list[Matrix],
        *,
        record_experts: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, list[tuple[Tensor, Tensor, Tensor]]]]:
        """Second moments E[x^T x] of the inputs of `wanted` linear layers, by name, padded to whole blocks.

        record_experts also returns what experts get, {path: [(x [T, hidden], ids, router weights [T, top_k]), ...]};
        their results are zeros then. A forward pass ends when all has been seen.
        """
        sums: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        seen: dict[int, tuple[Tensor, str]] = {}
        todo: set[str] = set()
        stand_ins = [self.source.model.get_submodule(e.path) for e in part.experts]
        modules = {m.path: self.source.model.get_submodule(m.path) for m in wanted}

        def hook(path: str) -> Callable[..., None]:
            def capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0]
                if path not in shared:
                    shared[path] = seen.setdefault(id(x), (x, path))[1]
                if shared[path] == path:
                    flat = x.reshape(-1, x.shape[-1]).float()
                    sums[path] = sums.get(path, 0) + flat.T @ flat
                todo.discard(path)
                if not todo and not record_experts:
                    raise _Stop

            return capture

        records: dict[str, Any] = {e.path: [] for e in part.experts} if record_experts else {}
        for stand_in in stand_ins:
            stand_in.record = records.get(stand_in.experts.path)
        handles = [module.register_forward_pre_hook(hook(path)) for path, module in modules.items()]
        try:
            for hidden in self._batches(len(self.rows)):
                todo, seen = set(modules), {}
                with suppress(_Stop):
                    self._forward(part, hidden)
        finally:
            for handle in handles:
                handle.remove()
            for stand_in in stand_ins:
                stand_in.record = None
        tokens = self.rows.numel()
        result = {}
        for matrix in wanted:
            if shared.get(matrix.path) in sums:
                result[matrix.name] = pad_moments(sums[shared[matrix.path]] / tokens, matrix.k)
        return result, records

    @torch.no_grad()
    def advance(self, part: Part) -> None:
        """Moves the state behind a layer, as that is now."""
        for hidden in self._batches(len(self.rows)):
            hidden.copy_(self._forward(part, hidden))
        if not bool(torch.isfinite(self.state).all()):
            raise ValueError(f"{part.name}: its outputs on the calibration text aren't finite; expected finite ones")

    @torch.no_grad()
    def outputs(self, part: Part, rows: int) -> Tensor:
        """What a layer makes of the first `rows` rows, float32 [rows, length, hidden]."""
        return torch.cat([self._forward(part, hidden) for hidden in self._batches(rows)])

    # ------------------------------------------------------------------ the ends

    @torch.no_grad()
    def head_moments(self, part: Part) -> Tensor:
        """Second moments of what enters the head, behind the last layer and the final norm."""
        model = self.source.model
        head = model.get_output_embeddings()
        total: Tensor | None = None

        def capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal total
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            total = flat.T @ flat if total is None else total + flat.T @ flat
            raise _Stop

        handle = head.register_forward_pre_hook(capture)
        position = 0

        def through(layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.state[position : position + 1] if layer is self._layers()[-1] else hidden

        try:
            with self._layers_replaced(through):
                for position in range(len(self.rows)):
                    with suppress(_Stop):
                        model(input_ids=self.rows[position : position + 1], use_cache=False)
        finally:
            handle.remove()
        assert total is not None
        return pad_moments(total / self.rows.numel(), part.matrices[0].k)

    @torch.no_grad()
    def _embed(self) -> Tensor:
        """The state before the first layer; records on the way what the model hands each layer besides."""
        self.load(self.source.parts[0])
        states: list[Tensor] = []

        def record(layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            index = self._layers().index(layer)
            if index == 0:
                states.append(hidden.clone())
            self.arguments.setdefault(f"{self.source.layers_path}.{index}", (args, kwargs))
            if index == len(self._layers()) - 1:
                raise _Stop
            return hidden

        with self._layers_replaced(record):
            for row in self.rows:
                with suppress(_Stop):
                    self.source.model(input_ids=row.unsqueeze(0), use_cache=False)
        return torch.cat(states)

    def _layers(self) -> list[nn.Module]:
        return list(self.source.model.get_submodule(self.source.layers_path))

    @contextmanager
    def _layers_replaced(self, function: Callable[..., Tensor]) -> Iterator[None]:
        layers = self._layers()

        def bound(layer: nn.Module) -> Callable[..., Tensor]:
            return lambda hidden, *args, **kwargs: function(layer, hidden, *args, **kwargs)

        try:
            for layer in layers:
                layer.forward = bound(layer)
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _batches(self, rows: int) -> tuple[Tensor, ...]:
        """The state of the first rows, some at a time: what a layer gets besides was made for one and broadcasts."""
        return tuple(self.state[:rows].split(max(1, FORWARD_TOKENS // self.rows.shape[1])))

    def _forward(self, part: Part, hidden: Tensor) -> Tensor:
        args, kwargs = self.arguments[part.path]
        result = self.source.model.get_submodule(part.path)(hidden, *args, **kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _place(self, matrix: Matrix) -> tuple[ExpertsStandIn, tuple[int, str]] | None:
        module = self.source.model.get_submodule(matrix.path)
        if not isinstance(module, ExpertsStandIn):
            return None
        return module, next(key for key, own in module.experts.matrices.items() if own is matrix)

    def _set(self, path: str, value: Tensor) -> None:
        parent, _, leaf = path.rpartition(".")
        owner: Any = self.source.model.get_submodule(parent)
        value = value.float() if value.is_floating_point() else value
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


class Routed:
    """What the experts of a layer got: x float32 [tokens, hidden], and each expert's rows and router weights."""

    def __init__(self, calls: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.x = torch.cat([x for x, _, _ in calls])
        ids, weights = torch.cat([i for _, i, _ in calls]), torch.cat([w for _, _, w in calls])
        calls.clear()
        self.top_k = ids.shape[1]
        order = torch.argsort(ids.reshape(-1), stable=True)
        self.sorted_ids, self.order, self.flat_weights = ids.reshape(-1)[order], order, weights.reshape(-1)
        self._shared: Tensor | None = None

    def of(self, e: int) -> tuple[Tensor, Tensor]:
        """(rows of x, router weights) of expert e."""
        begin, end = torch.searchsorted(self.sorted_ids, torch.tensor([e, e + 1], dtype=torch.int32)).tolist()
        chosen = self.order[begin:end]
        return chosen // self.top_k, self.flat_weights[chosen]

    def moments(self, e: int, k: int, inner: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, int]:
        """(second moments of an expert's inputs, float32 [k, k], how many tokens it got).

        inner  makes of x what enters the matrix; None: x itself. An expert with fewer than ENOUGH tokens per channel is
               helped out with tokens of the whole layer, as if it had been sent one for each channel.
        """
        rows, weights = self.of(e)
        x = self.x[rows]
        x = (x if inner is None else inner(x)) * weights.unsqueeze(1)
        power = float(weights.square().sum())
        own = x.T @ x
        size = own.shape[0]
        if len(rows) < ENOUGH * size:
            share = size * (power / len(rows) if len(rows) else 1.0)
            own = own + share * self._of_all(inner)
            power += share
        return pad_moments(own / max(power, 1e-30), k), len(rows)

    def _of_all(self, inner: Callable[[Tensor], Tensor] | None) -> Tensor:
        if inner is None:
            if self._shared is None:
                self._shared = self.x.T @ self.x / len(self.x)
            return self._shared
        step = max(1, len(self.x) // FALLBACK_TOKENS)
        x = inner(self.x[::step])
        return x.T @ x / len(x)


def pad_moments(m: Tensor, k: int) -> Tensor:
    """Second moments of inputs that are followed by zeros up to k."""
    return m if m.shape[0] == k else F.pad(m, (0, k - m.shape[0], 0, k - m.shape[0]))
