"""The self-test: that it covers what it says, finds seeded faults, and says clearly what it did not run.

Where there is an emulator of the MPS backend, its Metal part runs in that; elsewhere a CPU target stands in for it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import metal_marlin._C as _C
from metal_marlin import mps, ops, selftest
from metal_marlin.__main__ import main
from metal_marlin.selftest_cases import AMOUNTS, DECODE_ROWS, DTYPES, FORMATS, MIXED, OPS, Rounding, Sizes, cases_of
from metal_marlin.selftest_checks import CHECKS, Check, compare

ROOT = Path(__file__).resolve().parent.parent
SMALL = Sizes(200, 130, 64)
LINEAR = next(op for op in OPS if op.name == "trellis_linear")
ONE = "trellis_linear: rows 8, format mcg-2, dtype float32, bias yes"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """python -m metal_marlin selftest ... in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "metal_marlin", "selftest", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def stand_in(during: Callable[[Callable], tuple] | None = None) -> selftest.Target:
    """A target that counts as Metal but is the CPU; `during` may interfere with its calls."""
    return selftest.Target("stand-in", during or (lambda call: call()), metal=True, rounding=Rounding.UNROUNDED_DECODE)


def one_case(name: str = ONE):
    return next(case for case in cases_of("every combination") if case.name == name)


# ---------------------------------------------------------------- what is covered


def test_axes_come_from_the_extension():
    axes = {op.name: op.axes for op in OPS}
    assert set(FORMATS) == {(codebook, rate2) for codebook in _C.CODEBOOKS for rate2 in _C.RATES2[codebook]}
    assert axes["moe_trellis_swiglu"]["activation"] == _C.ACTIVATIONS
    assert axes["moe_trellis_swiglu"]["format"] == (*FORMATS, MIXED)
    assert axes["router"]["kind"] == _C.ROUTERS
    forward = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("metal_marlin::")
    }
    without_kernels = {"grouped_mm", "grouped_mm_backward", "sharded_inputs", "sharded_sum"}  # made of torch's own ops
    without_kernels |= {"mapped_window"}  # makes a tensor, computes nothing: test_mps_mapped.py
    on_cpus_alone = {"trellis_quantize"}
    forward = {name for name in forward - without_kernels - on_cpus_alone if not name.endswith("_backward")}
    assert forward == {*axes, "dispatch_kernel"}, "an op that the self-test does not run"


def test_row_variants_are_the_kernels():
    text = (ROOT / "csrc" / "shared" / "kernels.h").read_text()
    most = int(re.search(r"#define MM_DECODE_ROWS (\d+)", text)[1])
    assert tuple(2**i for i in range(most.bit_length())) == DECODE_ROWS
    assert DECODE_ROWS[-1] == most


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_value_and_every_pair(op):
    once = list(AMOUNTS["every value"](op.axes))
    assert all({case[name] for case in once} == set(values) for name, values in op.axes.items())
    pairs = list(AMOUNTS["every pair of values"](op.axes))
    for a, b in itertools.combinations(op.axes, 2):
        assert {(case[a], case[b]) for case in pairs} == set(itertools.product(op.axes[a], op.axes[b])), (a, b)
    two_largest = sorted(map(len, op.axes.values()))[-2:]
    assert len(pairs) <= 1.25 * two_largest[0] * two_largest[1]


def test_variants_are_counted_without_what_is_not_compiled():
    counts = {op.name: op.variants for op in OPS}
    assert counts["trellis_linear"] == (len(DECODE_ROWS) + 1) * len(FORMATS) * len(DTYPES) * 2
    assert counts["router"] == len(_C.ROUTERS) * len(DTYPES) ** 2 * (1 + len(DTYPES)) * 2


def test_names_are_unique_and_inputs_depend_on_them_only():
    cases = cases_of("every pair of values")
    assert len({case.name for case in cases}) == len(cases)
    first, again = (one_case().prepare(SMALL).inputs for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---------------------------------------------------------------- faults


def test_compare():
    want = torch.tensor([[1.0, float("nan"), 3.0]])
    bound = torch.full((1, 3), 0.1)
    assert compare("y", want.clone(), want, bound) == (None, 0.0)
    problem, worst = compare("y", torch.tensor([[1.0, float("nan"), 3.2]]), want, bound)
    assert problem == "y: 1 of 3 values are off; the worst at [0, 2]: got 3.2, expected 3 +- 0.1"
    assert worst == pytest.approx(2, rel=1e-3)
    assert "[0, 1]: got 2, expected nan" in compare("y", torch.tensor([[1.0, 2.0, 3.0]]), want, bound)[0]
    assert "got nan, expected 3" in compare("y", torch.tensor([[1.0, float("nan"), float("nan")]]), want, bound)[0]
    assert compare("y", want.half(), want, bound)[0].startswith("y: got torch.float16 [1, 3]; expected torch.float32")
    assert compare("y", torch.ones(2), torch.ones(2), torch.zeros(2)) == (None, 0.0)
    assert compare("y", torch.ones(2), torch.zeros(2), torch.zeros(2))[1] == float("inf")
    assert compare("y", torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3)) == (None, 0.0)


