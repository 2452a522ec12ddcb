"""One contender in a process of its own: python -m benchmarks.cpu.worker '{"name": "torch", "threads": 2}'.

Requests are lines of JSON on standard input, each answered by one line: {"ok": ...}, or {"error": "..."} after which it
goes on. Between requests it sleeps in a read. Answers go to what standard output was when it started; what libraries
print goes to standard error. Needs NumPy and the contender's own library, and ends when its input does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.cpu.contender import Absent, Contender, Options, Variant, Work
from benchmarks.cpu.roster import ENTRIES
from benchmarks.cpu.shapes import CHECK_TOKENS, CHECKS, SHAPES, Shape, check_weights, inputs, relative_error

LONG = 1.0  # seconds of a call, beyond which none is spent on warming up
MOST_CALLS = 50  # in one turn
MOST_INPUTS = 8  # made for one turn; a call after the last takes the first again, with another copy of the weights


def delayed() -> float:
    """Seconds that this process's threads were ready to run and had no processor; 0 where the system doesn't tell."""
    total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[1])
    return total * 1e-9


def touched_bytes(shape: Shape, work: Work, ids: Any) -> float:
    """Bytes of weights that a call has to read: those of the experts that occur."""
    return work.matrix_bytes * (len(set(ids.ravel().tolist())) if shape.op == "moe" else 1)


class Session:
    """The contender and what has been built of it. Every public method is a request."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.works: dict[str, Work] = {}
        self.typical: dict[tuple[str, int], float] = {}  # seconds of a call in the last turn
        self.shape: Shape | None = None

    def variants(self, op: str) -> list[dict[str, Any]]:
        """What the contender offers for the op."""
        return [dataclasses.asdict(variant) for variant in self.contender.variants(op)]

    def needs(self, shape: str, variants: list[str], cold_bytes: int) -> dict[str, Any]:
        """Memory: of each variant, and of what they share."""
        return {
            "each": self.contender.needs(SHAPES[shape], variants, cold_bytes),
            "shared": self.contender.shared_bytes(SHAPES[shape], variants, cold_bytes),
        }

    def check(self, op: str, variants: list[str]) -> dict[str, Any]:
        """Relative errors of the small layer, the largest over the token counts; for a variant that raises, why."""
        shape = CHECKS[op]
        weights = check_weights(shape)
        found: dict[str, Any] = {}
        for variant in self.ordered(op, variants):
            work = None
            try:
                work = self.contender.build(shape, variant.name, 0, weights)
                errors = []
                for tokens in CHECK_TOKENS:
                    given = inputs(shape, tokens, (5, tokens))
                    work.load(given)
                    work.run()
                    errors.append(relative_error(work.result(), work.expected(shape, given, weights)))
                found[variant.name] = {"error": max(errors), "limit": variant.limit}
            except Exception as error:
                found[variant.name] = {"failed": f"{type(error).__name__}: {error}"}
            finally:
                if work is not None:
                    work.close()
        del work
        self.contender.drop()
        gc.collect()
        return found

    def ordered(self, op: str, names: list[str]) -> list[Variant]:
        """Those variants, the one with most bits first."""
        return sorted((v for v in self.contender.variants(op) if v.name in names), key=lambda v: -v.bits)

    def build(self, shape: str, variants: list[str], cold_bytes: int) -> dict[str, Any]:
        """Builds the layers of that shape; what was built before is dropped."""
        self.drop()
        self.shape = SHAPES[shape]
        found: dict[str, Any] = {}
        for variant in self.ordered(self.shape.op, variants):
            try:
                work = self.contender.build(self.shape, variant.name, cold_bytes, None)
            except Exception as error:
                found[variant.name] = {"failed": f"{type(error).__name__}: {error}"}
                continue
            self.works[variant.name] = work
            bits = 8 * work.matrix_bytes / self.shape.matrix_weights
            found[variant.name] = {"copies": work.copies, "bits": bits}
        return found

    def turn(self, variant: str, tokens: int, seed: list[int], seconds: float, warm: bool) -> dict[str, Any]:
        """Calls for about `seconds`, at least one, each on another copy with another routing; `warm`: one that does not
        count comes first, since after another process's turn caches of code and pages are cold as well. Inputs are made
        before: calls follow each other as a model's ops do, before a pool's threads have fallen asleep for long."""
        work, shape = self.works[variant], self.shape
        assert shape is not None
        times: list[float] = []
        read = 0.0
        wanted = 2 + int(seconds / self.typical.get((variant, tokens), seconds))
        made = [inputs(shape, tokens, (*seed, i)) for i in range(min(wanted, MOST_INPUTS))]
        touched = [touched_bytes(shape, work, given.ids) for given in made]
        waited = delayed()
        began = time.perf_counter()
        count = 0
        while len(times) < MOST_CALLS:
            work.load(made[count % len(made)])
            start = time.perf_counter()
            work.run()
            spent = time.perf_counter() - start
            count += 1
            if warm and count == 1 and spent < LONG:
                continue
            times.append(spent / work.calls)
            read += touched[(count - 1) % len(made)]
            if time.perf_counter() - began >= seconds:
                break
        whole = time.perf_counter() - began
        self.typical[variant, tokens] = whole / count
        return {"seconds": times, "bytes": read / len(times), "delayed": (delayed() - waited) / whole}

    def drop(self) -> None:
        """Frees what was built."""
        for work in self.works.values():
            work.close()
        self.works.clear()
        self.contender.drop()
        gc.collect()


def serve(requests: TextIO, answer: Callable[[dict[str, Any]], None], session: Session) -> None:
    """Answers until the input ends. A request is {"do": name of a method, ...its arguments}."""
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        try:
            result = getattr(session, request.pop("do"))(**request)
            answer({"ok": result})
        except Exception as error:  # the parent reports it and goes on without this result
            answer({"error": f"{type(error).__name__}: {error}"})


def main() -> int:
    """The exit status."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not print into our answers

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    options = json.loads(sys.argv[1])
    entry = ENTRIES[options.pop("name")]
    try:
        contender = entry.make(Options(**options))
    except Absent as absent:
        answer({"absent": str(absent)})
        return 0
    answer({"ok": contender.facts()})
    with contextlib.suppress(KeyboardInterrupt):  # the parent is interrupted as well, and says so
        serve(sys.stdin, answer, Session(contender))
    return 0


if __name__ == "__main__":
    sys.exit(main())
