"""A Metal emulator for tests: runs .metal text, and the C code that encodes it, on Linux, with checks no GPU has.

load() gives the library that exports aoti_torch_mps_*; CPU tensors stand for those of MPS. configure() says what is
checked and how; synchronize() waits for the queue and raises what was found. README.md says what this can show.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from . import lines
from . import toolchain as _toolchain
from .tokens import FrontError

__all__ = [
    "EmulatorError",
    "FrontError",
    "Library",
    "Report",
    "Traffic",
    "build",
    "configure",
    "configured",
    "load",
    "reports",
    "reset",
    "sources",
    "stats",
    "synchronize",
    "traffic",
    "unavailable",
]

unavailable = _toolchain.unavailable


class Report(NamedTuple):
    """One finding. `kind` is a short word such as "race" or "bounds"; warnings do not fail synchronize()."""

    kind: str
    text: str
    is_error: bool


class Traffic(NamedTuple):
    """What one dispatch of a checked kernel did to one tensor, in bytes. `loaded` counts every load of every thread,
    `loaded_distinct` each byte once; the same for stores. `loaded_by_groups` counts each byte once for every
    threadgroup that loads it (in steps of 2 bytes): the traffic when a threadgroup's loads stay in its cache."""

    dispatch: int
    kernel: str
    buffer: int
    bytes: int
    loaded: int
    loaded_distinct: int
    stored: int
    stored_distinct: int
    loaded_by_groups: int


class EmulatorError(RuntimeError):
    """What the emulator found, raised by synchronize(). `reports` has all of it."""

    def __init__(self, found: Sequence[Report]) -> None:
        self.reports = list(found)
        shown = "\n".join(f"[{report.kind}] {report.text}" for report in self.reports[:10])
        more = len(self.reports) - 10
        super().__init__(shown + (f"\nand {more} more" if more > 0 else ""))


class _TrafficRecord(ctypes.Structure):
    _fields_ = [
        ("dispatch", ctypes.c_uint64),
        ("kernel", ctypes.c_char * 96),
        ("buffer", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("bytes", ctypes.c_uint64),
        ("loaded", ctypes.c_uint64),
        ("loaded_distinct", ctypes.c_uint64),
        ("stored", ctypes.c_uint64),
        ("stored_distinct", ctypes.c_uint64),
        ("loaded_by_groups", ctypes.c_uint64),
    ]


# ---- building and loading ----

_COMPILER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)
_state: dict[str, Any] = {}
_sources: dict[str, None] = {}
_lock = threading.Lock()


def build(set_bytes: bool = True) -> Path:
    """Compiles the runtime unless that was done before, and returns its path. Raises RuntimeError where it cannot."""
    if reason := unavailable():
        raise RuntimeError(reason)
    return _toolchain.runtime(set_bytes)


def _put(address: int, text: str, room: int) -> None:
    data = text.encode()[: room - 1]
    ctypes.memmove(address, data + b"\0", len(data) + 1)


@_COMPILER
def _compile(source: bytes, check: int, path: int, message: int, room: int) -> int:
    """Called by the runtime for each shader and mode, on whatever thread asks for it."""
    try:
        text = source.decode("ascii")
        _sources[text] = None
        _put(path, str(_toolchain.shader(text, bool(check))), 4096)
        return 0
    except FrontError as error:
        _put(message, str(error).strip(), room)
    except Exception as error:
        _put(message, f"{type(error).__name__}: {error}", room)
    return 1


def load(set_bytes: bool = True) -> ctypes.CDLL:
    """The runtime, loaded once for the process. Its `_name` is the path to dlopen for aoti_torch_mps_*.

    set_bytes=False leaves torch_mps_set_arg_bytes and torch_from_blob out, as torch 2.10 does; the first call decides.
    """
    with _lock:
        if "library" not in _state:
            import torch  # noqa: F401  the runtime looks for torch's C ABI in the process

            library = ctypes.CDLL(str(build(set_bytes)))
            library.emu_report_read.restype = ctypes.c_bool
            library.emu_read_traffic.restype = ctypes.c_size_t
            library.emu_read_traffic.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            library.emu_synchronize.argtypes = [ctypes.c_double]
            library.emu_guard.restype = ctypes.c_void_p
            library.emu_guard.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
            for name in ("emu_setting_names", "emu_statistic_names"):
                getattr(library, name).restype = ctypes.c_char_p
            library.emu_set_compiler(_compile)
            _state["library"] = library
            _state["settings"] = library.emu_setting_names().decode().split()
            atexit.register(library.emu_synchronize, 60.0)
        return _state["library"]


