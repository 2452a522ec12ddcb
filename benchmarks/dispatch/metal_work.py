"""A Metal kernel of about a millisecond whose result anyone can foretell, on queues of our own. Owns the work that
experiments 1 to 4 launch in different ways, and the check that every launch of it happened, once and in order.

Each thread applies x -> a x + c (modulo 2^32) `steps` times to its word. Any sequence of launches is such a map again,
so the host composes the maps as it encodes, and at the end compares every word. Maps with another c do not commute:
launches in the wrong order, twice or not at all change the result.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from metal_marlin import metal_queue

SOURCE = """#include <metal_stdlib>
using namespace metal;
kernel void advance(device uint* x [[buffer(0)]], constant uint& steps [[buffer(1)]],
                    constant uint& addend [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  uint v = x[i];
  for (uint k = 0; k < steps; k++) v = v * 1664525u + addend;
  x[i] = v;
}
"""
FACTOR = 1664525
ADDEND, OTHER_ADDEND = 1013904223, 12345
MODULUS = 2**32
GROUP = 256
TARGET_MS = 1.0  # of GPU time for one launch
MOST_STEPS = 2**31


class Map(NamedTuple):
    """x -> factor x + addend, modulo 2^32."""

    factor: int
    addend: int

    def then(self, after: Map) -> Map:
        """This one first, then the other."""
        return Map(self.factor * after.factor % MODULUS, (self.addend * after.factor + after.addend) % MODULUS)

    def times(self, count: int) -> Map:
        """`count` times in a row, by squaring."""
        result, square = IDENTITY, self
        while count:
            if count & 1:
                result = result.then(square)
            square, count = square.then(square), count >> 1
        return result


IDENTITY = Map(1, 0)


@dataclass
class Slot:
    """Memory that launches work on one after the other, and what should have become of it."""

    buffer: Any
    map: Map = IDENTITY

    def words(self) -> np.ndarray:
        return np.frombuffer(metal_queue.view(self.buffer), np.uint32)


class MetalWork:
    """A device, its kernel and memory. RuntimeError: no Metal device, or it refused something."""

    def __init__(self, timeout: float, slots: int = 1) -> None:
        self.device = metal_queue.open_device()
        self.emulated = self.device.emulated
        self.timeout = timeout
        self.threads = GROUP if self.emulated else 256 * GROUP
        self.kernel = self.device.pipeline(SOURCE, "advance")
        self.queue = self.device.queue()
        self.slots = [Slot(self.device.buffer(4 * self.threads)) for _ in range(slots)]
        for slot in self.slots:
            slot.words()[:] = self._first()
        self.steps = 3 if self.emulated else self._calibrate()

    def _first(self) -> np.ndarray:
        """What every word begins with: all different."""
        words: np.ndarray = np.arange(self.threads, dtype=np.uint32) * np.uint32(2654435761)
        return words

    def _calibrate(self) -> int:
        """Steps that take the GPU about TARGET_MS. It also gets the clocks up, and shows that the GPU answers."""
        self.steps = 256
        for _ in range(12):
            commands = self.encode()
            commands.commit()
            self.wait(commands)
            milliseconds = self.gpu_ms(commands)
            if 0.8 * TARGET_MS < milliseconds < 1.25 * TARGET_MS:
                break
            self.steps = min(max(1, int(self.steps * min(8.0, TARGET_MS / max(milliseconds, 1e-3)))), MOST_STEPS)
        return self.steps

    def launch(self, commands: Any, slot: int = 0, count: int = 1, addend: int = ADDEND, steps: int = 0) -> None:
        """Encodes `count` launches in an encoder of their own. steps: other than a millisecond's."""
        steps = steps or self.steps
        place = self.slots[slot]
        arguments = (place.buffer, struct.pack("I", steps), struct.pack("I", addend))
        commands.begin()
        commands.dispatch(self.kernel, arguments, self.threads, GROUP, count)
        commands.end()
        place.map = place.map.then(Map(FACTOR, addend).times(steps * count))

    def encode(self, slot: int = 0, encoders: int = 1, count: int = 1, steps: int = 0) -> Any:
        """A command buffer of so many encoders with so many launches each; not committed."""
        commands = self.queue.commands()
        for _ in range(encoders):
            self.launch(commands, slot, count, steps=steps)
        return commands

    def wait(self, commands: Any) -> None:
        """TimeoutError: the GPU does not answer."""
        commands.wait(self.timeout)

    def gpu_ms(self, commands: Any) -> float:
        """What the GPU says that a completed command buffer took."""
        times = commands.times()
        return float((times.gpu_end_ns - times.gpu_start_ns) / 1e6)

    def check(self) -> str:
        """The sentence for the report. AssertionError: a launch is missing, came twice or in the wrong order."""
        for index, slot in enumerate(self.slots):
            expected = self._first() * np.uint32(slot.map.factor) + np.uint32(slot.map.addend)
            wrong = np.flatnonzero(slot.words() != expected)
            assert not wrong.size, (
                f"buffer {index}: {wrong.size} of {self.threads} words are wrong, the first at {wrong[0]}:"
                f" {slot.words()[wrong[0]]}; expected {expected[wrong[0]]}"
            )
        return (
            f"After all launches every one of {len(self.slots) * self.threads:,} words has the value that the host"
            " computed: each launch ran once, in order."
        )

    def facts(self) -> dict[str, Any]:
        """What a reader needs to judge the figures."""
        return {"device": self.device.name, "threads": self.threads, "steps": self.steps}
