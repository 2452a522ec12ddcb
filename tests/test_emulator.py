"""The Metal emulator's detectors: each finds a bug that was planted for it, and is silent about the clean kernel.
The language it runs is checked in test_emulator_msl.py, the lint in test_emulator_lint.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from emulator import EmulatorError, Library, Report, lines

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

HEADER = """#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Checked, strict, and nothing left over from the test before."""
    emulator.reset()
    with emulator.configured(check=True):
        yield
    emulator.reset()


@contextlib.contextmanager
def found(kind: str, pattern: str) -> Iterator[list[Report]]:
    """The body raises EmulatorError, and one of its reports is of this kind and matches; gives all of them."""
    reports: list[Report] = []
    with pytest.raises(EmulatorError) as caught:
        yield reports
    reports += caught.value.reports
    assert any(re.fullmatch(kind, r.kind) and re.search(pattern, r.text, re.S) for r in reports), str(caught.value)


# ---- bugs in kernels ----


@dataclass(frozen=True)
class Case:
    """A clean kernel `k` and how to launch it."""

    text: str
    arguments: Callable[[], Sequence[Any]]
    grid: int = 64
    group: int = 64

    def run(self, text: str) -> None:
        Library(HEADER + text).run("k", self.arguments(), self.grid, self.group)


def floats(*sizes: int) -> Callable[[], list[torch.Tensor]]:
    return lambda: [torch.arange(size, dtype=torch.float32) for size in sizes]


