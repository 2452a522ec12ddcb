"""`selftest`: runs every op and kernel of this version on this machine, compares the results, and writes a report.

The reference is the CPU backend's portable level, `scalar`. Everything else that this machine has is compared with it:
the other SIMD levels and, on a Mac, the Metal kernels. What is run is in selftest_cases.py and selftest_checks.py; this
file owns how: targets, timing, one failure not stopping the rest, the table and the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from metal_marlin import _C, cli_info
from metal_marlin.mps import mps_problem
from metal_marlin.selftest_cases import AMOUNTS, OPS, Case, Rounding, Sizes, cases_of, moved
from metal_marlin.selftest_checks import CHECKS, Check, Results, compare, same_bits

REFERENCE = "scalar"
CHECKS_GROUP = "checks"
MOST_TEXT = 2000  # of a compiler's message
ENVIRONMENT = ("METAL_MARLIN_CPU", "PYTORCH_MPS_FAST_MATH", "PYTORCH_ENABLE_MPS_FALLBACK", "MTL_DEBUG_LAYER")


# ---- what is tested ----


@dataclass(frozen=True)
class Target:
    """A backend. `run` calls, waits until the work is done, and gives the results as CPU tensors."""

    name: str
    run: Callable[[Callable[[], Results]], Results]
    device: str = "cpu"
    metal: bool = False  # whether Metal kernels do the work
    rounding: Rounding = Rounding.EXACT

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def takes(self, check: Check) -> bool:
        return check.needs == "cpu" or (check.needs == "gpu" and self.metal) or check.needs == self.device


def cpu_target(level: str) -> Target:
    def run(call: Callable[[], Results]) -> Results:
        before = _C.cpu_level()
        _C.set_cpu_level(level)
        try:
            return call()
        finally:
            _C.set_cpu_level(before)

    least = min((limit for limit in _C.cpu_input_limits()[level].values() if limit), default=0)
    kinds = {0: Rounding.EXACT, 2**15 - 1: Rounding.UNROUNDED, 2**7 - 1: Rounding.BYTES}
    return Target(f"cpu {level}", run, rounding=kinds[least])


def mps_target() -> Target:
    def run(call: Callable[[], Results]) -> Results:
        results = call()
        torch.mps.synchronize()
        return tuple(result.cpu() for result in results)

    return Target("mps", run, device="mps", metal=True, rounding=Rounding.UNROUNDED_DECODE)


def targets_here() -> list[Target]:
    """What this machine has besides the reference; the reference itself if that is all, so that at least it runs."""
    levels = [cpu_target(level) for level in _C.cpu_levels() if level != REFERENCE]
    gpu = [] if mps_problem() else [mps_target()]
    return levels + gpu or [cpu_target(REFERENCE)]


# ---- running it ----


@dataclass
class Result:
    """One case or check on one target."""

    target: str
    group: str  # the op, or "checks"
    name: str
    problem: str | None = None
    first_ms: float | None = None  # with compiling
    second_ms: float | None = None
    worst: float | None = None  # the largest error, in units of what is allowed
    log: str = ""  # what came on standard error, such as a compiler's message


class Log:
    """What was written to standard error, by C code too."""

    text = ""


@contextlib.contextmanager
def captured() -> Iterator[Log]:
    """torch prints the Metal compiler's messages from C: this is where they end up in a report."""
    log, sys_stderr = Log(), sys.stderr
    sys_stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            sys_stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            log.text = file.read().decode(errors="replace").strip()[:MOST_TEXT]