# ---- settings ----


def configure(**settings: int | bool) -> dict[str, int]:
    """Sets the given settings and returns their former values. Raises ValueError for a name that is none.

    check         compile and run kernels with every load and store watched (default False)
    races         with check: also look for races (default True)
    types         a tensor's dtype must agree with the pointer it is bound to (default True)
    strict        a barrier that some threads do not reach because they have returned, and simdgroup operations in
                  divergent branches, are errors and not warnings (default True)
    guard         without check: run on copies of the tensors between memory that faults (default False)
    order         in which lanes and simdgroups run: 0 upwards, 1 downwards, more: a random order's seed (default 0)
    workers       threads that run threadgroups side by side; a checked kernel has one (default 2)
    max_threads   a pipeline's limit, for kernels that do not declare one (default and most 1024)
    commit_every  dispatches until the queue may begin; 0: when someone waits (default 4)
    delay_us      how long the queue waits before each command (default 0)
    ftz           flush float32 subnormals to zero (default False)
    poison        fill the memory of every new tensor of the process with NaN, so that torch.empty shows (default False)
    """
    library = load()
    if unknown := set(settings) - set(_state["settings"]):
        raise ValueError(f"configure: unknown {sorted(unknown)}; the settings are {_state['settings']}")
    return {name: library.emu_configure(name.encode(), int(value)) for name, value in settings.items()}


@contextlib.contextmanager
def configured(**settings: int | bool) -> Iterator[None]:
    """configure() for the length of a `with` block. Waits for the queue on the way out; raises nothing."""
    before = configure(**settings)
    try:
        yield
    finally:
        load().emu_synchronize(600.0)
        configure(**before)


# ---- waiting, and what was found ----


def reports() -> list[Report]:
    """Everything found since the last reset() or synchronize() that raised, warnings included."""
    library = load()
    kind, text = ctypes.c_char_p(), ctypes.c_char_p()
    found: dict[Report, None] = {}
    for i in range(library.emu_report_count()):
        is_error = library.emu_report_read(i, ctypes.byref(kind), ctypes.byref(text))
        found[Report((kind.value or b"").decode(), lines.resolve((text.value or b"").decode()), is_error)] = None
    return list(found)


def synchronize(timeout: float = 600.0) -> None:
    """Waits until all dispatches have run. Raises EmulatorError with the errors found since the last time, encoding's
    included, or TimeoutError if kernels still run after `timeout` seconds."""
    library = load()
    late = library.emu_synchronize(timeout)
    errors = [report for report in reports() if report.is_error]
    if errors:
        library.emu_reset_reports()
        raise EmulatorError(errors)
    if late:
        raise TimeoutError(f"the emulated GPU still runs after {timeout} s: a loop that waits for another thread?")


def reset() -> None:
    """Waits for the queue, then forgets reports, statistics and traffic."""
    library = load()
    library.emu_synchronize(600.0)
    library.emu_reset_reports()
    library.emu_reset_statistics()
    library.emu_reset_traffic()


def stats() -> dict[str, int]:
    """Counts since the last reset(): dispatches, threads, barriers, simd_operations, max_threadgroup_bytes, more."""
    library = load()
    names = library.emu_statistic_names().decode().split()
    values = (ctypes.c_uint64 * len(names))()
    library.emu_read_statistics(values)
    return dict(zip(names, values, strict=True))


def traffic() -> list[Traffic]:
    """What checked kernels loaded and stored since the last reset(): one entry for each dispatch and bound tensor."""
    library = load()
    library.emu_synchronize(600.0)
    records = (_TrafficRecord * library.emu_read_traffic(None, 0))()
    library.emu_read_traffic(records, len(records))
    return [
        Traffic(r.dispatch, r.kernel.decode(), *(getattr(r, name) for name in Traffic._fields[2:])) for r in records
    ]