CASES = {
    "reverse": Case(
        """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
    uint i [[thread_index_in_threadgroup]], uint at [[thread_position_in_grid]]) {
  threadgroup float s[64];
  s[i] = x[at];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float v = s[63 - i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s[i] = v;
  y[at] = s[i];
}""",
        floats(128, 128),
        grid=128,
    ),
    "simd": Case(
        """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
    uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float s[64];
  s[i] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float v = s[i ^ 1];
  v += simd_shuffle_xor(v, ushort(1));
  v += simd_shuffle(v, ushort(lane & 7));
  y[i] = simd_sum(v);
}""",
        floats(64, 64),
    ),
    "device": Case(
        """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
    device float* scratch [[buffer(2)]], device atomic_uint* count [[buffer(3)]],
    uint i [[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {
  device float* mine = scratch + 64 * g;
  mine[i] = x[64 * g + i];
  threadgroup_barrier(mem_flags::mem_device);
  y[64 * g + i] = mine[63 - i];
  atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
}""",
        lambda: [torch.ones(128), torch.zeros(128), torch.zeros(128), torch.zeros(1, dtype=torch.int32)],
        grid=128,
    ),
    "arrays": Case(
        """constant float table[4] = {1, 2, 3, 4};
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant long& n [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  float own[4] = {0, 0, 0, 0};
  uint four = uint(n);
  for (uint j = 0; j < four; j++) own[j] = x[4 * i + j] * table[j];
  uint bits = 1u << four;
  *(device float4*)(y + 4 * i) = float4(own[0], own[1], own[2], own[3]) + float(bits / four);
}""",
        lambda: [*floats(256, 256)(), 4],
    ),
    "matrix": Case(
        """kernel void k(device const half* x [[buffer(0)]], device float* y [[buffer(1)]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  simdgroup_half8x8 a, b;
  simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_load(a, x, 8);
  simdgroup_load(b, x + 64, 8);
  simdgroup_multiply_accumulate(c, a, b, c);
  simdgroup_store(c, y + 64 * sg, 8);
}""",
        lambda: [torch.ones(128, dtype=torch.float16), torch.zeros(128)],
    ),
}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n  float v"
SECOND = "threadgroup_barrier(mem_flags::mem_threadgroup);\n  s[i] = v;"
# (case, what is replaced, by what, kind of the report, pattern in its text)
BUGS = [
    ("reverse", BARRIER, "if (i < 32) " + BARRIER, "barrier",
     "different barriers: thread 0 at program_source:9, thread 32 at program_source:11"),
    ("reverse", BARRIER, "if (i == 7) return;\n  " + BARRIER, "barrier",
     r"program_source:10 .*63 of the 64 .*thread 7"),
    (
        "reverse",
        BARRIER,
        "if (i < 32) {threadgroup_barrier(mem_flags::mem_threadgroup);\n} else " + BARRIER,
        "barrier",
        "different barriers: thread 0 at program_source:9, thread 32 at program_source:10",
    ),
    ("reverse", BARRIER, BARRIER.replace("mem_threadgroup)", "mem_none)"), "race", "threadgroup memory: read"),
    ("reverse", BARRIER, BARRIER.replace("mem_threadgroup)", "mem_device)"), "race", "program_source:8 by thread"),
    ("reverse", BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);\n  float v", "race", "no barrier"),
    ("reverse", BARRIER, "float v", "race|uninitialised", "program_source:9"),
    ("reverse", SECOND, "s[i] = v;", "race", "write at program_source:11 .*read at program_source:10"),
    ("reverse", "s[i] = x[at];", "if (i < 63) s[i] = x[at];", "uninitialised", "byte 252 of 's'"),
    ("reverse", "s[63 - i]", "s[64 - i]", "bounds", "index 64 is out of bounds|byte 256 of threadgroup variable 's'"),
    ("reverse", "s[63 - i]", "*(s + 65 + i)", "bounds", "byte 260 of threadgroup variable 's', which has 256 bytes"),
    ("reverse", "x[at]", "x[at + 1]", "bounds",
     r"read of 4 bytes at program_source:8 .*\(1, 0, 0\) thread 63 .*byte 512 of buf"),
    ("reverse", "x[at]", "x[int(at) - 1]", "bounds", r"threadgroup \(0, 0, 0\) thread 0 .*byte -4 of buffer\(0\)"),
    ("reverse", "y[at] =", "y[at + 1] =", "bounds", r"write of 4 bytes .*buffer\(1\), which has 512 bytes"),
    ("reverse", "y[at] =", "((device float*)x)[at] =", "constness", r"buffer\(0\), whose argument is const"),
    ("reverse", "y[at] =", "y[0] =", "race", "write .*by thread 0 of the same threadgroup"),
    ("reverse", "y[at] =", "if (i == 0) y[0] =", "race",
     r"device memory.*threadgroup \(0, 0, 0\), and threadgroups are not"),
    ("reverse", "float s[64]", "float s[64], big[8192]", "threadgroup memory", "33024 bytes; the limit is 32768"),
    ("reverse", "s[i] = x[at];", "s[i] = x[at]; float d[40000]; for (int j = 0; j < 40000; j++) d[j] = x[j & 1] + j;\n"
     "  for (int j = 1; j < 40000; j++) d[j] += d[j - 1] * d[40000 - j]; s[i] += d[39999];", "stack", "overflow"),
    ("simd", "simdgroup_barrier(", "if (lane < 16) simdgroup_barrier(", "barrier", "lanes 0-15 of simdgroup 0"),
    ("simd", "simdgroup_barrier(", "if (lane == 3) return;\n  simdgroup_barrier(", "barrier",
     "not reached by lanes 3 of"),
    ("simd", "simdgroup_barrier(mem_flags::mem_threadgroup);", "", "race|uninitialised", "program_source:10"),
    ("simd", "mem_threadgroup", "mem_device", "race", "threadgroup memory"),
    ("simd", "s[i ^ 1]", "s[i ^ 32]", "race|uninitialised", "program_source:10"),
    ("simd", "y[i] = simd_sum(v)", "if (lane & 1) y[i] = simd_sum(v);\n  else y[i] = simd_max(v)", "divergence",
     "simd_sum at program_source:13"),
    ("simd", "lane & 7", "lane + 8", "divergence",
     "simd_shuffle at program_source:12 reads a lane that does not take part"),
    ("simd", "ushort(1)", "ushort(lane & 1)", "divergence", "different operands in the lanes"),
    ("device", "mem_flags::mem_device", "mem_flags::mem_threadgroup", "race",
     "device memory: read at program_source:11"),
    ("device", "scratch + 64 * g", "scratch", "race", "and threadgroups are not ordered"),
    ("device", "atomic_fetch_add_explicit(count, 1u, memory_order_relaxed)", "((device uint*)count)[0] += 1",
     "race", "device"),
    ("device", "count, 1u, memory_order_relaxed);",
     "count, 1u, memory_order_relaxed);\n  if (i == 9) y[0] += ((device uint*)count)[0];",
     "race", "read at program_source:13.*atomic write at program_source:12"),
    ("arrays", "j < four", "j <= four", "bounds", "index 4 is out of bounds for 'float\\[4\\]'"),
    ("arrays", "1u << four", "1u << (four * 8)", "shift", "shifted by 32 bits at program_source:11"),
    ("arrays", "bits / four", "bits / (four - 4)", "arithmetic",
     "division of .* by 0 at program_source:12"),
    ("arrays", "y + 4 * i)", "y + 4 * i + (i == 5))", "alignment", "not a multiple of 16: byte 84 of"),
    ("arrays", "x[4 * i + j]", "x[4 * i + j + (i == 63)]", "bounds", r"byte 1024 of buffer\(0\)"),
    ("matrix", "simdgroup_load(b, x + 64", "simdgroup_load(b, x + 64 - lane % 2", "matrix", "lanes 0 and 1 .*differ"),
    ("matrix", "simdgroup_multiply", "if (lane != 5) simdgroup_multiply", "matrix|divergence", "lanes"),
    ("matrix", "y + 64 * sg", "y", "race", r"write at program_source:12.*buffer\(1\)"),
    ("matrix", "x + 64, 8", "x + 65, 8", "bounds", r"byte 256 of buffer\(0\)|byte 25\d of buffer\(0\)"),
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_clean_kernel(name: str) -> None:
    """No report of any severity, in three orders, and the same result without checks."""
    case, results = CASES[name], []
    library = Library(HEADER + case.text)
    for settings in ({"order": 0}, {"order": 1}, {"order": 77}, {"check": False}, {"check": False, "guard": True}):
        with emulator.configured(**settings):
            arguments = case.arguments()
            library.run("k", arguments, case.grid, case.group)
            results.append(arguments[1])
        assert emulator.reports() == []
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug[0]}-{i}-{bug[3].split('|')[0]}" for i, bug in enumerate(BUGS)])
def test_planted_bug(bug: tuple[str, str, str, str, str]) -> None:
    name, old, new, kind, pattern = bug
    case = CASES[name]
    assert case.text.count(old) == 1
    with found(kind, pattern) as reports:
        case.run(case.text.replace(old, new))
    assert all(report.text.startswith("k: ") for report in reports)


