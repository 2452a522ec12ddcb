"""Packed tiles on an Apple GPU without a copy: views of Metal buffers that lie over the pages of a checkpoint's files.

Owns which matrices of a checkpoint can stay where they are, the windows of its files that become buffers, and the
account of what was mapped, what was copied, and why. The buffers are C (csrc/mps/window.c). What is small or what
torch's own ops compute with (scales, tables, embeddings, norms) is copied. Not run on a Mac yet: docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metal_marlin import _C, metal_queue
from metal_marlin.mapping import MappedFiles
from metal_marlin.safetensors_header import TensorInfo

#: Bytes: the Metal kernels take tiles at multiples of so many (MM_TILE_ALIGNMENT in csrc/shared/format.h, as int16).
ALIGNMENT = 32
#: Matrices side by side share a buffer up to this size. The GPU has to have a whole buffer in its reach while it uses a
#: part, so that one buffer for all of a large file would have to fit at once; a guess, not measured.
WINDOW_BYTES = 256 << 20
REPACK = "python -m metal_marlin repack DIR OUT writes files whose tiles can stay"


@dataclass
class Placement:
    """Where a model's packed tiles are. Sizes in bytes.

    mapped   tiles that are views of the files
    copied   tiles that were copied, by reason; empty: none
    buffers  Metal buffers over the files
    """

    mapped: int = 0
    copied: dict[str, int] = field(default_factory=dict)
    buffers: int = 0

    def __str__(self) -> str:
        mapped = f"{self.mapped / 1e6:,.3f} MB of packed tiles are views of mapped files ({self.buffers} Metal buffers)"
        copies = [f"{count / 1e6:,.3f} MB were copied: {reason}" for reason, count in self.copied.items()]
        return "; ".join([mapped, *copies])


def device_type() -> str:
    """The type of the devices whose tensors the Metal kernels take: mps. Where tests emulate it: cpu."""
    return _C.mps_device() or "mps"


def problem() -> str | None:
    """Why no tile can stay where it is in this process; None: nothing but where they lie speaks against it."""
    return _C.map_window_problem()


def status() -> str:
    """What `info` says of weights on the GPU."""
    reason = problem()
    if reason:
        return f"one copy: {reason}"
    return f"the same for packed tiles, by device_map; else one copy. {REPACK}"


class GpuTiles:
    """Tiles of a mapped checkpoint on the GPU.

    groups  {name: the trellises, int16, that are to be one tensor, such as one projection of a layer's experts}
    reason  why none may stay, if so

    `name in tiles`: whether the group stays in the file. OSError: a file has changed. What can't stay, for whatever
    reason, is left to be copied, and placement.copied has its bytes under that reason.
    """

    def __init__(
        self,
        mapping: MappedFiles,
        groups: Mapping[str, Sequence[TensorInfo]],
        device: torch.device | str,
        reason: str | None = None,
    ) -> None:
        self.placement = Placement()
        self._tensors: dict[str, Tensor] = {}
        reason, most = reason or problem(), 0
        if reason is None:
            try:
                most = metal_queue.open_device().max_buffer_bytes
            except RuntimeError as error:
                reason = str(error)
        spans = {}
        for name, infos in groups.items():
            own = reason or _why_not(mapping, infos, most)
            if own:
                self._copy(own, infos)
            else:
                begins = [mapping.place(info) for info in infos]
                spans[name] = min(begins), max(b + i.nbytes for b, i in zip(begins, infos, strict=True))
        for begin, end, names in windows(spans, {name: groups[name][0].file for name in spans}, most):
            try:
                tensor, place = mapping.gpu_window(begin, end, device)
            except RuntimeError as error:
                for name in names:
                    self._copy(str(error), groups[name])
                continue
            self.placement.buffers += 1
            for name in names:
                first, last = spans[name]
                self._tensors[name] = tensor[(first - place) // 2 : (last - place) // 2]
                self.placement.mapped += sum(info.nbytes for info in groups[name])

    def _copy(self, reason: str, infos: Sequence[TensorInfo]) -> None:
        copied = self.placement.copied
        copied[reason] = copied.get(reason, 0) + sum(info.nbytes for info in infos)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """int16, flat: from the group's first tile to its last one, with whatever lies between."""
        return self._tensors[name]


def _why_not(mapping: MappedFiles, infos: Sequence[TensorInfo], most: int) -> str | None:
    """Why a group can't stay where it is."""
    begins = [mapping.place(info) for info in infos]
    if any(begin % ALIGNMENT for begin in begins):
        return f"they don't begin at multiples of {ALIGNMENT} bytes; {REPACK}"
    if len({info.file for info in infos}) > 1:
        return "a layer's experts lie in several files, and a Metal buffer lies over one"
    if _pages(min(begins), max(b + i.nbytes for b, i in zip(begins, infos, strict=True))) > most:
        return f"a matrix, or a layer's experts, are larger than Metal's largest buffer of {most} bytes"
    return None


def _pages(begin: int, end: int) -> int:
    """Bytes of the pages that hold these bytes, at most."""
    page = _C.page_bytes()
    return -(-end // page) * page - begin // page * page


def windows(
    spans: Mapping[str, tuple[int, int]], files: Mapping[str, object], most: int
) -> list[tuple[int, int, list[str]]]:
    """(begin, end, names) of ranges of one file, at most `most` bytes each, that hold every span whole.

    Spans that overlap, as the three projections of a layer do, share a range where they fit; neighbours do up to
    WINDOW_BYTES.
    """
    found: list[tuple[int, int, list[str]]] = []
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if found:
            first, last, names = found[-1]
            limit = most if begin < last else min(most, WINDOW_BYTES)
            if files[names[0]] == files[name] and _pages(first, max(last, end)) <= limit:
                found[-1] = first, max(last, end), [*names, name]
                continue
        found.append((begin, end, [name]))
    return found
