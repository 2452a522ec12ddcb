"""Metal without PyTorch between: kernels on command queues of one's own, with commits, handlers, GPU times and events.

Made for measuring how work gets to an Apple GPU (benchmarks/dispatch), not for tensors: PyTorch's stream is another
queue, so nothing here is ordered with its ops. The types are C (csrc/metal_queue/types.c, over Objective-C's runtime).

    device = metal_queue.open_device()
    kernel = device.pipeline(source, "name")
    data = device.buffer(4096)
    commands = device.queue().commands()
    commands.begin()
    commands.dispatch(kernel, (data, bytes_of_a_value), grid=1024, group=256)
    commands.end()
    commands.commit()
    commands.wait(timeout=10.0)
    metal_queue.view(data)[:16]

Mistakes in the order of calls are RuntimeErrors; a bad argument is a TypeError or ValueError that names it; a command
buffer that ends in an error is a RuntimeError with Metal's own words; a timeout is a TimeoutError. Nothing has to be
closed: an object is released with its last reference, and Metal keeps what committed work uses until that is done.
"""

from __future__ import annotations

import ctypes
import platform

from metal_marlin._C import (
    MetalBuffer,
    MetalCommands,
    MetalDevice,
    MetalEvent,
    MetalPipeline,
    MetalQueue,
    MetalTimes,
    metal_device,
)

__all__ = [
    "MetalBuffer",
    "MetalCommands",
    "MetalDevice",
    "MetalEvent",
    "MetalPipeline",
    "MetalQueue",
    "MetalTimes",
    "device_problem",
    "open_device",
    "view",
]


def open_device() -> MetalDevice:
    """The default GPU. RuntimeError says why there is none."""
    try:
        return metal_device()
    except RuntimeError as error:
        if platform.system() == "Darwin" or ".dylib" not in str(error):
            raise
        raise RuntimeError(f"no Metal device: this is {platform.system()}; expected macOS") from error


def device_problem() -> str | None:
    """Why open_device() fails here, None if it does not."""
    try:
        open_device()
    except RuntimeError as error:
        return str(error)
    return None


def view(buffer: MetalBuffer) -> memoryview:
    """The buffer's memory as writable bytes, which keep the buffer alive; `.cast("f")` makes numbers of them.

    The GPU may be writing: read after the command buffer has completed, write before it is committed.
    """
    array = (ctypes.c_ubyte * buffer.nbytes).from_address(buffer.address)
    array.metal_buffer = buffer  # type: ignore[attr-defined]  # its owner: the view refers to the array
    return memoryview(array).cast("B")