def test_views_are_the_bounds() -> None:
    """A view that ends inside its storage: reading on is an error, though the memory is there."""
    storage, y = torch.arange(256, dtype=torch.float32), torch.zeros(128)
    library = Library(HEADER + CASES["reverse"].text.replace("x[at]", "x[at + 1]"))
    with found("bounds", r"byte 512 of buffer\(0\), which has 512 bytes"):
        library.run("k", [storage[64:192], y], 128, 64)
    library.run("k", [storage[64:193], y], 128, 64)
    with found("bounds", r"byte 4 of buffer\(0\), which has 0 bytes"):
        library.run("k", [storage[:0], y], 128, 64)


def test_overlapping_views_share_memory_but_not_bounds() -> None:
    storage = torch.arange(192, dtype=torch.float32)
    text = """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
    constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]) { y[i + n] = x[i + n] + 1; }"""
    library = Library(HEADER + text)
    library.run("k", [storage, storage, 0], 64, 64)
    assert torch.equal(storage[:64], torch.arange(1, 65.0))
    with found("bounds", r"read .*byte 256 of buffer\(0\)"):
        library.run("k", [storage[:64], storage[32:160], 64], 64, 64)
    with found("race", "device memory"):
        library.run("k", [storage[:128], storage[1:129], 0], 64, 64)


def test_plain_runs_catch_faults() -> None:
    """Without check: guard=True makes the processor itself find what runs far enough out of a buffer."""
    text = CASES["reverse"].text.replace("x[at]", "x[at + 100000]")
    with emulator.configured(check=False, guard=True), found("bounds", r"program_source:8 .*buffer\(0\)"):
        CASES["reverse"].run(text)
    redzone = CASES["reverse"].text.replace("s[i] = v;", "*(s + 1 + i) = v;")
    with emulator.configured(check=False), found("bounds", "past the end of threadgroup variable 's'"):
        CASES["reverse"].run(redzone)


def test_threadgroup_memory_starts_as_nan() -> None:
    text = CASES["reverse"].text.replace("s[i] = x[at];", "if (i < 63) s[i] = x[at];")
    with emulator.configured(check=False):
        x, y = floats(128, 128)()
        Library(HEADER + text).run("k", [x, y], 128, 64)
    assert torch.isnan(y[:64]).tolist() == [True] + [False] * 63


def test_poison() -> None:
    """New tensors are NaN, so that scratch memory which is read before it is written shows."""
    with emulator.configured(poison=True):
        assert torch.isnan(torch.empty(5000)).all()
        assert (torch.empty(50, dtype=torch.int64) == -1).all()
        assert (torch.zeros(5000) == 0).all()


def test_not_strict() -> None:
    """A barrier that returned threads do not reach, and divergent sums, become warnings."""
    text = CASES["reverse"].text.replace(SECOND, "if (i == 7) return;\n  " + SECOND)
    with emulator.configured(strict=False):
        CASES["reverse"].run(text)
        reports = emulator.reports()
    assert [(report.kind, report.is_error) for report in reports] == [("barrier", False)]


def test_legal_patterns_are_silent() -> None:
    """Groups at the grid's edge, a simdgroup that goes on alone, packed words, byte scratch, the same tensor twice."""
    text = """kernel void k(device const uint* words [[buffer(0)]], device float* scratch [[buffer(1)]],
    device const half* a [[buffer(2)]], device const half* b [[buffer(3)]], device float* y [[buffer(4)]],
    device const int* list [[buffer(5)]], uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]], uint in [[thread_index_in_threadgroup]]) {
  threadgroup atomic_int hits[4];
  threadgroup float best[32];
  if (in < 4) atomic_store_explicit(&hits[in], 0, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&hits[list[i] & 3], 1, memory_order_relaxed);
  scratch[i] = float(a[i]) + float(b[i]) + float(words[i] >> 16);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simd != 0) return;
  best[lane] = float(atomic_load_explicit(&hits[lane & 3], memory_order_relaxed));
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = best[lane ^ 1] + simd_max(scratch[i]);
}"""
    half = torch.ones(100, dtype=torch.float16)
    words = torch.arange(200, dtype=torch.int16)
    arguments = [
        words,
        torch.zeros(400, dtype=torch.uint8),
        half,
        half,
        torch.zeros(100),
        torch.arange(100, dtype=torch.int32),
    ]
    Library(HEADER + text).run("k", arguments, 100, 64)
    assert emulator.reports() == []


