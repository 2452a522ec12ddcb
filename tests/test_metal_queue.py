"""Metal from C, on the emulator's stand-in for Objective-C's runtime: messages, counts, handlers, events, faults.

The fixture `fake_metal` ends each test with the same question: is every object released that was made, and has the
stand-in seen no mistake? The last part breaks its rules on purpose, through ctypes: it would have seen one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import platform
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metal_marlin import _C, metal_queue

emulator = pytest.importorskip("emulator")
ROOT = Path(__file__).resolve().parent.parent
SOON = 20.0  # seconds; what is waited for takes milliseconds

SOURCE = """#include <metal_stdlib>
using namespace metal;
kernel void affine(device uint* x [[buffer(0)]], constant uint& factor [[buffer(1)]],
                   constant uint& addend [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  x[i] = x[i] * factor + addend;
}
kernel void add(device const uint* x [[buffer(0)]], device const uint* y [[buffer(1)]], device uint* z [[buffer(2)]],
                uint2 at [[thread_position_in_grid]], uint2 extent [[threads_per_grid]]) {
  uint i = at.y * extent.x + at.x;
  z[i] = x[i] + y[i];
}
[[max_total_threads_per_threadgroup(64)]]
kernel void small(device uint* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  x[i + 1] = i;
}
"""


class Opened:
    """The device, until the test ends: pytest holds what a fixture returns for longer."""

    def __init__(self) -> None:
        self.itself = metal_queue.open_device()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.itself, name)


@pytest.fixture
def device(fake_metal: Any) -> Iterator[Any]:
    opened = Opened()
    yield opened
    del opened.itself


def word(value: int) -> bytes:
    return struct.pack("I", value)


class Work:
    """A buffer of 64 words and the kernel x = x * factor + addend, on a queue."""

    def __init__(self, device: Any, queue: Any = None, data: Any = None) -> None:
        self.queue = queue or device.queue()
        self.kernel = device.pipeline(SOURCE, "affine")
        self.data = data or device.buffer(256)

    def encode(self, commands: Any, factor: int, addend: int, count: int = 1) -> None:
        commands.begin()
        commands.dispatch(self.kernel, (self.data, word(factor), word(addend)), 64, 32, count)
        commands.end()

    def commands(self, factor: int = 1, addend: int = 1, count: int = 1) -> Any:
        commands = self.queue.commands()
        self.encode(commands, factor, addend, count)
        return commands

    def values(self) -> set[int]:
        """The distinct values of the buffer: one, where every thread has run."""
        return set(metal_queue.view(self.data).cast("I"))


# ---------------------------------------------------------------- finding Metal


@pytest.mark.skipif(platform.system() == "Darwin", reason="there is Metal here")
def test_without_metal():
    expected = "no Metal device: this is .*; expected macOS"
    with pytest.raises(RuntimeError, match=expected) as caught:
        metal_queue.open_device()
    assert "libobjc" in str(caught.value.__cause__)
    assert re.match(expected, metal_queue.device_problem() or "")


def test_a_library_that_lacks_a_symbol(tmp_path: Path):
    with pytest.raises(ImportError, match=r"libm.* lacks the symbol objc_getClass"):
        _C.use_metal_fake("libm.so.6")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ImportError, match=r"text\.so"):
        _C.use_metal_fake(tmp_path / "text.so")
    with pytest.raises(TypeError):
        _C.use_metal_fake(3)
    assert _C.metal_objects() == 0


def test_every_message_is_sent_somewhere():
    """The list in the header is what .ci/symbols.py checks, so it has no more than what is used."""
    header = (ROOT / "csrc" / "metal_queue" / "runtime.h").read_text().replace("\\\n", " ")
    (entries,) = re.findall(r"#define MM_METAL_MESSAGES\(X\)(.*)", header)
    names = re.findall(r'X\([^,]+,\s*(\w+),\s*"', entries)
    code = "".join(
        path.read_text() for folder in ("metal_queue", "mps") for path in (ROOT / "csrc" / folder).glob("*.c")
    )
    assert len(names) > 30
    assert [name for name in names if not re.search(rf"MM_(ASK|SEND)\({name},", code)] == []


def test_device(device: Any):
    assert device.emulated is True
    assert "timings mean nothing" in device.name
    assert device.unified_memory is True
    assert 0 < device.max_buffer_bytes <= device.working_set_bytes
    assert metal_queue.device_problem() is None


def test_no_device(fake_metal: Any):
    with fake_metal.faults(no_device=True), pytest.raises(RuntimeError, match=r"no Metal device: .* is nil"):
        metal_queue.open_device()


def test_the_library_stays_while_objects_live(device: Any):
    with pytest.raises(RuntimeError, match=r"1 Metal objects are alive; expected none"):
        _C.use_metal_fake(None)
    assert device.name


# ---------------------------------------------------------------- kernels and buffers


def test_results(device: Any):
    """Arguments by slot, two dimensions, ragged threadgroups."""
    x, y, z = (device.buffer(4 * 35) for _ in range(3))
    metal_queue.view(x).cast("I")[:] = memoryview(struct.pack("35I", *range(35))).cast("I")
    metal_queue.view(y).cast("I")[:] = memoryview(struct.pack("35I", *[100] * 35)).cast("I")
    commands = device.queue().commands()
    commands.begin()
    commands.dispatch(device.pipeline(SOURCE, "add"), (x, y, z), (7, 5), (4, 2))
    commands.end()
    commands.commit()
    commands.wait(SOON)
    assert commands.status == "completed"
    assert list(metal_queue.view(z).cast("I")) == [100 + i for i in range(35)]


def test_dispatches_and_encoders_run_in_order(device: Any):
    """x * 3 + 1 does not commute with x * 5 + 2: another order, or one too few, gives another number."""
    work = Work(device)
    commands = work.commands(3, 1, count=2)
    commands.begin()
    commands.dispatch(work.kernel, (work.data, word(5), word(2)), 64, 64)
    commands.dispatch(work.kernel, (None, word(3)), 64, 16)  # None and what is not named stay bound
    commands.end()
    commands.commit()
    commands.wait(SOON)
    expected = ((0 * 3 + 1) * 3 + 1) * 5 + 2
    assert work.values() == {expected * 3 + 2}


def test_buffers_are_zero_and_views_keep_them(fake_metal: Any, device: Any):
    work = Work(device)
    assert work.values() == {0}  # the stand-in's new memory is not
    commands, view = work.commands(1, 7), metal_queue.view(work.data)
    assert (len(view), view.readonly, work.data.nbytes) == (256, False, 256)
    view.cast("I")[0] = 1000
    del work
    gc.collect()
    commands.commit()
    commands.wait(SOON)
    assert "MTLBuffer" in fake_metal.live()
    assert view.cast("I")[:2].tolist() == [1007, 7]
    del view, commands
    gc.collect()
    fake_metal.settle()
    assert "MTLBuffer" not in fake_metal.live()


def test_a_pipeline_says_its_limits(device: Any):
    assert device.pipeline(SOURCE, "affine").max_threads == 1024
    assert device.pipeline(SOURCE, "small").max_threads == 64
    assert device.pipeline(SOURCE, "small").simd_width == 32


def test_compilers_messages(fake_metal: Any, device: Any):
    with pytest.raises(
        RuntimeError, match=r"(?s)compiler refused the source: .*undeclared.*MTLLibraryErrorDomain, code 3"
    ):
        device.pipeline(SOURCE.replace("x[i] * factor", "x[i] * facto"), "affine")
    long = SOURCE + "".join(f"\nconstant uint c{i} = undeclared_number_{i};" for i in range(19))
    with pytest.raises(RuntimeError, match=r"(?s)undeclared.*\(MTLLibraryErrorDomain, code 3\)$"):
        device.pipeline(long, "affine")
    with pytest.raises(RuntimeError, match="name is 'affin'; expected a kernel of the source"):
        device.pipeline(SOURCE, "affin")
    with (
        fake_metal.faults(no_library=True),
        pytest.raises(RuntimeError, match="refused the source: a fault was asked for"),
    ):
        device.pipeline(SOURCE, "affine")
    with (
        fake_metal.faults(no_pipeline=True),
        pytest.raises(RuntimeError, match="of the kernel 'affine': Compiler encountered"),
    ):
        device.pipeline(SOURCE, "affine")
    with pytest.raises(ValueError, match="null"):
        device.pipeline("a\0b", "affine")


def test_the_emulator_checks_these_kernels_too(metal: Any):
    """A write beyond the buffer is found, as on PyTorch's stream."""
    with emulator.configured(check=True):
        device = metal_queue.open_device()
        data = device.buffer(4 * 64)
        commands = device.queue().commands()
        commands.begin()
        commands.dispatch(device.pipeline(SOURCE, "small"), (data,), 64, 64)
        commands.end()
        commands.commit()
        commands.wait(SOON)
        metal.settle()
        with pytest.raises(emulator.EmulatorError, match="bounds"):
            emulator.synchronize()


# ---------------------------------------------------------------- waiting, times, handlers


def test_times(device: Any):
    work = Work(device)
    commands = work.commands()
    before = time.perf_counter_ns()
    commands.commit()
    commands.wait(SOON)
    after = time.perf_counter_ns()
    t = commands.times()
    assert None not in t
    assert before <= t.committing_ns <= t.committed_ns <= after
    rounding = 1000  # Metal's own times are seconds as doubles
    order = [t.committing_ns, t.kernel_start_ns, t.kernel_end_ns, t.gpu_start_ns, t.gpu_end_ns, t.completed_ns, after]
    assert all(a <= b + rounding for a, b in itertools.pairwise(order)), t
    assert t.committing_ns <= t.scheduled_ns <= t.completed_ns


def test_handlers_may_come_after_metals_own_wait(fake_metal: Any, device: Any):
    work = Work(device)
    with fake_metal.faults(handler_delay_us=100_000):
        commands = work.commands()
        commands.commit()
        commands.wait_until_completed()
        assert commands.status == "completed"
        assert commands.times().completed_ns is None
        commands.wait(SOON)
    times = commands.times()
    assert times.completed_ns - times.gpu_end_ns > 50_000_000


def test_the_handler_wakes_the_waiter(fake_metal: Any, device: Any):
    """At once, and not at the waiter's next look."""
    work, delays = Work(device), []
    with fake_metal.faults(handler_delay_us=5000):  # so that the waiter sleeps by then
        for _ in range(10):
            commands = work.commands()
            commands.commit()
            commands.wait(SOON)
            delays.append(time.perf_counter_ns() - commands.times().completed_ns)
    assert min(delays) < 20_000_000  # it looks every 50 ms


def test_timeout_and_late_completion(fake_metal: Any, device: Any):
    work = Work(device)
    with fake_metal.faults(stall=True):
        commands = work.commands()
        commands.commit()
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"is (committed|scheduled) after 0.2 s; expected it to be completed"):
            commands.wait(timeout=0.2)
        assert 0.19 < time.monotonic() - start < 5
        with pytest.raises(TimeoutError):
            commands.wait(0)
        assert commands.times().completed_ns is None
        assert work.values() == {0}
    commands.wait(SOON)
    assert work.values() == {1}


