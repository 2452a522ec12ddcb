"""Metal kernels of your own on PyTorch's MPS stream.

The kernel is ordered with every torch op around it: it sees what they wrote and they see what it wrote. Nothing is
committed or waited for unless asked. Libraries are compiled at first use and kept, keyed by the source text.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the op)

TENSOR, INT, FLOAT = range(3)


def dispatch_kernel(
    source: str,
    name: str,
    args: Sequence[Tensor | int | float],
    grid: int | Sequence[int],
    group: int | Sequence[int],
    wait: bool = False,
) -> None:
    """Runs the kernel `name` of the Metal text `source`.

    Args:
        source: Metal Shading Language, ASCII; compiled by the system at the first call with this text.
        args: what buffer 0, 1, … are bound to: a tensor on the MPS device (its memory from its first element on, so
            strides are the kernel's business; written in place if the kernel writes), an int (``constant long&``, or
            ``constant int&`` for one that fits) or a float (``constant float&``). At most 31, at least one a tensor.
        grid: threads along x, y, z (not threadgroups). group: threads of a threadgroup, as many lengths.
        wait: return after the stream has finished its work (`torch.mps.synchronize`).

    Raises:
        TypeError: an argument of another type. RuntimeError: no tensor, one on another device, lengths out of range,
            a source that does not compile (the compiler's message is on standard error), a name that is not in it.

    Source: PyTorch's C shim of the MPS backend (torch/csrc/inductor/aoti_torch/c/shim_mps.h).
    """
    tensors: list[Tensor] = []
    layout: list[int] = []
    scalars: list[int] = []
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            tensors.append(arg)
            layout.append(TENSOR)
        elif isinstance(arg, int):
            scalars.append(arg)
            layout.append(INT)
        elif isinstance(arg, float):
            scalars.append(struct.unpack("<i", struct.pack("<f", arg))[0])
            layout.append(FLOAT)
        else:
            raise TypeError(f"args[{i}] is a {type(arg).__name__}; expected a tensor, an int or a float")
    if not tensors:  # the dispatcher would have no device to go by
        raise RuntimeError("args has no tensor; expected at least one, on the MPS device")
    lengths = [[sizes] if isinstance(sizes, int) else list(sizes) for sizes in (grid, group)]
    if len(lengths[0]) != len(lengths[1]):
        raise RuntimeError(f"grid has {len(lengths[0])} lengths, group {len(lengths[1])}; expected as many")
    torch.ops.metal_marlin.dispatch_kernel(source, name, tensors, layout, scalars, *lengths)
    if wait:
        synchronize(tensors[0])


@torch.library.register_fake("metal_marlin::dispatch_kernel")
def _(
    source: str,
    name: str,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scalars: Sequence[int],
    grid: Sequence[int],
    group: Sequence[int],
) -> None:
    return None


def synchronize(tensor: Tensor) -> None:
    """Waits for the stream of a tensor's device."""
    if tensor.device.type == "mps":
        torch.mps.synchronize()
