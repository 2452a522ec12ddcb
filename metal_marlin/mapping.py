"""A checkpoint's files in memory: mapped, so that tensors are views of the page cache, or copied.

Owns which tensors can be views. The mapping itself is C (csrc/memory/map.c): all files side by side in one range of
addresses, so that the experts of a layer are one stretch even if they lie in two files. It is private: nothing that is
done to a tensor reaches a file. Everything that is mapped counts once for all processes, and the system may drop it
and read it again. docs/memory.md says what that means when a file changes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metal_marlin import _C
from metal_marlin.safetensors_header import TensorInfo

#: A tensor that doesn't begin at a multiple of its element is copied up to this size, and left where it is above: our
#: C code reads scales and routers as whole numbers, while the large ones are embeddings, which safetensors' own loader
#: hands to torch at such addresses too. Packed tiles are read byte by byte and may lie anywhere.
COPIED_BYTES = 1 << 20
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "I64": torch.int64, "F64": torch.float64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


class MappedFiles:
    """Files, mapped from now on for as long as a tensor of theirs exists. OSError: one can't be opened or mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = {file: i for i, file in enumerate(files)}
        self._map, address, self.nbytes, self._begins = _C.map_open(tuple(files))
        self._bytes = (ctypes.c_ubyte * self.nbytes).from_address(address or 0)
        self._bytes.map = self._map  # type: ignore[attr-defined]  # its owner: tensors refer to the array

    def place(self, info: TensorInfo) -> int:
        """Where a tensor begins, in bytes from the mapping's beginning."""
        return self._begins[self.files[info.file]] + info.begin

    def tensor(self, info: TensorInfo) -> Tensor:
        """A tensor, on the CPU: a view, or a copy of a small one that lies at an odd address (COPIED_BYTES)."""
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise ValueError(f"{info.file}: a tensor of {info.dtype}, which torch can't hold")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        place = self.place(info)
        view = self.span(place, math.prod(info.shape), dtype).view(info.shape)
        packed = info.dtype == "I16" and len(info.shape) == 3
        if not place % dtype.itemsize or info.nbytes > COPIED_BYTES or packed:
            return view
        copied = view.clone()
        self.check(info)
        return copied

    def read(self, info: TensorInfo) -> bytes:
        """A tensor's bytes, copied."""
        place = self.place(info)
        copied = bytes(self._bytes[place : place + info.nbytes])
        self.check(info)
        return copied

    def span(self, place: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements from the byte `place` on, as they are. ValueError: beyond the files."""
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=place)

    def gpu_window(self, begin: int, end: int, device: torch.device | str) -> tuple[Tensor, int]:
        """Bytes `begin` to `end`, of one file, on the GPU: (int16 [elements], read only; the byte at which it begins).

        Not a copy, and valid on its own. It begins and ends with pages. RuntimeError: Metal or torch has no such thing.
        """
        number, place, _ = _C.map_window(self._map, begin, end)
        tensor: Tensor = torch.ops.metal_marlin.mapped_window(torch.empty(0, device=device), number)
        return tensor, place

    def check(self, info: TensorInfo | None = None) -> None:
        """OSError if a file, or the one that a tensor lies in, has changed since it was mapped, or was too short when
        somebody read it: such reads are zeros (csrc/memory/guard.c), so whoever reads the mapping otherwise than
        through our ops calls this after it."""
        _C.map_check(self._map, *((self.place(info), info.nbytes) if info else ()))

    def populate(self, begin: int = 0, end: int | None = None) -> None:
        """Reads bytes `begin` to `end` of the mapping now, in order, rather than page by page at their first use."""
        _C.map_populate(self._map, begin, (self.nbytes if end is None else end) - begin)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFiles:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFiles, ((),)  # tensors that are unpickled are nobody's view