def test_giving_up_leaks_nothing(fake_metal: Any, device: Any):
    """The waiter lets go of all it has; the handlers come later, and the fixture finds nothing left."""
    work = Work(device)
    view = metal_queue.view(work.data)
    with fake_metal.faults(stall=True):
        commands = work.commands()
        commands.commit()
        with pytest.raises(TimeoutError):
            commands.wait(0.01)
        del commands, work
        gc.collect()
        assert "2 blocks" in fake_metal.live() or "1 blocks" in fake_metal.live()  # the scheduled handler may have run
        assert set(view.cast("I")) == {0}
    fake_metal.settle()
    assert set(view.cast("I")) == {1}


@pytest.mark.parametrize("wait", ["wait", "wait_until_completed"])
def test_an_error_is_told_in_metals_words(fake_metal: Any, device: Any, wait: str):
    work = Work(device)
    with fake_metal.faults(error=True):
        commands = work.commands()
        commands.commit()
        with pytest.raises(
            RuntimeError, match=r"ended in an error: Caused GPU Timeout .*MTLCommandBufferErrorDomain, code 2"
        ):
            getattr(commands, wait)()
        assert commands.status == "error"
        with pytest.raises(RuntimeError, match="ended in an error"):
            commands.wait(SOON)
    again = work.commands()
    again.commit()
    again.wait(SOON)
    assert work.values() == {1}


