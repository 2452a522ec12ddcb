"""The parent's side of a worker: starting it, asking it with a deadline, and saying what happened if it dies or hangs.

Waiting workers must cost nothing, or a neighbour's spinning threads would be measured: OpenMP's threads are told to
sleep, and with `spin`, when they are left to their own defaults, a worker is stopped between its turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 180.0  # importing a large library from a cold disk
GRACE = 5.0


class Gone(Exception):
    """The worker died, hung or could not start; it won't answer any more. The message says which and its last words."""


class Failed(Exception):
    """The worker answered that this request failed; it goes on."""


class Missing(Exception):
    """The contender is not installed here; the message says what is missing."""


def environment(threads: int, spin: bool) -> dict[str, str]:
    """Of a worker: thread counts, and how waiting threads wait."""
    found = dict(os.environ)
    found.pop("METAL_MARLIN_CPU", None)  # a level is an option of the worker
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        found[name] = str(threads)
    found["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own: only weights are made with it
    for name, value in (("OMP_WAIT_POLICY", "passive"), ("KMP_BLOCKTIME", "0")):
        if spin:
            found.pop(name, None)
        else:
            found[name] = value
    return found


class Worker:
    """A process that runs benchmarks.cpu.worker, or any `command` that talks like it."""

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        *,
        python: str = "",
        command: list[str] | None = None,
    ) -> None:
        self.name, self.spin = name, bool(options.get("spin"))
        self.words = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self.rest = b""
        self.gone = ""
        self.facts: dict[str, str] = {}
        command = command or [python or sys.executable, "-m", "benchmarks.cpu.worker", json.dumps(options)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.words,
                cwd=ROOT,
                env=environment(int(options.get("threads", 1)), self.spin),
            )
        except OSError as error:
            self.words.close()
            raise Gone(f"{command[0]} does not start: {error.strerror}") from None

    def greet(self, seconds: float = START_SECONDS) -> None:
        """Waits for the first line. Missing: the library isn't there. Gone: the worker isn't."""
        message = self._receive(seconds, "to start")
        if "absent" in message:
            self.close()
            raise Missing(str(message["absent"]))
        self.facts = message["ok"]
        self._pause()

    def ask(self, do: str, within: float, **arguments: Any) -> Any:
        """The answer. Failed: it was an error. Gone: there was none in time; the worker is killed then."""
        self.send(do, **arguments)
        return self.receive(do, within)

    def send(self, do: str, **arguments: Any) -> None:
        """Hands over a request without waiting."""
        if self.gone:
            raise Gone(self.gone)
        self._go_on()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._lost(f"died before '{do}'") from None

    def receive(self, do: str, seconds: float) -> Any:
        """The answer to what was sent."""
        message = self._receive(seconds, f"to '{do}'")
        self._pause()
        if "error" in message:
            raise Failed(str(message["error"]))
        return message["ok"]

    def close(self) -> None:
        """Ends the worker: its input ends, and if that is not enough it is killed."""
        self._go_on()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if not self.words.closed:
            self.words.close()
        self.gone = self.gone or "was closed"

    def _receive(self, seconds: float, what: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise self._lost(f"did not answer {what} within {seconds:g} s and was stopped")
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._lost(f"died when asked {what}")
                self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            message: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise self._lost(f"answered {line[:60]!r} when asked {what}") from None
        return message

    def _lost(self, what: str) -> Gone:
        """Kills it, and puts how it ended and its last words into the message."""
        self.process.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5 if "died" in what else 0)
        status = self.process.returncode
        if status is None:
            self.process.kill()
            self.process.wait()
        elif status < 0:
            what += f" ({signal.Signals(-status).name})"
        else:
            what += f" (exit status {status})"
        self.words.seek(0)
        said = self.words.read().decode(errors="replace").strip().splitlines()
        self.gone = what + (f": {said[-1].strip()[:200]}" if said else "")
        self.close()
        return Gone(self.gone)

    def _pause(self) -> None:
        if self.spin and hasattr(signal, "SIGSTOP"):
            self.process.send_signal(signal.SIGSTOP)

    def _go_on(self) -> None:
        if self.spin and hasattr(signal, "SIGCONT"):
            self.process.send_signal(signal.SIGCONT)