def first_line(error: BaseException) -> str:
    """Without the C++ frames that torch appends, which name folders."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def timed(target: Target, call: Callable[[], Results]) -> tuple[Results, float]:
    began = time.perf_counter()
    results = target.run(call)
    return results, 1e3 * (time.perf_counter() - began)


def run_case(case: Case, targets: Sequence[Target], sizes: Sizes) -> list[Result]:
    """The case on every target, each twice: the first call compiles, and the second must give the same bits."""
    found = [Result(target.name, case.op.name, case.name) for target in targets]
    try:
        prepared = case.prepare(sizes)
        want = cpu_target(REFERENCE).run(lambda: prepared.call(prepared.inputs))
        bounds = {rounding: prepared.bounds(want, rounding) for rounding in Rounding}
    except Exception as error:
        for result in found:
            result.problem = f"the reference failed: {first_line(error)}"
        return found
    for target, result in zip(targets, found, strict=True):
        with captured() as log:
            try:
                inputs = moved(prepared.inputs, target.put)
                first, result.first_ms = timed(target, lambda inputs=inputs: prepared.call(inputs))  # type: ignore[misc]
                second, result.second_ms = timed(target, lambda inputs=inputs: prepared.call(inputs))  # type: ignore[misc]
            except Exception as error:
                result.problem = first_line(error)
                first = second = ()
        result.log = log.text
        if result.problem is None:
            allowed = bounds[target.rounding]
            compared = [compare(*parts) for parts in zip(prepared.outputs, first, want, allowed, strict=True)]
            result.worst = max(worst for _, worst in compared)
            result.problem = next((problem for problem, _ in compared if problem), None)
        if result.problem is None:
            unsteady = [n for n, a, b in zip(prepared.outputs, first, second, strict=True) if not same_bits(a, b)]
            if unsteady:
                result.problem = f"{', '.join(unsteady)}: the second call gave other bits than the first"
    return found


def run_check(check: Check, targets: Sequence[Target], sizes: Sizes) -> list[Result]:
    found = []
    for target in targets:
        if not target.takes(check):
            continue
        result = Result(target.name, CHECKS_GROUP, check.name)
        with captured() as log:
            began = time.perf_counter()
            try:
                result.problem = check.function(target, cpu_target(REFERENCE), sizes)
            except Exception as error:
                result.problem = first_line(error)
            result.first_ms = 1e3 * (time.perf_counter() - began)
        result.log = log.text
        found.append(result)
    return found


# ---- what is reported ----


@dataclass
class Report:
    environment: dict[str, Any]
    amount: str
    targets: list[str]
    gpu_problem: str | None  # why no Metal kernel ran, None: they did
    plan: dict[str, dict[str, int]]
    only: str | None = None
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.problem is not None]


def output_of(*command: str) -> str | None:
    """What a program of the system prints, None if it can't be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def commit() -> str | None:
    """Of the clone that this package lies in, None if it is installed. "-dirty": files have been changed since."""
    root = Path(__file__).resolve().parent.parent
    return output_of("git", "-C", str(root), "describe", "--always", "--dirty") if (root / ".git").exists() else None


def machine() -> dict[str, Any]:
    """The chip, and on a Mac the GPU's cores and the memory."""
    if platform.system() != "Darwin":
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        return {"chip": model[1] if model else platform.processor() or platform.machine(), "macos": None}
    memory = output_of("sysctl", "-n", "hw.memsize")
    cores = re.search(r'"gpu-core-count" = (\d+)', output_of("ioreg", "-rc", "AGXAccelerator", "-d1") or "")
    return {
        "chip": output_of("sysctl", "-n", "machdep.cpu.brand_string"),
        "macos": platform.mac_ver()[0],
        "gpu_cores": int(cores[1]) if cores else None,
        "memory_gib": int(memory) / 2**30 if memory and memory.isdigit() else None,
    }