def test_waiting_leaves_python_to_others(fake_metal: Any, device: Any):
    """While one thread waits in C, this one runs, commits elsewhere and ends the stall."""
    work = Work(device)
    waited: list[str] = []

    def wait(method: Callable[[], None]) -> None:
        method()
        waited.append(commands.status)

    with fake_metal.faults(stall=True):
        commands = work.commands()
        commands.commit()
        threads = [threading.Thread(target=wait, args=(m,)) for m in (commands.wait, commands.wait_until_completed)]
        threads += [threading.Thread(target=wait, args=(lambda: commands.wait(SOON),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert waited == []
    for thread in threads:
        thread.join(SOON)
    assert waited == ["completed"] * 5


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("what", ["commands", "event"])
def test_ctrl_c_ends_a_wait(fake_metal: Any, device: Any, what: str):
    work, event = Work(device), device.event()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with fake_metal.faults(stall=True):
            commands = work.commands()
            commands.commit()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                commands.wait() if what == "commands" else event.wait(1)
            assert time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    commands.wait(SOON)


# ---------------------------------------------------------------- events


def test_an_event_orders_two_queues(device: Any):
    """The consumer is committed first and must not run before the producer."""
    event = device.event()
    producer = Work(device)
    consumer = Work(device, data=producer.data)
    second = consumer.queue.commands()
    second.wait_for(event, 1)
    consumer.encode(second, 3, 1)
    second.commit()
    with pytest.raises(TimeoutError):
        second.wait(0.05)
    first = producer.commands(1, 10)
    first.signal(event, 1)
    first.commit()
    second.wait(SOON)
    assert producer.values() == {31}
    assert event.value == 1


def test_the_cpu_takes_part(fake_metal: Any, device: Any):
    work, event = Work(device), device.event()
    assert event.value == 0
    commands = work.queue.commands()
    commands.wait_for(event, 5)
    work.encode(commands, 1, 1)
    commands.signal(event, 6)
    commands.commit()
    event.value = 4
    with pytest.raises(TimeoutError, match=r"value is 4 after 0.05 s; expected 5 or more"):
        event.wait(5, timeout=0.05)
    event.value = 5
    event.wait(6, SOON)
    assert work.values() == {1}
    event.value = 2  # events only grow
    assert event.value == 6
    with fake_metal.faults(old_system=True), pytest.raises(RuntimeError, match="macOS 12"):
        event.wait(7, SOON)


# ---------------------------------------------------------------- life and death


def test_dropping_at_any_time(device: Any):
    """With an encoder open, encoded, committed: nothing leaks, and what was committed runs."""
    work, event = Work(device, device.queue(4)), device.event()
    for _ in range(10):  # more than the queue's limit: places come back
        work.queue.commands()
        work.queue.commands().begin()
        commands = work.queue.commands()
        commands.signal(event, 1)
        commands.begin()
        commands.dispatch(work.kernel, (work.data, word(1), word(1)), 64, 64)
        del commands
    view = metal_queue.view(work.data)
    work.commands().commit()
    kernel_and_queue = (work.kernel, work.queue)
    del work, kernel_and_queue
    gc.collect()
    deadline = time.monotonic() + SOON
    while set(view.cast("I")) != {1} and time.monotonic() < deadline:
        time.sleep(0.001)
    assert set(view.cast("I")) == {1}
    assert event.value == 0


def test_no_more_in_flight_than_the_limit(fake_metal: Any, device: Any):
    """Metal would wait for ever for the first of them."""
    work = Work(device, device.queue(limit=2))
    with fake_metal.faults(stall=True):
        first, second = work.commands(), work.commands()
        first.commit()
        with pytest.raises(
            RuntimeError, match="2 command buffers that have not completed; expected fewer than its limit"
        ):
            work.queue.commands()
        del second
        second = work.commands()
        second.commit()
    second.wait(SOON)
    work.commands().commit()
    fake_metal.settle()
    assert work.values() == {3}
    del first, second
    kept = [work.queue.commands(), work.queue.commands()]  # each of the three gave back one place, not more
    with pytest.raises(RuntimeError, match="expected fewer than its limit of 2"):
        work.queue.commands()
    del kept


def test_many_and_threads(fake_metal: Any, device: Any):
    """Four threads, a queue each, 60 command buffers with 8 in flight; every kernel ran exactly once, in order."""
    failures: list[BaseException] = []
    works = [Work(device, device.queue(8)) for _ in range(4)]

    def run(work: Work) -> None:
        try:
            flying: list[Any] = []
            for i in range(60):
                if len(flying) == 8:
                    flying.pop(0).wait(SOON)
                flying.append(work.commands(3, i, count=1 + i % 2))
                flying[-1].commit()
            for commands in flying:
                commands.wait(SOON)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    expected = 0
    for i in range(60):
        for _ in range(1 + i % 2):
            expected = (expected * 3 + i) % 2**32
    assert [work.values() for work in works] == [{expected}] * 4


def test_one_of_two_threads_commits(device: Any):
    work = Work(device)
    for _ in range(50):
        commands, results = work.commands(1, 1), []

        def commit(commands: Any = commands, results: list[str] = results) -> None:
            try:
                commands.commit()
                results.append("committed")
            except RuntimeError as error:
                results.append(str(error))

        threads = [threading.Thread(target=commit) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        commands.wait(SOON)
        assert sorted(results) == sorted(["committed", next(r for r in results if "has been committed" in r)])
    assert work.values() == {50}


# ---------------------------------------------------------------- bad input


def begun(work: Work) -> Any:
    commands = work.queue.commands()
    commands.begin()
    return commands


def committed(work: Work) -> Any:
    commands = work.commands()
    commands.commit()
    return commands


def dispatch(commands: Any, work: Work) -> None:
    commands.dispatch(work.kernel, (work.data, word(1), word(1)), 64, 64)


ORDER: dict[str, tuple[Callable[[Work], Any], Callable[[Any, Work], Any], str]] = {
    "commit twice": (committed, lambda c, w: c.commit(), "commit: the command buffer has been committed"),
    "begin after commit": (committed, lambda c, w: c.begin(), "begin: the command buffer has been committed"),
    "dispatch after commit": (committed, dispatch, "dispatch: the command buffer has been committed"),
    "end after commit": (committed, lambda c, w: c.end(), "end: the command buffer has been committed"),
    "signal after commit": (committed, lambda c, w: c.signal(w.event, 1), "signal: the command buffer has been"),
    "wait_for after commit": (committed, lambda c, w: c.wait_for(w.event, 1), "wait_for: the command buffer has"),
    "begin twice": (begun, lambda c, w: c.begin(), "begin: an encoder is open; expected end"),
    "commit while encoding": (begun, lambda c, w: c.commit(), "commit: an encoder is open; expected end"),
    "signal while encoding": (begun, lambda c, w: c.signal(w.event, 1), "signal: an encoder is open; expected end"),
    "wait_for while encoding": (begun, lambda c, w: c.wait_for(w.event, 1), "wait_for: an encoder is open"),
    "dispatch without begin": (Work.commands, dispatch, "dispatch: no encoder is open; expected begin"),
    "end without begin": (Work.commands, lambda c, w: c.end(), "end: no encoder is open; expected begin"),
    "wait before commit": (Work.commands, lambda c, w: c.wait(1), "wait: the command buffer has not been committed"),
    "block before commit": (Work.commands, lambda c, w: c.wait_until_completed(), "has not been committed"),
    "times before commit": (Work.commands, lambda c, w: c.times(), "times: the command buffer has not been committed"),
}


@pytest.mark.parametrize("case", ORDER)
def test_bad_order(device: Any, case: str):
    """A RuntimeError that says what was expected; the object stays usable."""
    work = Work(device)
    work.event = device.event()
    make, call, message = ORDER[case]
    commands = make(work)
    with pytest.raises(RuntimeError, match=message):
        call(commands, work)
    if make is begun:
        dispatch(commands, work)
        commands.end()
    if make is not committed:
        commands.commit()
    commands.wait(SOON)
    assert work.values() == {1}


def encode(work: Work, *arguments: Any) -> None:
    begun(work).dispatch(work.kernel, *arguments)


def bad(call: Callable[[Any, Work], Any], error: type[Exception], message: str) -> Any:
    return pytest.param(call, error, message)


@pytest.mark.parametrize(("call", "error", "message"), [
    bad(lambda d, w: d.buffer(0), ValueError, "nbytes is 0; expected 1 to"),
    bad(lambda d, w: d.buffer(-1), ValueError, "nbytes is -1; expected 1 to"),
    bad(lambda d, w: d.buffer(2**80), ValueError, "nbytes is 1208925819614629174706176; expected 1 to"),
    bad(lambda d, w: d.buffer(d.max_buffer_bytes + 1), ValueError, "expected 1 to"),
    bad(lambda d, w: d.buffer(1.5), TypeError, "float"),
    bad(lambda d, w: d.queue(0), ValueError, "limit is 0; expected 1 to 1024"),
    bad(lambda d, w: d.queue(limit="many"), TypeError, "str"),
    bad(lambda d, w: d.pipeline(b"text", "name"), TypeError, "str"),
    bad(lambda d, w: d.pipeline("\ud800", "name"), ValueError, "surrogates"),
    bad(lambda d, w: begun(w).dispatch(w.data, (), 1, 1), TypeError, "pipeline is .*; expected a MetalPipeline"),
    bad(lambda d, w: encode(w, [w.data], 1, 1), TypeError, "arguments is .*; expected a tuple of at most 31"),
    bad(lambda d, w: encode(w, (None,) * 32, 1, 1), TypeError, "expected a tuple of at most 31"),
    bad(lambda d, w: encode(w, (w.data, 3), 1, 1), TypeError, r"arguments\[1\] is 3; expected a MetalBuffer"),
    bad(lambda d, w: encode(w, (b"",), 1, 1), TypeError, r"arguments\[0\] is b''; expected"),
    bad(lambda d, w: encode(w, (b"x" * 4097,), 1, 1), TypeError, "1 to 4096 bytes"),
    bad(lambda d, w: encode(w, (), 0, 1), ValueError, "grid is 0; expected 1 to"),
    bad(lambda d, w: encode(w, (), (4, -4), 1), ValueError, "grid is -4; expected 1 to"),
    bad(lambda d, w: encode(w, (), (1, 1, 1, 1), 1), TypeError, "grid is .*; expected an int or a tuple of"),
    bad(lambda d, w: encode(w, (), 64, ()), TypeError, r"group is \(\); expected"),
    bad(lambda d, w: encode(w, (), 64, (64, 17)), ValueError, r"group is \(64, 17\); expected at most 1024"),
    bad(lambda d, w: encode(w, (), 64, (2**31, 2**31, 4)), ValueError, "expected at most 1024 threads"),
    bad(lambda d, w: encode(w, (), 64, 64, 0), ValueError, "count is 0; expected 1 to"),
    bad(lambda d, w: w.queue.commands().signal(d.event(), 0), ValueError, "value is 0; expected 1 to"),
    bad(lambda d, w: w.queue.commands().signal(w.data, 1), TypeError, "event is .*; expected a MetalEvent"),
    bad(lambda d, w: w.queue.commands().wait_for(None, 1), TypeError, "event is None; expected a MetalEvent"),
    bad(lambda d, w: setattr(d.event(), "value", -1), ValueError, "value is -1; expected 0 to"),
    bad(lambda d, w: delattr(d.event(), "value"), AttributeError, "deleted"),
    bad(lambda d, w: d.event().wait(2**64), ValueError, "value is 18446744073709551616"),
    bad(lambda d, w: committed(w).wait(-1), ValueError, "timeout is -1; expected seconds, 0 or more"),
    bad(lambda d, w: committed(w).wait(float("nan")), ValueError, "timeout is nan; expected"),
    bad(lambda d, w: committed(w).wait(float("inf")), ValueError, "timeout is inf; expected"),
    bad(lambda d, w: committed(w).wait("soon"), TypeError, "str|real"),
    bad(lambda d, w: type(d.itself)(), TypeError, "cannot create"),
    bad(lambda d, w: type("Mine", (type(d.itself),), {}), TypeError, "not an acceptable base type"),
    bad(lambda d, w: setattr(d.itself, "name", "x"), AttributeError, "name"),
    bad(lambda d, w: _C.MetalQueue.commands(d.itself), TypeError, "MetalQueue"),
])  # fmt: skip
def test_bad_arguments(device: Any, call: Any, error: type[Exception], message: str):
    work = Work(device)
    with pytest.raises(error, match=message):
        call(device, work)


@pytest.mark.parametrize(("fault", "call", "error", "message"), [
    ("no_queue", lambda d, w: d.queue(), RuntimeError, "Metal made no command queue"),
    ("no_buffer", lambda d, w: d.buffer(1000), MemoryError, "Metal has no buffer of 1000 bytes"),
    ("no_event", lambda d, w: d.event(), RuntimeError, "Metal made no shared event"),
    ("no_commands", lambda d, w: w.queue.commands(), RuntimeError, "Metal made no command buffer"),
    ("no_encoder", lambda d, w: w.queue.commands().begin(), RuntimeError, "Metal made no compute encoder"),
])  # fmt: skip
def test_nil(fake_metal: Any, device: Any, fault: str, call: Any, error: type[Exception], message: str):
    work = Work(device)
    with fake_metal.faults(**{fault: True}):
        for _ in range(70):  # more than a queue's limit: failed ones take no place
            with pytest.raises(error, match=message):
                call(device, work)


# ---------------------------------------------------------------- the stand-in sees mistakes


class Messages:
    """[object selector: ...] through the stand-in's own objc_msgSend."""

    def __init__(self) -> None:
        self.library = emulator.load()
        for name in ("objc_getClass", "sel_registerName", "objc_autoreleasePoolPush", "MTLCreateSystemDefaultDevice"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.library.objc_autoreleasePoolPop.argtypes = [ctypes.c_void_p]

    def send(self, receiver: int | None, selector: str, *arguments: Any) -> int | None:
        chosen = self.library.sel_registerName(selector.encode())
        types = [ctypes.c_char_p if isinstance(a, bytes) else ctypes.c_void_p for a in arguments]
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, *types)
        return prototype(("objc_msgSend", self.library))(receiver, chosen, *arguments)

    @contextlib.contextmanager
    def pool(self) -> Iterator[int]:
        token = self.library.objc_autoreleasePoolPush()
        yield token
        self.library.objc_autoreleasePoolPop(token)


def over_release(m: Messages, device: int, queue: int) -> None:
    text = m.send(m.send(m.library.objc_getClass(b"NSString"), "alloc"), "initWithUTF8String:", b"text")
    m.send(text, "release")
    m.send(text, "release")


def no_pool(m: Messages, device: int, queue: int) -> None:
    m.send(m.send(device, "name"), "release")


def pool_order(m: Messages, device: int, queue: int) -> None:
    outer = m.library.objc_autoreleasePoolPush()
    m.library.objc_autoreleasePoolPush()
    m.library.objc_autoreleasePoolPop(outer)


def closed_pool(m: Messages, device: int, queue: int) -> None:
    pool = m.library.objc_autoreleasePoolPush()
    m.library.objc_autoreleasePoolPop(pool)
    m.library.objc_autoreleasePoolPop(pool)


def buffer_then(*selectors: str) -> Callable[[Messages, int, int], None]:
    def run(m: Messages, device: int, queue: int) -> None:
        with m.pool():
            commands = m.send(queue, "commandBuffer")
            for selector in selectors:
                m.send(commands, selector, *([None] if selector.endswith(":") else []))

    return run


@pytest.mark.parametrize(("mistake", "message"), [
    (over_release, "release is sent to a freed NSString"),
    (no_pool, "NSString is autoreleased without a pool"),
    (pool_order, "closed while one that was opened after it is not"),
    (closed_pool, "a pool is closed that is not open"),
    (lambda m, d, q: m.send(d, "newShader"), "MTLDevice does not know the message newShader"),
    (lambda m, d, q: m.send(d, "dealloc"), "dealloc is sent to a MTLDevice"),
    (lambda m, d, q: m.send(d, "newLibraryWithSource:options:error:", d, None, None), "MTLDevice was passed; expected"),
    (buffer_then("computeCommandEncoder"), "an encoder is freed without endEncoding"),
    (buffer_then("computeCommandEncoder", "commit"), "commit is sent to a command buffer while an encoder is open"),
    (buffer_then("commit", "commit"), "commit is sent to a command buffer that has been committed"),
    (buffer_then("commit", "addCompletedHandler:"), "addCompletedHandler: after the commit"),
    (buffer_then("addCompletedHandler:"), "a handler is no block"),
    (buffer_then("waitUntilCompleted"), "waitUntilCompleted before the commit"),
])  # fmt: skip
def test_the_stand_in_reports(metal: Any, mistake: Any, message: str):
    m = Messages()
    device = m.library.MTLCreateSystemDefaultDevice()
    queue = m.send(device, "newCommandQueueWithMaxCommandBufferCount:", 8)
    mistake(m, device, queue)
    metal.settle()
    with pytest.raises(emulator.EmulatorError, match=message):
        emulator.synchronize()
    m.send(queue, "release")
    m.send(device, "release")
    assert metal.live() == ""


def test_the_stand_in_counts(metal: Any):
    m = Messages()
    device = m.library.MTLCreateSystemDefaultDevice()
    m.send(device, "retain")
    assert metal.live() == "MTLDevice (2)"
    m.send(device, "release")
    with m.pool():
        m.send(device, "name")
        assert metal.live() == "NSString (1) MTLDevice (1) 1 pools"
    m.send(device, "release")
    assert metal.live() == ""
    assert m.send(None, "release") is None
    with pytest.raises(ValueError, match="unknown \\['no_luck'\\]"), metal.faults(no_luck=True):
        pass
