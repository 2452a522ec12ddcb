"""The emulator's stand-in for Objective-C's runtime and Metal's own classes: faults, and what is still alive.

path() is what `_C.use_metal_fake` loads. Objects are counted; live() names those that nobody has released. Mistakes (an
over-release, a message to a freed object, an encoder left open, ...) are raised by emulator.synchronize().
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from . import load


def _library() -> ctypes.CDLL:
    library = load()
    library.emu_fault_names.restype = ctypes.c_char_p
    library.emu_objc_live.restype = ctypes.c_long
    library.emu_objc_live.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.emu_commands_settle.argtypes = [ctypes.c_double]
    return library


def path() -> str:
    """The library to load instead of the system's."""
    return str(_library()._name)


@contextlib.contextmanager
def faults(**wanted: int | bool) -> Iterator[None]:
    """What goes wrong in a `with` block. ValueError for a name that is none.

    no_device, no_queue, no_buffer, no_event, no_commands, no_encoder   asking for one gives nil
    no_buffer=2        the same, after the deallocator of newBufferWithBytesNoCopy: was called
    no_library, no_pipeline   compiling, making a pipeline gives nil and an NSError
    old_system         messages that came with macOS 12 are not known
    error              command buffers end in an error, and do nothing
    stall              command buffers are scheduled, and start only when this is over
    max_buffer         maxBufferLength, in bytes; 0: 256 MiB
    no_tensor          torch_from_blob fails; 2: after it has called the deleter
    handler_delay_us   completion handlers come this much after waitUntilCompleted has returned
    """
    library = _library()
    if unknown := set(wanted) - set(library.emu_fault_names().decode().split()):
        raise ValueError(f"faults: unknown {sorted(unknown)}; there are {library.emu_fault_names().decode()}")
    before = {name: library.emu_fault(name.encode(), int(value)) for name, value in wanted.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            library.emu_fault(name.encode(), value)


def settle(timeout: float = 60.0) -> None:
    """Waits until all that was committed has completed, handlers included. TimeoutError: it has not."""
    if _library().emu_commands_settle(timeout):
        raise TimeoutError(f"command buffers still run after {timeout} s; expected all to complete")


def live() -> str:
    """The objects, blocks and pools that are alive, with their reference counts; "" when there are none."""
    text = ctypes.create_string_buffer(16384)
    _library().emu_objc_live(text, len(text))
    return text.value.decode().strip()


def forget() -> None:
    """Frees the memory of freed objects, which is kept to recognize messages to them."""
    _library().emu_objc_forget()