def environment() -> dict[str, Any]:
    facts = cli_info.facts()
    kept = ("metal_marlin", "python", "system", "torch", "transformers", "cpu", "mps")
    return {
        **{name: facts[name] for name in kept},
        "commit": commit(),
        "torch_commit": getattr(torch.version, "git_version", None),
        **machine(),
        "variables": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def milliseconds(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "-"


HEADINGS = ("what", "target", "runs", "failed", "worst error", "first call, ms", "second, ms")


def summary(report: Report) -> list[tuple[str, ...]]:
    """A row for every op and target; errors in units of what is allowed, times as medians."""
    rows: list[tuple[str, ...]] = []
    groups = dict.fromkeys((result.group, result.target) for result in report.results)
    for group, target in groups:
        own = [r for r in report.results if (r.group, r.target) == (group, target)]
        worst = [r.worst for r in own if r.worst is not None]
        first, second = ([t for r in own if (t := getattr(r, n)) is not None] for n in ("first_ms", "second_ms"))
        failed = sum(r.problem is not None for r in own)
        shown = f"{max(worst):.2f}" if worst else "-"
        rows.append((group, target, str(len(own)), str(failed), shown, milliseconds(first), milliseconds(second)))
    return rows


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    table = [HEADINGS, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]

    def line(row: tuple[str, ...]) -> str:
        names = [row[i].ljust(widths[i]) for i in range(2)]
        return "  ".join([*names, *(row[i].rjust(widths[i]) for i in range(2, len(row)))])

    return [line(row) for row in table]


def verdict(report: Report) -> list[str]:
    """What a reader wants to know first."""
    failed = len(report.failures)
    lines = [f"{failed} of {len(report.results)} runs FAILED" if failed else f"all {len(report.results)} runs agree"]
    if report.gpu_problem:
        lines.append(f"the GPU part did NOT run: {report.gpu_problem}")
    if report.targets == [f"cpu {REFERENCE}"]:
        lines.append(f"this machine has the {REFERENCE} level only: it ran, with nothing else to compare it with")
    return lines


def variants(report: Report) -> list[str]:
    return [
        f"{name}: {counts['variants']:,} kernel variants; {counts['cases']} combinations of them in this run"
        for name, counts in report.plan.items()
    ]


def failures(report: Report, most: int | None = None) -> list[str]:
    lines = []
    for result in report.failures[:most]:
        lines.append(f"{result.target}, {result.name}: {result.problem}")
        if result.log:
            lines += [f"    {line}" for line in result.log.splitlines()]
    if most is not None and len(report.failures) > most:
        lines.append(f"... and {len(report.failures) - most} more, in the report")
    return lines


def markdown(report: Report) -> str:
    env = report.environment
    facts = [
        ("chip", ", ".join(str(env[n]) for n in ("chip", "gpu_cores", "memory_gib") if env.get(n))),
        ("system", f"{env['system']}, macOS {env['macos']}" if env.get("macos") else env["system"]),
        ("metal_marlin", f"{env['metal_marlin']}, commit {env['commit'] or 'unknown'}"),
        ("torch", f"{env['torch']} ({env['torch_commit']})"),
        ("Python", env["python"]),
        ("SIMD levels", f"{', '.join(env['cpu']['levels'])}; {env['cpu']['level']} is in use"),
        ("MPS", "active" if env["mps"]["active"] else f"not active: {env['mps']['reason']}"),
        ("variables", ", ".join(f"{k}={v}" for k, v in env["variables"].items()) or "none"),
        ("amount", report.amount + (f", only what has {report.only!r} in its name" if report.only else "")),
        ("time", f"{report.seconds:.0f} s"),
    ]
    head = ["# metal_marlin selftest", "", *(f"**{line}**  " for line in verdict(report)), ""]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts), ""]
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *summary(report)]
    results = ["## Results", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    notes = [
        "Worst error is in units of what is allowed (1 fails); times are medians; the first call compiles the kernel.",
        "",
        *(f"- {line}" for line in variants(report)),
        "",
    ]
    wrong = ["## Failures", "", "```", *failures(report), "```", ""] if report.failures else []
    data = ["## Everything", "", "```json", json.dumps(as_json(report), indent=1), "```", ""]
    return "\n".join([*head, *table, *results, *notes, *wrong, *data])


def as_json(report: Report) -> dict[str, Any]:
    fields = asdict(report)
    fields["results"] = [{k: v for k, v in result.items() if v not in (None, "")} for result in fields["results"]]
    for result in fields["results"]:
        if result.get("worst") == float("inf"):
            result["worst"] = "infinite"  # JSON has no such number
    return {"failed": len(report.failures), "gpu_ran": report.gpu_problem is None, **fields}


def unfinished(report: Report, now: str) -> str:
    """What the report says if the process dies: a GPU's fault can end it without an exception."""
    env = json.dumps(report.environment, indent=1)
    done = f"{len(report.results)} runs before it, {len(report.failures)} of them failed"
    lines = ["# metal_marlin selftest", "", "**did not finish**", "", f"was at: {now} ({done})", ""]
    return "\n".join([*lines, *failures(report), "", "```json", env, "```", ""])


# ---- the whole run ----


def selftest_report(
    targets: Sequence[Target],
    amount: str,
    *,
    sizes: Sizes | None = None,
    only: str | None = None,
    file: Path | None = None,
    progress: bool = True,
) -> Report:
    """Runs the cases of `amount` (a key of AMOUNTS) and the checks on every target. `only`: names that contain it."""
    sizes = sizes or Sizes()
    wanted = [case for case in cases_of(amount) if not only or only in case.name]
    checks = [check for check in CHECKS if not only or only in check.name]
    if not wanted and not checks:
        raise ValueError(f"--only is {only!r}; expected a part of a name as the report spells it, such as 'rows 8'")
    plan = {op.name: {"variants": op.variants, "cases": sum(c.op is op for c in wanted)} for op in OPS}
    gpu = None if any(target.metal for target in targets) else mps_problem() or "no target with Metal kernels was given"
    report = Report(environment(), amount, [target.name for target in targets], gpu, plan, only)
    began = time.perf_counter()
    parts: list[Case | Check] = [*wanted, *checks]
    with tqdm(total=len(parts), unit="run", disable=None if progress else True) as bar:
        for part in parts:
            bar.set_postfix_str(f"{len(report.failures)} failed")
            if file is not None:
                file.write_text(unfinished(report, part.name), encoding="utf-8")
            if isinstance(part, Case):
                report.results += run_case(part, targets, sizes)
            else:
                report.results += run_check(part, targets, sizes)
            bar.update()
    report.seconds = time.perf_counter() - began
    if file is not None:
        file.write_text(markdown(report), encoding="utf-8")
    return report


def selftest(arguments: argparse.Namespace) -> int:
    """`selftest`: 0 if everything that ran agrees, 1 if not."""
    amounts = list(AMOUNTS)  # from few to all
    amount = amounts[0] if arguments.quick else amounts[2] if arguments.all else amounts[1]
    file = Path(arguments.report)
    if not arguments.json:
        gpu = mps_problem()
        print(f"Apple GPU: {'active' if gpu is None else f'not active: {gpu}'}", flush=True)
    report = selftest_report(targets_here(), amount, only=arguments.only, file=file, progress=not arguments.json)
    if arguments.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        print("", *variants(report), "", *aligned(summary(report)), "", *failures(report, 10), sep="\n")
        print(*verdict(report), f"report: {file}", sep="\n")
    return 1 if report.failures else 0