# ---- mistakes of the host ----

ENCODED = (
    HEADER
    + """struct Numbers { int a; float b; };
[[kernel, max_total_threads_per_threadgroup(256)]] void k(device const half* x [[buffer(0)]],
    device float* y [[buffer(1)]], constant long& n [[buffer(2)]], constant int& small [[buffer(3)]],
    constant float& scale [[buffer(4)]], uint i [[thread_position_in_grid]]) {
  y[i] = float(x[i]) * scale + float(n + small);
}
kernel void ints(device const int* x [[buffer(0)]], device long* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[i] = x[i];
}
kernel void numbers(constant Numbers& n [[buffer(0)]], device float* y [[buffer(1)]],
    constant bool& flag [[buffer(2)]]) {
  y[0] = n.b + n.a + flag;
}
"""
)
X, Y, INT32, INT64 = torch.ones(64, dtype=torch.float16), torch.zeros(64), torch.int32, torch.int64
TENTH = torch.tensor(0.5)
ODD = torch.zeros(129, dtype=torch.uint8)[1:]
# (kernel, arguments, grid, group, kind, pattern); Y is written
BINDINGS = [
    ("k", [X, Y, 1, 2], 64, 64, "argument", r"k: buffer\(4\), declared `constant float& scale`: nothing is bound"),
    (
        "k",
        [None, Y, 1, 2, TENTH],
        64,
        64,
        "argument",
        r"buffer\(0\), declared `device const half\* x`: nothing is bound",
    ),
    ("k", [7, Y, 1, 2, TENTH], 64, 64, "argument", r"buffer\(0\).*an integer is bound where a buffer is expected"),
    ("k", [b"1234", Y, 1, 2, TENTH], 64, 64, "argument", r"buffer\(0\)"),
    ("k", [X, Y, X, 2, TENTH], 64, 64, "argument", r"buffer\(2\).*a tensor of 64 elements .* one value is expected"),
    (
        "k",
        [X, Y, X[0], 2, TENTH],
        64,
        64,
        "argument",
        r"buffer\(2\).*dtype float16 is bound; 64 bit integer is expected",
    ),
    ("k", [X.float(), Y, 1, 2, TENTH], 64, 64, "argument", r"buffer\(0\).*dtype float32 is bound; float16 is expected"),
    (
        "k",
        [X.bfloat16(), Y, 1, 2, TENTH],
        64,
        64,
        "argument",
        r"buffer\(0\).*dtype bfloat16 is bound; float16 is expected",
    ),
    ("k", [X, Y.double(), 1, 2, TENTH], 64, 64, "argument", r"buffer\(1\).*dtype float64"),
    ("k", [X, Y.int(), 1, 2, TENTH], 64, 64, "argument", r"buffer\(1\).*dtype int32 is bound; float32 is expected"),
    (
        "k",
        [X, Y, 1, 1 << 40, TENTH],
        64,
        64,
        "argument",
        r"buffer\(3\).*the value 1099511627776 does not fit its 4 bytes",
    ),
    (
        "k",
        [X, Y, 1, 2, 3],
        64,
        64,
        "argument",
        r"buffer\(4\).*the integer 3 is bound, whose bits are no ordinary float",
    ),
    ("k", [X, Y, b"1234", 2, TENTH], 64, 64, "argument", r"buffer\(2\).*4 bytes are bound where 8 bytes are expected"),
    ("k", [X, Y, 1, 2, b"12345678"], 64, 64, "argument", r"buffer\(4\).*8 bytes are bound where 4 bytes"),
    (
        "k",
        {0: X, 1: Y, 2: 1, 3: 2, 4: TENTH, 31: 5},
        64,
        64,
        "argument",
        "k: set_arg_int with buffer index 31; Metal has 31",
    ),
    ("k", [X, Y, 1, 2, TENTH], 512, 512, "group size", "is 512 threads; the pipeline's limit is 256"),
    ("k", [X, Y, 1, 2, TENTH], 64, 0, "group size", "empty"),
    ("ints", [Y.int(), Y.long()], 2048, 2048, "group size", "is 2048 threads; the pipeline's limit is 1024"),
    ("ints", [Y.int(), Y.long()], (64, 1, 1, 1), (64, 1, 1, 1), "group size", "4 dimensions"),
    (
        "ints",
        [Y.long(), Y.long()],
        64,
        64,
        "argument",
        r"buffer\(0\).*dtype int64 is bound; 32 bit integer is expected",
    ),
    ("ints", [Y.int(), Y.int()], 64, 64, "argument", r"buffer\(1\).*dtype int32 is bound; 64 bit integer is expected"),
    ("ints", [Y, Y.long()], 64, 64, "argument", r"buffer\(0\).*dtype float32 is bound"),
    ("ints", [ODD[:128], Y.long()], 32, 32, "argument", r"buffer\(0\).*not a multiple of 4"),
    ("numbers", [5, Y, 1], 1, 1, "argument", r"buffer\(0\).*an integer of 8 bytes"),
    ("numbers", [b"12345678", Y, 2], 1, 1, "argument", r"buffer\(2\).*the value 2 does not fit"),
    ("numbers", [torch.zeros(1, dtype=INT32), Y, 1], 1, 1, "argument", r"buffer\(0\).*has 4 bytes; 8 are expected"),
]


