"""What a contender is: a library that computes the layers, in one process, in one or several quantized forms.

Owns the calling convention between worker.py and the modules that wrap a library (ours.py, ggml.py, ...). Needs NumPy
only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.cpu.shapes import Array, Inputs, Shape, reference


class Absent(Exception):
    """The library is not here or can't be used; the message says why in a line."""


@dataclass(frozen=True)
class Options:
    """What a worker is started with. threads: of the library's own pool. spin: waiting threads may burn time, as the
    library's default has it. level: ours, a SIMD level. library: a path, of those that are loaded from one."""

    threads: int = 1
    spin: bool = False
    level: str = ""
    library: str = ""


@dataclass(frozen=True)
class Variant:
    """One form of the weights. bits: per weight with its scales, as stored. limit: of the relative error that a result
    may have, to be taken for the layer at all. family: what variants of one kind share, such as a codebook."""

    name: str
    bits: float
    limit: float
    family: str = ""


def limit_of(bits: float) -> float:
    """A quantizer's error halves with every bit; whole ones count, the rest is scales. 2 bits come out at 0.4 to 0.7, a
    wrong layout at 1.4."""
    return max(min(4 * 2.0 ** -int(bits), 0.95), 0.02)


class Work(ABC):
    """A layer in one variant, `copies` times with weights at different addresses, so that a call finds none in a cache.

    load() sets the inputs and goes on to the next copy; only run() is timed. One run makes `calls` calls of the layer.
    """

    copies = 1
    calls = 1
    matrix_bytes = 0.0  # of one expert, or of the layer where there are none

    @abstractmethod
    def load(self, given: Inputs) -> None:
        """Converts and places the inputs."""

    @abstractmethod
    def run(self) -> None:
        """The call; finished when it returns."""

    @abstractmethod
    def result(self) -> Array:
        """What the last run computed, as shapes.reference has it."""

    def expected(self, shape: Shape, given: Inputs, weights: tuple[Array, ...]) -> Array:
        """What result() is held against: the layer with the weights that it was made from."""
        return reference(shape, given, weights)

    def close(self) -> None:  # noqa: B027  (most have nothing to do)
        """Frees what Python's own counting doesn't."""


class Contender(ABC):
    """One library in this process. The constructor raises Absent if it can't be used."""

    @abstractmethod
    def __init__(self, options: Options) -> None: ...

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Versions and settings, for the report."""

    @abstractmethod
    def variants(self, op: str) -> list[Variant]:
        """What it offers for this op, [] if nothing."""

    @abstractmethod
    def bytes_needed(self, shape: Shape, variant: str, cold_bytes: int) -> int:
        """Memory that build() will take, what variants share left out."""

    def needs(self, shape: Shape, variants: list[str], cold_bytes: int) -> dict[str, int]:
        """bytes_needed of each, if these and no others are built: some use what another one has built."""
        return {name: self.bytes_needed(shape, name, cold_bytes) for name in variants}

    def shared_bytes(self, shape: Shape, variants: list[str], cold_bytes: int) -> int:
        """Memory that these variants share."""
        return 0

    @abstractmethod
    def build(self, shape: Shape, variant: str, cold_bytes: int, weights: tuple[Array, ...] | None) -> Work:
        """The layer, from `weights` if given, else from random ones, in copies of at least cold_bytes altogether. Of
        several variants the one with most bits comes first."""

    def drop(self) -> None:  # noqa: B027
        """Called when all of its works have been closed: frees what they shared."""


def copies_for(layer_bytes: float, cold_bytes: int, most: int = 4096) -> int:
    """How many copies of a layer make cold_bytes."""
    return int(max(1, min(most, -(-cold_bytes // max(1, int(layer_bytes))))))
