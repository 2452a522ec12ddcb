"""One quantized matrix in memory, and the facts of the EXL3 format that Python needs about it.

Owns TrellisTensor, what makes one well-formed, and the names of its parts. Constants (codebooks, multipliers, rates,
block sizes) come from the C extension, which is the one place that spells them. weights.py reads these matrices from
files, modules.py computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metal_marlin import _C
from metal_marlin.mapping import MappedFiles

UNMARKED = "3inst"  # the codebook of a matrix that is stored without a marker tensor
MARKERS = tuple(name for name in _C.CODEBOOKS if name != UNMARKED)  # the marker is named after its codebook
SCALES = ("suh", "svh")  # per input channel, per output channel
LEGACY = {"suh": "su", "svh": "sv"}  # sign bits only: what checkpoints of early 2025 hold instead


def pad128(size: int) -> int:
    """`size` rounded up to whole Hadamard blocks, as the format stores it."""
    return -(-size // _C.HADAMARD) * _C.HADAMARD


def marker_value(codebook: str) -> int:
    """The int32 that the marker tensor of a codebook must hold: its multiplier, as a signed number."""
    value: int = _C.MULTIPLIERS[codebook]
    return value - 2**32 if value >= 2**31 else value


def rate2_of(width: int) -> int:
    """Twice the bits per weight of a trellis whose last dimension is `width` int16."""
    return 2 * width // _C.TILE


def trellis_problem(shape: Sequence[int], codebook: str) -> str | None:
    """Why no trellis of this codebook can have this shape, or None."""
    expected = f"expected [k/16, n/16, 16 * bits] with k and n multiples of {_C.HADAMARD}"
    blocks = _C.HADAMARD // _C.TILE
    if len(shape) != 3 or not shape[0] or not shape[1] or shape[0] % blocks or shape[1] % blocks:
        return f"shape is {list(shape)}; {expected}"
    if shape[2] % (_C.TILE // 2) or rate2_of(shape[2]) not in _C.RATES2[codebook]:
        rates = ", ".join(f"{rate / 2:g}" for rate in _C.RATES2[codebook])
        bits = f"{shape[2] / _C.TILE:g}"
        return f"shape is {list(shape)}, that is {bits} bits; {expected} and, for {codebook}, bits one of {rates}"
    return None


def unpack_signs(words: torch.Tensor) -> torch.Tensor:
    """Legacy sign bits, int16 [k/16], as float16 [k] of +-1: bit b of word w is channel 16w + b; a set bit means -1."""
    shifts = torch.arange(16, dtype=torch.int32, device=words.device)
    return (1 - 2 * ((words.to(torch.int32).unsqueeze(-1) >> shifts) & 1)).to(torch.float16).reshape(-1)


@dataclass(frozen=True, eq=False)
class TrellisTensor:
    """One quantized matrix W [k, n]: y = ((x * suh) H What) H * svh + bias.

    trellis   int16 [k/16, n/16, 16 * bits], the coded What; every bit pattern is legal
    suh, svh  float16 [k] and [n]; bias: float16 [n] or None
    codebook  one of metal_marlin._C.CODEBOOKS
    name      only used in messages
    place     (mapping, byte) where the trellis is mapped from a file, else None: what TrellisStack shares it by

    k and n are multiples of 128. A layer's true sizes may be smaller; they are not part of the tensor.
    """

    trellis: torch.Tensor
    suh: torch.Tensor
    svh: torch.Tensor
    codebook: str
    bias: torch.Tensor | None = None
    name: str = "trellis tensor"
    place: tuple[MappedFiles, int] | None = None

    @property
    def rate2(self) -> int:
        """Twice the bits per weight: the number in the ops' tables."""
        return rate2_of(self.trellis.shape[-1])

    @property
    def bits(self) -> float:
        """Bits per weight, scales not counted."""
        return self.rate2 / 2

    @property
    def k(self) -> int:
        """Padded input size."""
        return self.trellis.shape[0] * _C.TILE

    @property
    def n(self) -> int:
        """Padded output size."""
        return self.trellis.shape[1] * _C.TILE

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.trellis, self.suh, self.svh, self.bias) if part is not None)

    def validate(self) -> TrellisTensor:
        """Returns self. ValueError names the part, what its shape, dtype, rate or codebook should be and is."""
        if self.codebook not in _C.CODEBOOKS:
            raise ValueError(f"{self.name}: codebook is {self.codebook!r}; expected one of {', '.join(_C.CODEBOOKS)}")
        trellis = self.trellis
        if trellis.dtype != torch.int16 or not trellis.is_contiguous():
            layout = "contiguous" if trellis.is_contiguous() else "strided"
            raise ValueError(f"{self.name}.trellis: is {layout} {trellis.dtype}; expected contiguous torch.int16")
        problem = trellis_problem(trellis.shape, self.codebook)
        if problem:
            raise ValueError(f"{self.name}.trellis: {problem}")
        for part, value, size in (("suh", self.suh, self.k), ("svh", self.svh, self.n), ("bias", self.bias, self.n)):
            if value is None and part == "bias":
                continue
            if value is None or value.dtype != torch.float16 or tuple(value.shape) != (size,):
                found = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"{self.name}.{part}: is {found}; expected torch.float16 [{size}]")
            if value.device != trellis.device:
                raise ValueError(f"{self.name}.{part}: is on {value.device}; its trellis is on {trellis.device}")
        return self
