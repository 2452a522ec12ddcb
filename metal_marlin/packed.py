"""What modules with packed weights have in common, and the stack that holds one projection of all experts of a layer.

Owns how packed weights keep their dtypes when a module is cast, the flat layout of a stack and its table, how a stack
shares the memory of a mapped file, and the check that a loaded state belongs to the module. modules.py computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metal_marlin import _C
from metal_marlin.trellis import TrellisTensor, trellis_problem


class Packed(nn.Module):
    """Keeps the dtype of every buffer: the weights are codes and float16 scales that casting would falsify.

    .to(torch.bfloat16), .float(), .half() and .type() leave them as they are, bit by bit; devices change as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        def keep(old: Tensor) -> Tensor:
            new = fn(old)
            return new if new.dtype == old.dtype else old.to(new.device)

        super()._apply(keep, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        """Weights that a GPU sees in a file can't be written to: what is loaded goes to memory of the module's own."""
        for name, old in self._buffers.items():
            if old is None or old.is_meta or local_metadata.get("assign_to_params_buffers"):
                continue
            if f"{prefix}{name}" in state_dict and _C.map_window_holds(old.untyped_storage().data_ptr()):
                self._buffers[name] = torch.empty_like(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        """Copies what the buffers show, not all the memory that they are views of."""
        for buffer in self._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = buffer.clone()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new


class TrellisStack(Packed):
    """One projection of all experts of a layer: weights only, TrellisExperts computes.

    Buffers, for E experts of one padded size [k, n]: trellis int16 [elements], all experts' tiles; table int64 [E, 3],
    rows (offset into trellis, 2 * bits, codebook's index in metal_marlin._C.CODEBOOKS); suh float16 [E, k]; svh float16
    [E, n]; bias float16 [E, n] or None. Rates and codebooks may differ from expert to expert.

    rates2     2 * bits of every expert
    codebooks  codebook of every expert
    layout     (offset of every expert, elements of the trellis); default: back to back

    A stack of a checkpoint's experts is a view of the mapped file, from the first expert's tiles to the last one's,
    with whatever lies between. It becomes a copy, back to back, when it moves to another device, is copied, or is
    loaded into.
    ValueError: a codebook, rate or size that the format doesn't have, or more experts than the ops take.
    """

    trellis: Tensor
    table: Tensor
    suh: Tensor
    svh: Tensor
    bias: Tensor | None

    def __init__(
        self,
        k: int,
        n: int,
        rates2: Sequence[int],
        codebooks: Sequence[str],
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        layout: tuple[Sequence[int], int] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= len(rates2) <= _C.MAX_EXPERTS or len(codebooks) != len(rates2):
            raise ValueError(
                f"rates2 has {len(rates2)} entries, codebooks {len(codebooks)};"
                f" expected one per expert, 1 to {_C.MAX_EXPERTS}"
            )
        self.k, self.n, self.rates2, self.codebooks = k, n, tuple(rates2), tuple(codebooks)
        self.shapes = [trellis_shape(k, n, r / 2, c) for r, c in zip(self.rates2, self.codebooks, strict=True)]
        #: The (codebook, rate) pairs that occur, as `moe_trellis_swiglu` takes them: bit 16 * codebook + rate2 - 1.
        self.formats = sum(
            1 << (16 * _C.CODEBOOKS.index(codebook) + rate2 - 1)
            for codebook, rate2 in set(zip(self.codebooks, self.rates2, strict=True))
        )
        offsets, elements = self._back_to_back() if layout is None else layout
        self.offsets, experts = tuple(offsets), len(self.rates2)
        self.register_buffer("trellis", torch.zeros(elements, dtype=torch.int16, device=device))
        self.register_buffer("table", self.make_table(device))
        self.register_buffer("suh", torch.zeros(experts, k, dtype=torch.float16, device=device))
        self.register_buffer("svh", torch.zeros(experts, n, dtype=torch.float16, device=device))
        self.register_buffer("bias", torch.zeros(experts, n, dtype=torch.float16, device=device) if bias else None)

    @classmethod
    def from_experts(cls, experts: Sequence[TrellisTensor]) -> TrellisStack:
        """One stack of the experts: tiles are shared if all are mapped from one checkpoint, else copied, as scales are.

        ValueError if an expert is malformed or differs in size or in having a bias.
        """
        if not experts:
            raise ValueError("experts is empty; expected at least 1")
        first = experts[0].validate()
        for tensor in experts[1:]:
            tensor.validate()
            if (tensor.k, tensor.n) != (first.k, first.n) or (tensor.bias is None) != (first.bias is None):
                found, want = ([t.k, t.n, "no bias" if t.bias is None else "bias"] for t in (tensor, first))
                raise ValueError(f"{tensor.name}: is {found}; expected {want}, as {first.name}")
        rates2, codebooks = [t.rate2 for t in experts], [t.codebook for t in experts]
        layout = _shared_layout(experts)
        stack = cls(first.k, first.n, rates2, codebooks, bias=first.bias is not None, device="meta", layout=layout)
        if layout is None or first.place is None:
            stack.trellis = torch.cat([tensor.trellis.reshape(-1) for tensor in experts])
        else:
            stack.trellis = first.place[0].span(first.place[1] - 2 * layout[0][0], layout[1], torch.int16)
        stack.table = stack.make_table(stack.trellis.device)
        stack.suh = torch.stack([tensor.suh for tensor in experts])
        stack.svh = torch.stack([tensor.svh for tensor in experts])
        if first.bias is not None:
            stack.bias = torch.stack([tensor.bias for tensor in experts if tensor.bias is not None])
        return stack

    @property
    def num_experts(self) -> int:
        return len(self.rates2)

    @property
    def bits(self) -> float:
        """Bits per weight, the mean over the experts."""
        return sum(self.rates2) / len(self.rates2) / 2

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What a Stack has (ops.py), in that order: the buffers, of which a module looks up each in a microsecond."""
        buffers = self._buffers
        return buffers["trellis"], buffers["table"], buffers["suh"], buffers["svh"], buffers["bias"]

    def make_table(self, device: torch.device | str | None = None) -> Tensor:
        """The table that belongs to the stack's rates and codebooks."""
        codebooks = [_C.CODEBOOKS.index(codebook) for codebook in self.codebooks]
        rows = list(zip(self.offsets, self.rates2, codebooks, strict=True))
        return torch.tensor(rows, dtype=torch.int64, device=device)

    @property
    def shared(self) -> bool:
        """Whether the tiles are where a file has them, rather than back to back."""
        return self.offsets != self._back_to_back()[0]

    def _back_to_back(self) -> tuple[tuple[int, ...], int]:
        offsets, end = [], 0
        for a, b, c in self.shapes:
            offsets.append(end)
            end += a * b * c
        return tuple(offsets), end

    def _own(self) -> None:
        """Copies the tiles back to back, out of the file."""
        self.trellis = self._gather(self.trellis, self.offsets)
        self.offsets = self._back_to_back()[0]
        self.table = self.make_table(self.table.device)

    def _gather(self, trellis: Tensor, offsets: Sequence[int]) -> Tensor:
        """The tiles of a trellis with these offsets, back to back."""
        own, elements = self._back_to_back()
        flat = torch.empty(elements, dtype=trellis.dtype, device=trellis.device)
        for (a, b, c), begin, offset in zip(self.shapes, own, offsets, strict=True):
            flat[begin : begin + a * b * c] = trellis[offset : offset + a * b * c]
        return flat

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrellisStack:
        if self.shared and fn(self.table) is not self.table:  # to another device, where only the tiles should go
            self._own()
        super()._apply(fn, recurse)
        return self

    def _owned(self) -> TrellisStack:
        """Self, or a copy that owns its tiles and shares the rest."""
        if not self.shared:
            return self
        own = TrellisStack.__new__(TrellisStack)
        own.__dict__.update(self.__dict__, _buffers=dict(self._buffers))
        own._own()
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> TrellisStack:
        own = self._owned()
        new: TrellisStack = super().__deepcopy__(memo) if own is self else copy.deepcopy(own, memo)  # type: ignore[assignment]
        memo[id(self)] = new
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self._owned().__dict__

    def expert(self, e: int) -> TrellisTensor:
        """The weights of one expert, sharing storage."""
        a, b, c = self.shapes[e]
        begin = self.offsets[e]
        trellis = self.trellis[begin : begin + a * b * c].view(a, b, c)
        bias = None if self.bias is None else self.bias[e]
        return TrellisTensor(trellis, self.suh[e], self.svh[e], self.codebooks[e], bias, f"expert {e}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Another stack's table would read the tiles at wrong places or rates: an error, like a wrong shape."""
        table, trellis, errors = state_dict.get(f"{prefix}table"), state_dict.get(f"{prefix}trellis"), args[-1]
        if isinstance(table, Tensor) and table.device.type != "meta":
            if self.shared:
                self._own()
            want, found = self.make_table("cpu"), table.cpu().to(torch.int64)
            if found.shape != want.shape or not torch.equal(found[:, 1:], want[:, 1:]):
                errors.append(
                    f"{prefix}table: is for 2 * bits and codebooks {table[:4, 1:].tolist()}...;"
                    f" expected {want[:4, 1:].tolist()}..., as the module was made with"
                )
            elif not torch.equal(found, want) and isinstance(trellis, Tensor):
                offsets = found[:, 0].tolist()  # the other one shares a file's memory
                ends = [o + a * b * c for o, (a, b, c) in zip(offsets, self.shapes, strict=True)]
                if trellis.dim() != 1 or min(offsets) < 0 or max(ends) > trellis.numel():
                    errors.append(
                        f"{prefix}table: has offsets {min(offsets)} to {max(offsets)};"
                        f" expected all tiles within {prefix}trellis, which is {list(trellis.shape)}"
                    )
                else:
                    own = {f"{prefix}trellis": self._gather(trellis, offsets), f"{prefix}table": want}
                    state_dict = {**state_dict, **own}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        rates = sorted({f"{r / 2:g}" for r in self.rates2}), sorted(set(self.codebooks))
        text = f"bits={'/'.join(rates[0])}, codebook={'/'.join(rates[1])}, bias={self.bias is not None}"
        return f"experts={self.num_experts}, k={self.k}, n={self.n}, {text}"


def trellis_shape(k: int, n: int, bits: float, codebook: str) -> tuple[int, int, int]:
    """Shape of a trellis of these padded sizes. ValueError if the format has no such codebook, rate or size."""
    if codebook not in _C.CODEBOOKS:
        raise ValueError(f"codebook is {codebook!r}; expected one of {', '.join(_C.CODEBOOKS)}")
    if k % _C.TILE or n % _C.TILE or 2 * bits != int(2 * bits):
        raise ValueError(f"k is {k}, n is {n}, bits is {bits}; expected multiples of {_C.HADAMARD} and of a half")
    shape = (k // _C.TILE, n // _C.TILE, int(_C.TILE * bits))
    problem = trellis_problem(shape, codebook)
    if problem:
        raise ValueError(f"trellis: {problem}")
    return shape


def layout_of(begins: Sequence[int], counts: Sequence[int]) -> tuple[tuple[int, ...], int] | None:
    """The layout of a stack over trellises that begin at these bytes of one memory and have so many elements.

    None if they lie an odd number of bytes apart, which no view of int16 can show.
    """
    first = min(begins)
    if any((begin - first) % 2 for begin in begins):
        return None
    offsets = tuple((begin - first) // 2 for begin in begins)
    return offsets, max(offset + count for offset, count in zip(offsets, counts, strict=True))


def _shared_layout(experts: Sequence[TrellisTensor]) -> tuple[tuple[int, ...], int] | None:
    """The layout of a stack over experts of one mapping, None if they aren't."""
    places = [tensor.place for tensor in experts if tensor.place is not None]
    if len(places) < len(experts) or any(place[0] is not places[0][0] for place in places):
        return None
    return layout_of([place[1] for place in places], [tensor.trellis.numel() for tensor in experts])