@pytest.mark.parametrize("case", BINDINGS, ids=[f"{case[0]}-{i}-{case[4]}" for i, case in enumerate(BINDINGS)])
def test_wrong_binding(case: tuple[str, Any, Any, Any, str, str]) -> None:
    name, arguments, grid, group, kind, pattern = case
    with found(kind, pattern):
        Library(ENCODED).run(name, arguments, grid, group)


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor([2.0]), b"\0\0\0\x40", 0x40000000],
    ids=["0-dim", "0-dim-double", "one-element", "bytes", "int-bits"],
)
def test_right_binding(scale: Any) -> None:
    """Every way in which a float reaches a kernel."""
    y = torch.zeros(64)
    Library(ENCODED).run("k", [X, y, 1, -2, scale], 64, 64)
    assert torch.equal(y, torch.ones(64))
    Library(ENCODED).run("numbers", [b"\x03\0\0\0\0\0\0\x40", y, 1], 1, 1)
    assert y[0] == 6


def test_a_0_dimensional_tensor_is_copied_when_bound() -> None:
    """As torch does: setBytes. The kernel sees what the tensor held then."""
    scale, y = torch.tensor(2.0), torch.zeros(64)
    library = Library(ENCODED)
    with emulator.configured(commit_every=0):
        library.encode("k", [X, y, 0, 0, scale], 64, 64)
        scale.fill_(7)
        emulator.synchronize()
    assert torch.equal(y, torch.full((64,), 2.0))


def test_types_can_be_switched_off() -> None:
    with emulator.configured(types=False):
        Library(ENCODED).run("ints", [torch.ones(64), torch.zeros(64, dtype=INT64)], 64, 64)


def _call(name: str, *arguments: Any) -> Callable[[Library, ctypes.c_void_p], None]:
    return lambda library, function: getattr(library.library, f"aoti_torch_mps_{name}")(function, *arguments)


def _in_block(*steps: Callable[[Library, ctypes.c_void_p], Any]) -> Callable[[Library, ctypes.c_void_p], None]:
    return lambda library, function: library.block(
        function, lambda: [step(library, function) for step in steps] and None
    )


START, SET_INT = _call("start_encoding"), _call("set_arg_int", 2, ctypes.c_int64(1))
DISPATCH = _call("dispatch_single", ctypes.c_uint64(64))
# (name, what is called with the library and a kernel function, pattern)
MISUSES = [
    ("start outside", START, "k: start_encoding outside of run_command_block"),
    ("set outside", SET_INT, "k: set_arg_int outside of run_command_block"),
    ("dispatch outside", DISPATCH, "k: dispatch outside of run_command_block"),
    ("set before start", _in_block(SET_INT), "k: set_arg_int before start_encoding"),
    ("dispatch before start", _in_block(DISPATCH), "k: dispatch before start_encoding"),
    (
        "other kernel",
        _in_block(START, lambda library, _: SET_INT(library, library.kernel("ints"))),
        "ints: set_arg_int while k is being encoded",
    ),
    (
        "block in block",
        _in_block(lambda library, function: library.block(function, lambda: None)),
        "inside a command block",
    ),
    (
        "allocation",
        _in_block(lambda *_: torch.empty(100)),
        r"a tensor is allocated \(400 bytes\) inside a command block",
    ),
    ("torch op", _in_block(lambda *_: Y + 1), "a tensor is allocated .* inside a command block"),
    (
        "wait",
        _in_block(lambda library, _: library.library._ZN5torch3mps11synchronizeEv()),
        "inside a command block waits",
    ),
    (
        "commit outside",
        lambda library, _: library.library._ZN5torch3mps6commitEv(),
        r"commit\(\) outside of a command block",
    ),
]


@pytest.mark.parametrize(("step", "pattern"), [case[1:] for case in MISUSES], ids=[case[0] for case in MISUSES])
def test_misuse_of_the_stream(step: Callable[[Library, ctypes.c_void_p], None], pattern: str) -> None:
    library = Library(ENCODED)
    step(library, library.kernel("k"))
    with found("command block", pattern):
        emulator.synchronize()