def sources() -> list[str]:
    """The text of every shader that was compiled in this process, in order: what the lint should see."""
    return list(_sources)


# ---- launching kernels from a test ----

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _capsule_pointer() -> Any:
    function = ctypes.pythonapi.PyCapsule_GetPointer
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return function


@dataclass(frozen=True)
class Handle:
    """A tensor as torch's C ABI knows it. Frees it with itself."""

    pointer: int

    @classmethod
    def of(cls, tensor: Any) -> Handle:
        from torch._C._aoti import unsafe_alloc_void_ptrs_from_tensors

        (capsule,) = unsafe_alloc_void_ptrs_from_tensors([tensor])
        return cls(_capsule_pointer()(capsule, None))

    def __del__(self) -> None:
        torch_library().aoti_torch_delete_tensor_object(ctypes.c_void_p(self.pointer))


@lru_cache(maxsize=1)
def torch_library() -> ctypes.CDLL:
    """libtorch_cpu, for its C ABI."""
    import torch

    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


class Library:
    """A shader library, and a way to run its kernels from Python through the same functions that C code calls."""

    def __init__(self, text: str) -> None:
        self.library = load()
        self.handle = ctypes.c_void_p()
        if self.library.aoti_torch_mps_create_shader_library(text.encode(), ctypes.byref(self.handle)):
            synchronize()

    def kernel(self, name: str) -> ctypes.c_void_p:
        """A kernel function. Raises EmulatorError if there is none of that name."""
        function = ctypes.c_void_p()
        if self.library.aoti_torch_mps_get_kernel_function(self.handle, name.encode(), ctypes.byref(function)):
            synchronize()
        return function

    def block(self, function: ctypes.c_void_p, body: Callable[[], None]) -> int:
        """Runs body() inside run_command_block; returns its error code."""
        raised: list[BaseException] = []

        def callback(_function: int, _data: int) -> None:
            try:
                body()
            except BaseException as error:
                raised.append(error)

        code = self.library.aoti_torch_mps_run_command_block(function, _CALLBACK(callback), None)
        if raised:
            raise raised[0]
        return int(code)

    def encode(
        self,
        name: str,
        arguments: Sequence[Any] | dict[int, Any],
        grid: int | Sequence[int],
        group: int | Sequence[int],
    ) -> None:
        """Encodes one dispatch in a command block of its own, and does not wait.

        arguments: tensors, ints (set_arg_int), bytes (set_arg_bytes); None leaves a slot unbound. grid: threads.
        """
        function = self.kernel(name)
        slots = dict(arguments) if isinstance(arguments, dict) else dict(enumerate(arguments))
        bound = {i: Handle.of(a) if hasattr(a, "data_ptr") else a for i, a in slots.items() if a is not None}
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        group = (group,) if isinstance(group, int) else tuple(group)

        def body() -> None:
            library = self.library
            codes = [library.aoti_torch_mps_start_encoding(function)]
            for i, value in bound.items():
                if isinstance(value, Handle):
                    codes.append(library.aoti_torch_mps_set_arg_tensor(function, i, ctypes.c_void_p(value.pointer)))
                elif isinstance(value, bytes):
                    size = ctypes.c_uint64(len(value))
                    codes.append(library.torch_mps_set_arg_bytes(function, i, value, size))
                else:
                    codes.append(library.aoti_torch_mps_set_arg_int(function, i, ctypes.c_int64(value)))
            if any(codes):
                return
            lengths, threads = (ctypes.c_uint64 * len(grid))(*grid), (ctypes.c_uint64 * len(group))(*group)
            library.aoti_torch_mps_dispatch_array_with_group_size(
                function, lengths, ctypes.c_size_t(len(grid)), threads, ctypes.c_size_t(len(group))
            )

        self.block(function, body)

    def run(
        self,
        name: str,
        arguments: Sequence[Any] | dict[int, Any],
        grid: int | Sequence[int],
        group: int | Sequence[int],
    ) -> None:
        """encode(), then synchronize(): raises EmulatorError if anything was found."""
        self.encode(name, arguments, grid, group)
        synchronize()