def wrong_value(y: torch.Tensor, turn: int) -> torch.Tensor:
    return torch.where(torch.arange(y.shape[-1]) == 7, y + 1e-3, y)


def not_a_number(y: torch.Tensor, turn: int) -> torch.Tensor:
    return torch.where(torch.arange(y.shape[-1]) == 7, float("nan"), y)


def wrong_shape(y: torch.Tensor, turn: int) -> torch.Tensor:
    return y[:, 1:]


def wrong_rows(y: torch.Tensor, turn: int) -> torch.Tensor:
    return y.flip(0)


def unsteady(y: torch.Tensor, turn: int) -> torch.Tensor:
    return y * (1 + turn * 2**-23)


def refused(y: torch.Tensor, turn: int) -> torch.Tensor:
    os.write(2, b"program_source:3:1: error: a compiler's message\n")
    raise RuntimeError("the Metal compiler refused the shader\nframe 0: a folder")


FAULTS = {
    wrong_value: "values are off; the worst at",
    not_a_number: "got nan, expected",
    wrong_shape: "y: got torch.float32 [",
    wrong_rows: "values are off; the worst at",
    unsteady: "y: the second call gave other bits than the first",
    refused: "RuntimeError: the Metal compiler refused the shader",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_reported(fault, monkeypatch, tmp_path, capsys):
    """An op that goes wrong on one target: exit status 1, the case named in table and report, the other target fine."""
    right, turns = ops.trellis_linear, itertools.count()
    turn: list[int] = []  # while the stand-in runs: 0 at its first call, 1 at its second

    def op(*args: object, **options: object) -> torch.Tensor:
        y = right(*args, **options)
        return fault(y, turn[0]) if turn else y

    def during(call: Callable) -> tuple:
        turn[:] = [next(turns)]
        try:
            return call()
        finally:
            turn.clear()

    monkeypatch.setattr(ops, "trellis_linear", op)
    monkeypatch.setattr(selftest, "targets_here", lambda: [selftest.cpu_target("scalar"), stand_in(during)])
    file = tmp_path / "report.md"
    assert main(["selftest", "--all", "--only", ONE, "--report", str(file)]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 runs FAILED" in text
    assert f"stand-in, {ONE}: " in text
    assert FAULTS[fault] in text
    report = file.read_text()
    assert "**1 of 2 runs FAILED**" in report
    assert FAULTS[fault] in report
    assert "frame 0" not in report
    assert ("a compiler's message" in report) == (fault is refused)
    found = json.loads(report.split("```json\n")[1].split("\n```")[0])
    assert [result["target"] for result in found["results"] if "problem" in result] == ["stand-in"]


@pytest.mark.parametrize("form", ["mul1-1", "mcg-4", "3inst-8"])
def test_one_wrong_weight_is_found(form):
    """A changed bit of one tile moves float32 results by more than is allowed."""
    case = one_case(f"trellis_linear: rows 4, format {form}, dtype float32, bias no")
    prepared = case.prepare(Sizes())
    want = prepared.call(prepared.inputs)
    x, trellis, *rest = prepared.inputs
    trellis = trellis.clone()
    trellis.view(-1)[1234] ^= 1 << 9
    problem, worst = compare(
        "y", prepared.call((x, trellis, *rest))[0], want[0], prepared.bounds(want, Rounding.EXACT)[0]
    )
    assert problem
    assert worst > 10


def test_a_failing_check_is_reported(monkeypatch):
    def fails(backend: object, reference: object, sizes: Sizes) -> str | None:
        raise RuntimeError("something else")

    checks = [Check("that says what is wrong", "cpu", lambda *_: "what is wrong"), Check("that raises", "cpu", fails)]
    monkeypatch.setattr(selftest, "CHECKS", [*checks, Check("for a Mac", "mps", fails)])
    report = selftest.selftest_report([stand_in()], "every value", only="that", sizes=SMALL)
    assert [(r.name, r.problem) for r in report.failures] == [
        ("that says what is wrong", "what is wrong"),
        ("that raises", "RuntimeError: something else"),
    ]


def test_a_failing_reference_is_reported(monkeypatch):
    def fails(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(ops, "trellis_linear", fails)
    (result,) = selftest.run_case(one_case(), [stand_in()], SMALL)
    assert result.problem == "the reference failed: RuntimeError: no"


def test_a_process_that_dies_leaves_a_report(tmp_path):
    def dies(call: Callable) -> tuple:
        raise SystemExit

    file = tmp_path / "report.md"
    with pytest.raises(SystemExit):
        selftest.selftest_report([stand_in(dies)], "every combination", only=ONE, sizes=SMALL, file=file)
    text = file.read_text()
    assert "**did not finish**" in text
    assert f"was at: {ONE} (0 runs before it" in text


# ---------------------------------------------------------------- the command


@pytest.mark.skipif(mps.mps_problem() is None, reason="this machine has an Apple GPU")
def test_without_a_gpu(tmp_path):
    file = tmp_path / "report.md"
    result = command("--quick", "--only", "e", "--report", file)  # every name has an e
    assert result.returncode == 0, result.stdout + result.stderr
    for where in (result.stdout, file.read_text()):
        assert f"the GPU part did NOT run: {mps.mps_problem()}" in where
        assert "runs agree" in where
        for op in OPS:
            assert f"{op.name}: {op.variants:,} kernel variants" in where
    assert str(ROOT) not in file.read_text()
    assert result.stderr == ""


def test_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(selftest, "targets_here", lambda: [selftest.cpu_target(_C.cpu_level())])
    file = tmp_path / "report.md"
    assert main(["selftest", "--json", "--all", "--only", ONE, "--report", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0
    assert found["environment"]["torch"] == torch.__version__
    assert found["plan"]["trellis_linear"] == {"variants": LINEAR.variants, "cases": 1}
    (result,) = found["results"]
    assert result["name"] == ONE
    assert 0 <= result["worst"] <= 1
    assert result["first_ms"] > 0
    assert found == json.loads(file.read_text().split("```json\n")[1].split("\n```")[0])


def test_only_must_match_something(capsys, tmp_path):
    assert main(["selftest", "--only", "rows 99", "--report", str(tmp_path / "r.md")]) == 2
    assert "--only is 'rows 99'; expected a part of a name" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_the_users_mistake(capsys, tmp_path):
    assert main(["selftest", "--quick", "--report", str(tmp_path / "no" / "r.md")]) == 2
    assert "r.md" in capsys.readouterr().err


# ---------------------------------------------------------------- on emulated Metal


@pytest.fixture
def metal(emulator_library: Any) -> selftest.Target:
    """The emulated MPS backend, on for each call and waited for: the other side of a comparison runs between."""
    import emulator

    def run(call: Callable[[], selftest.Results]) -> selftest.Results:
        _C.use_mps_emulator(emulator_library._name)
        try:
            result = call()
            emulator.synchronize()
        finally:
            _C.use_mps_emulator(None)
        return result

    return replace(stand_in(), name="emulator", run=run)


EMULATED = [
    "trellis_linear: rows 4, format mul1-2.5, dtype float32, bias yes",
    "trellis_linear: rows 1, format mul1-2, dtype float32, bias no",
    "trellis_linear: rows prefill, format 3inst-3, dtype float16, bias no",
    "moe_trellis_swiglu: rows 8, format mul1-2, dtype float32, weights float32, ids int32, activation silu, bias none",
    "moe_trellis_swiglu: rows 2, format mixed, dtype float32, weights float16, ids int64, activation gelu, bias up",
    "router: kind sigmoid_topk, dtype float32, gate float16, correction float32, renormalize yes, groups yes",
    "dequantize: format mcg-5, domain original",
    "dequantize: format mul1-7, domain rotated",
]


@pytest.mark.parametrize("name", EMULATED)
def test_case_on_emulated_metal(metal, name):
    (result,) = selftest.run_case(one_case(name), [metal], SMALL)
    assert result.problem is None, result.log


@pytest.mark.parametrize("check", [c for c in CHECKS if c.needs == "gpu" or "int32" in c.name], ids=lambda c: c.name)
def test_check_on_emulated_metal(metal, check):
    (result,) = selftest.run_check(check, [metal], SMALL)
    assert result.problem is None, result.log