def test_guarded_functions() -> None:
    """What a table of torch's functions can be wrapped in: silent outside of a block, and all arguments pass."""
    library, torch_library = Library(ENCODED), emulator.torch_library()
    address = ctypes.cast(torch_library.aoti_torch_empty_strided, ctypes.c_void_p).value
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_int64, *[ctypes.POINTER(ctypes.c_int64)] * 2, *[ctypes.c_int32] * 3,
        ctypes.POINTER(ctypes.c_void_p),
    )  # fmt: skip
    guarded = prototype(library.library.emu_guard(b"aoti_torch_empty_strided", address))
    sizes, strides, handle = (ctypes.c_int64 * 2)(0, 5), (ctypes.c_int64 * 2)(5, 1), ctypes.c_void_p()
    dim = ctypes.c_int64()

    def call() -> None:
        assert guarded(2, sizes, strides, 6, 0, 0, ctypes.byref(handle)) == 0
        assert torch_library.aoti_torch_get_dim(handle, ctypes.byref(dim)) == 0
        assert dim.value == 2
        torch_library.aoti_torch_delete_tensor_object(handle)

    call()
    emulator.synchronize()
    library.block(library.kernel("k"), call)
    with found("command block", "aoti_torch_empty_strided is called inside a command block"):
        emulator.synchronize()


def test_two_dispatches_of_one_encoding() -> None:
    """Bindings stay, as an encoder's do."""
    library, y = Library(ENCODED), torch.zeros(64)
    function = library.kernel("numbers")
    handle = emulator.Handle.of(y)
    numbers, one = b"\x03\0\0\0\0\0\0\x40", ctypes.c_uint64(1)

    def body() -> None:
        shim = library.library
        shim.aoti_torch_mps_start_encoding(function)
        shim.torch_mps_set_arg_bytes(function, 0, numbers, ctypes.c_uint64(8))
        shim.aoti_torch_mps_set_arg_tensor(function, 1, ctypes.c_void_p(handle.pointer))
        for flag in (0, 1):
            shim.aoti_torch_mps_set_arg_int(function, 2, ctypes.c_int64(flag))
            shim.aoti_torch_mps_dispatch_single_with_group_size(function, one, one)

    library.block(function, body)
    emulator.synchronize()
    assert y[0] == 6
    assert emulator.stats()["dispatches"] == 2


# ---- shaders that must not compile ----

GOOD = "kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1.0; }"
# (what replaces `y[i] = 1.0;`, pattern of the compiler's message)
REFUSED = [
    ("y[i] = 1.0", "program_source:5:.*error: expected ';'"),
    ("y[i] = undeclared;", "use of undeclared identifier 'undeclared'"),
    ("y[i] = erf(1.0f);", "'erf'"),
    ("y[i] = expf(1.0f);", "'expf'"),
    ("double d = 1; y[i] = d;", "program_source:5: error: 'double' does not exist in MSL"),
    ("y[i] = std::min(1.0f, 2.0f);", "std:: does not exist in MSL"),
    ("y[i] = min(int(i), i);", "call to 'min' is ambiguous"),
    ("y[i] = max(1.0h, 2.0f);", "call to 'max' is ambiguous"),
    ("y[i] = exp(int(i));", "call to 'exp' is ambiguous"),
    ("y[i] = exp(bfloat(1));", "call to deleted function 'exp'"),
    ("bfloat b = 1.5f; y[i] = b;", "no viable conversion from 'float' to 'bfloat'"),
    ("y[i] = simd_sum(long(i));", "Metal has simdgroup functions for"),
    ("y[i] = simd_shuffle(bool(i), ushort(0));", "Metal has simdgroup functions for"),
    ("float4 v = float4(1, 2, 3); y[i] = v.x;", "no matching"),
    ("static float s = 1; y[i] = s;", "static local variable"),
    ("static_assert(sizeof(half) == 4, \"half\"); y[i] = 1;", "static assertion failed.*half"),
    ("threadgroup float s = 1; y[i] = s;", "cannot be initialised"),
    ("simdgroup_matrix<float, 4, 4> m; y[i] = 1;", "8 x 8 simdgroup matrices only"),
]  # fmt: skip
# whole texts
REFUSED_TEXTS = [
    ("kernel void k(device float* y [[buffer(31)]]) { y[0] = 1; }", "buffer index 31; Metal has 31 buffers, 0 to 30"),
    (
        "kernel void k(device float* y [[buffer(0)]], device float* z [[buffer(0)]]) { y[0] = 1; }",
        "index 0 is used twice",
    ),
    ("kernel void k(float* y [[buffer(0)]]) { y[0] = 1; }", "a buffer is device or constant memory"),
    (
        "float f() { threadgroup float s[4]; s[0] = 1; return s[0]; }\n" + GOOD,
        "program_source:5: error: threadgroup variable",
    ),
    ("constant int n [[function_constant(0)]];\n" + GOOD, "cannot set function constants"),
    (
        "kernel void k(threadgroup float* s [[threadgroup(0)]], device float* y [[buffer(0)]]) { y[0] = 1; }",
        "threadgroup arg",
    ),
    ("inline float f(float x) { return x; }", "the shader has no kernel"),
    ("#include <cmath>\n" + GOOD, "'cmath' file not found"),
]


@pytest.mark.parametrize(("body", "pattern"), REFUSED, ids=[body for body, _ in REFUSED])
def test_shader_is_refused(body: str, pattern: str) -> None:
    with found("compile", f"the shader does not compile:\n.*{pattern}"):
        Library(HEADER + GOOD.replace("y[i] = 1.0;", body))


@pytest.mark.parametrize(("text", "pattern"), REFUSED_TEXTS, ids=[pattern for _, pattern in REFUSED_TEXTS])
def test_text_is_refused(text: str, pattern: str) -> None:
    with found("compile", pattern):
        Library(HEADER + text)


def test_text_that_is_not_ascii() -> None:
    with found("ascii", "line 6 of the shader has the byte 0xC3"):
        Library(HEADER + GOOD + "\n// \u00e9\n")


def test_missing_kernel() -> None:
    with found("library", "no kernel is named 'nothing'; the library has: k ints numbers"):
        Library(ENCODED).kernel("nothing")


# ---- the queue ----


def test_the_queue_is_asynchronous_and_in_order() -> None:
    """Encoding returns at once; tensors that Python has let go of live until their commands have run."""
    text = """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
    uint i [[thread_position_in_grid]]) { y[i] = 2 * x[i]; }"""
    library = Library(HEADER + text)
    first, last = torch.ones(1000), torch.zeros(1000)
    library.run("k", [first, last], 1, 1)
    with emulator.configured(delay_us=100000, commit_every=1):
        began = time.perf_counter()
        x = first
        for step in range(6):
            y = torch.zeros(1000) if step < 5 else last
            library.encode("k", [x, y], 1000, 100)
            x = y
        del x, y
        assert time.perf_counter() - began < 0.5
        assert last[1] == 0
        emulator.synchronize()
    assert torch.equal(last, torch.full((1000,), 64.0))


def test_nothing_runs_before_it_is_committed() -> None:
    library, y = Library(HEADER + GOOD), torch.zeros(8)
    with emulator.configured(commit_every=0):
        library.encode("k", [y], 8, 8)
        time.sleep(0.02)
        assert y[0] == 0
        emulator.synchronize()
        assert y[0] == 1


def test_timeout() -> None:
    library, y = Library(HEADER + GOOD), torch.zeros(8)
    with emulator.configured(delay_us=300000):
        library.encode("k", [y], 8, 8)
        with pytest.raises(TimeoutError, match=r"still runs after 0\.05 s"):
            emulator.synchronize(timeout=0.05)


def test_errors_surface_once() -> None:
    library, y = Library(HEADER + GOOD), torch.zeros(8)
    library.encode("k", [y], 9, 9)
    with found("bounds", "byte 32"):
        emulator.synchronize()
    emulator.synchronize()
    library.run("k", [y], 8, 8)


# ---- traffic ----


@pytest.mark.parametrize(
    ("element", "dtype", "wide"),
    [
        ("float", torch.float32, "float2 float3 float4 packed_float3"),
        ("half", torch.float16, "half2 half3 half4 packed_half3"),
        ("uint", torch.int32, "uint2 uint3 uint4"),
        ("uchar", torch.uint8, "uchar2 uchar3 uchar4"),
        ("long", torch.int64, "long2 long4"),
        ("bfloat", torch.bfloat16, "bfloat2 bfloat4"),
        ("ushort", torch.int16, "ushort2 ushort4"),
    ],
)
def test_traffic_of_every_type(element: str, dtype: torch.dtype, wide: str) -> None:
    """Each byte that a kernel copies is counted once, whatever the width; a 3 component vector is read in 3 or 4."""
    types = [element, *wide.split()]
    text = HEADER + "".join(
        f"kernel void copy_{t}(device const {t}* x [[buffer(0)]], device {t}* y [[buffer(1)]], "
        f"uint i [[thread_position_in_grid]]) {{ y[i] = x[i]; }}\n"
        for t in types
    )
    library = Library(text)
    for t in types:
        emulator.reset()
        x, y = torch.zeros(192, dtype=dtype), torch.zeros(192, dtype=dtype)
        width = 4 if t.endswith("3") and not t.startswith("packed") else int(t[-1]) if t[-1].isdigit() else 1
        count = 192 // width
        library.run(f"copy_{t}", [x, y], count, 32)
        read, written = emulator.traffic()
        bytes_ = 192 * x.element_size()
        allowed = {bytes_, bytes_ * 3 // 4} if width == 4 and t.endswith("3") else {bytes_}
        assert {read.loaded, written.stored} <= allowed, t
        assert (read.loaded_distinct, written.stored_distinct) == (read.loaded, written.stored)
        assert (read.stored, written.loaded, read.kernel, read.buffer, written.buffer) == (0, 0, f"copy_{t}", 0, 1)


def test_traffic_tells_loads_from_distinct_bytes() -> None:
    """Reads that repeat, read-modify-write, atomics, and one tensor bound twice."""
    text = HEADER + """kernel void k(device const float* x [[buffer(0)]], device const float* same [[buffer(1)]],
    device float* y [[buffer(2)]], device atomic_int* n [[buffer(3)]], uint i [[thread_position_in_grid]]) {
  float sum = 0;
  for (uint j = 0; j < 64; j++) sum += x[j];
  y[i] += sum + same[i];
  atomic_fetch_add_explicit(n, 1, memory_order_relaxed);
}"""  # fmt: skip
    x, y, n = torch.ones(64), torch.zeros(64), torch.zeros(1, dtype=INT32)
    Library(text).run("k", [x, x, y, n], 64, 32)
    counted = {t.buffer: t[3:8] for t in emulator.traffic()}
    assert counted[0] == (256, 64 * 256, 256, 0, 0)
    assert counted[1] == (256, 256, 256, 0, 0)
    assert counted[2] == (256, 256, 256, 256, 256)
    assert counted[3] == (4, 256, 4, 256, 4)
    assert [t.loaded_by_groups for t in emulator.traffic()] == [512, 256, 256, 8]  # two threadgroups
    assert int(n) == 64
    assert float(y[5]) == 65
    emulator.reset()
    assert emulator.traffic() == []


# ---- the harness itself ----


def test_several_threads_encode() -> None:
    """Blocks wait for one another; a thread that waits does not keep Python's lock from the one inside."""
    library = Library(HEADER + GOOD)
    outputs = [torch.zeros(64) for _ in range(4)]

    def encode(y: torch.Tensor) -> None:
        for _ in range(20):
            library.encode("k", [y], 64, 64)

    threads = [threading.Thread(target=encode, args=(y,)) for y in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    emulator.synchronize()
    assert emulator.stats()["dispatches"] == 80
    assert all(torch.equal(y, torch.ones(64)) for y in outputs)


def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Three that start cold, with the same text: each file is built once, whole, and by one of them."""
    script = "import sys; from emulator import toolchain as t; print(t.shader(sys.argv[1], True))"
    environment = {**os.environ, "METAL_EMULATOR_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script, HEADER + GOOD]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=300)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    (path,) = paths
    assert sorted(p.name for p in tmp_path.glob("*.so")) == sorted(
        [Path(path).name, next(tmp_path.glob("run*.so")).name]
    )


def test_the_runtime_needs_only_c() -> None:
    """No C++ runtime to quarrel with torch's, no torch, no Python."""
    needed = lines.needed(str(emulator.build()))
    assert set(needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2"}


def prototypes(text: str) -> dict[str, list[str]]:
    """The types of each function's parameters, without their names."""
    found = {}
    for name, parameters in re.findall(r"\b(aoti_torch_mps_\w+)\(([^)]*)\)\s*;", text):
        types = [" ".join(p.replace("*", " * ").split()) for p in parameters.split(",")]
        found[name] = [
            re.sub(r"(?<=[\w*]) [a-z]\w*$", "", t) if t.count(" ") and not t.endswith("_t") else t for t in types
        ]
    return found


def test_prototypes_are_torchs() -> None:
    """shim.h against the shim_mps.h of the torch that is installed."""
    ours = prototypes((Path(emulator.__file__).parent / "runtime" / "shim.h").read_text())
    header = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch/c/shim_mps.h"
    theirs = prototypes(header.read_text())
    del theirs["aoti_torch_mps_shared_callback"]  # takes a std::function: of no use to C
    assert ours == theirs
    assert all(hasattr(emulator.load(), name) for name in ours)


def test_without_set_bytes() -> None:
    """As torch before 2.14: the symbol is not there, and nothing else changes."""
    assert "torch_mps_set_arg_bytes" in lines.exported(str(emulator.build()))
    older = lines.exported(str(emulator.build(set_bytes=False)))
    assert "torch_mps_set_arg_bytes" not in older
    assert "aoti_torch_mps_set_arg_tensor" in older


def test_unknown_setting() -> None:
    with pytest.raises(ValueError, match="unknown \\['chek'\\]; the settings are"):
        emulator.configure(chek=True)


def test_statistics() -> None:
    case = CASES["reverse"]
    case.run(case.text)
    stats = emulator.stats()
    assert (stats["dispatches"], stats["threadgroups"], stats["threads"], stats["barriers"]) == (1, 2, 128, 4)
    assert stats["max_threadgroup_bytes"] == 256
    assert HEADER + case.text in emulator.sources()


def test_a_line_that_is_not_known(tmp_path: Path) -> None:
    assert re.match(r"offset 0x5 of .*nothing.so \(", lines.line_of(str(tmp_path / "nothing.so"), 5))
