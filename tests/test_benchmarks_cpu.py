"""The CPU benchmark: workers that answer, die or hang, absent peers, statistics, reports, the command line. Nothing
here looks at how fast anything is.

Most workers here are a few lines of Python that talk like one: what they answer, and when they die, is written out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.cpu import command, figures, ggml_library, plots, race, shapes, tables, terminal
from benchmarks.cpu.contender import Absent, Options, copies_for, limit_of
from benchmarks.cpu.processes import Failed, Gone, Missing, Worker, environment
from benchmarks.cpu.race import Race
from benchmarks.cpu.result import Absence, Contestant, Report, Series, Settings
from benchmarks.cpu.roster import ENTRIES, PEERS
from benchmarks.cpu.shapes import CHECKS, SHAPES
from benchmarks.cpu.worker import Session
from benchmarks.dispatch.result import Refused
from benchmarks.dispatch.terminal import console
from benchmarks.report_json import BadReport

ROOT = Path(__file__).resolve().parent.parent

# A worker in place of a real one. `act`: request -> expression over its arguments `a` and the count of turns.
FAKE = """
import json, os, signal, sys, time
print("a library's own words", file=sys.stderr)
act = dict(
    variants="[dict(name=n, bits=b, limit=0.5, family='scalar') for n, b in (('v', 2.0), ('w', 4.0))]",
    check="{v: dict(error=0.05, limit=0.1) for v in a['variants']}",
    needs="dict(each={v: 1000 for v in a['variants']}, shared=0)",
    build="{v: dict(copies=3, bits=2.5) for v in a['variants']}",
    turn="dict(seconds=[0.002, 0.001, 0.003], bytes=1e6, delayed=0.0)",
    drop="None",
)
act.update(json.loads(sys.argv[1]))
print(json.dumps(act.get("hello", {"ok": {"version": "1"}})), flush=True)
turns = 0
for line in sys.stdin:
    a = json.loads(line)
    do = a.pop("do")
    turns += do == "turn"
    try:
        answer = {"ok": eval(act[do])}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
"""
ANY = Settings()
DIES = "os.kill(os.getpid(), signal.SIGKILL)"


def fake(name: str = "fake", **act: object) -> Worker:
    return Worker(name, {"threads": 1}, command=[sys.executable, "-S", "-c", FAKE, json.dumps(act)])


@contextlib.contextmanager
def greeted(**act: object):
    worker = fake(**act)
    worker.greet(30)
    try:
        yield worker
    finally:
        worker.close()


def race_of(settings: Settings = ANY, **acts: dict[str, object]) -> Race:
    """A race between fake workers of these names."""
    runner = Race(settings)
    runner.start([(name, Contestant(name, name, 1), fake(name, **act)) for name, act in acts.items()])
    return runner


# ---- layers ----


def test_flops_and_weights() -> None:
    assert SHAPES["T"].flops(3) == 2 * 3 * 4 * 3 * 1024 * 512
    assert SHAPES["T"].weights == 32 * 3 * 1024 * 512
    assert SHAPES["L2048"].flops(1) == 2 * 2048 * 2048
    assert SHAPES["R512"].flops(2) == 2 * 2 * 2048 * 512


def test_inputs_follow_from_the_seed() -> None:
    shape = SHAPES["T"]
    a, b, c = (shapes.inputs(shape, 5, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.ids, b.ids)
    assert not np.array_equal(a.ids, c.ids)
    assert all(len(set(row)) == 4 for row in a.ids.tolist())
    np.testing.assert_allclose(a.weights.sum(1), 1, rtol=1e-6)


def test_reference_against_plain_loops() -> None:
    shape = shapes.Shape("x", "moe", 4, 3, 5, 2)
    gate, up, down = weights = shapes.check_weights(shape)
    given = shapes.inputs(shape, 3, (1,))
    want = np.zeros((3, 4))
    for t in range(3):
        for slot in range(2):
            e = given.ids[t, slot]
            g, u = gate[e] @ given.x[t], up[e] @ given.x[t]
            want[t] += given.weights[t, slot] * (down[e] @ (g / (1 + np.exp(-g)) * u))
    np.testing.assert_allclose(shapes.reference(shape, given, weights), want, rtol=1e-4, atol=1e-5)


def test_reference_of_a_router() -> None:
    shape = shapes.Shape("x", "router", 4, 0, 5, 2)
    weights, given = shapes.check_weights(shape), shapes.inputs(shape, 3, (1,))
    found = shapes.reference(shape, given, weights)
    np.testing.assert_allclose(found.sum(1), 1)
    assert (np.count_nonzero(found, axis=1) == 2).all()
    assert (found.argmax(1) == (given.x @ weights[0].T).argmax(1)).all()


def test_relative_error() -> None:
    assert shapes.relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert shapes.relative_error(np.array([np.nan, 4.0]), np.array([3.0, 4.0])) == float("inf")
    with pytest.raises(ValueError, match=r"\[1\]; expected \[2\]"):
        shapes.relative_error(np.zeros(1), np.zeros(2))


def test_limits_and_copies() -> None:
    assert [limit_of(bits) for bits in (2.6, 3.4, 4.5, 16)] == [0.95, 0.5, 0.25, 0.02]
    assert [copies_for(size, 100) for size in (1000, 100, 30)] == [1, 1, 4]


# ---- workers ----


def test_a_worker_answers_and_survives_its_own_errors() -> None:
    with greeted(turn="a['n'] * 2", drop="1 / 0") as worker:
        assert worker.facts == {"version": "1"}
        assert worker.ask("turn", 30, n=21) == 42
        with pytest.raises(Failed, match="ZeroDivisionError"):
            worker.ask("drop", 30)
        assert worker.ask("turn", 30, n=1) == 2


def test_a_worker_that_is_absent() -> None:
    with pytest.raises(Missing, match="No module named"):
        fake(hello={"absent": "No module named 'x'"}).greet(30)
    with pytest.raises(Gone, match=r"no/such/python does not start: No such file"):
        Worker("x", {}, python="no/such/python")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_worker_that_dies_says_how() -> None:
    with (
        greeted(turn=DIES) as worker,
        pytest.raises(Gone, match=r"died when asked to 'turn' \(SIGKILL\): a library's own"),
    ):
        worker.ask("turn", 30)
    with greeted(turn="os._exit(7)") as worker:
        with pytest.raises(Gone, match="exit status 7"):
            worker.ask("turn", 30)
        with pytest.raises(Gone, match="exit status 7"):  # and goes on saying it
            worker.ask("turn", 30)


def test_a_worker_that_hangs_is_stopped() -> None:
    with greeted(turn="time.sleep(600)") as worker:
        began = time.monotonic()
        with pytest.raises(Gone, match=r"did not answer to 'turn' within 0\.3 s and was stopped"):
            worker.ask("turn", 0.3)
        assert time.monotonic() - began < 10
        assert worker.process.returncode is not None


def test_a_worker_that_does_not_talk_like_one() -> None:
    worker = Worker("x", {}, command=[sys.executable, "-S", "-c", "print('hello')"])
    with pytest.raises(Gone, match="answered b'hello'"):
        worker.greet(30)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="signals")
def test_spinning_workers_are_stopped_between_turns() -> None:
    worker = Worker("x", {"spin": True}, command=[sys.executable, "-S", "-c", FAKE, "{}"])
    worker.greet(30)
    try:
        if Path("/proc").is_dir():
            state = Path(f"/proc/{worker.process.pid}/stat")
            deadline = time.monotonic() + 10
            while state.read_text().split()[2] != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state.read_text().split()[2] == "T"
        assert worker.ask("turn", 30)["bytes"] == 1e6
    finally:
        worker.close()
    assert "OMP_WAIT_POLICY" not in environment(2, True)
    assert environment(2, False)["OMP_WAIT_POLICY"] == "passive"


def test_a_real_worker() -> None:
    """torch, through the protocol: checks, layers in several copies, a turn."""
    worker = Worker("torch", {"name": "torch", "threads": 1})
    try:
        worker.greet()
        assert "version" in worker.facts
        checked = worker.ask("check", 60, op="linear", variants=["linear f32", "linear bf16"])
        assert set(checked) == {"linear f32", "linear bf16"}
        assert all(found["error"] < found["limit"] for found in checked.values())
        assert worker.ask("needs", 60, shape="R8", variants=["ops f32"], cold_bytes=2**17)["each"] == {"ops f32": 2**17}
        assert worker.ask("build", 60, shape="R8", variants=["ops f32"], cold_bytes=2**17) == {
            "ops f32": {"copies": 2, "bits": 32.0}
        }
        turn = worker.ask("turn", 60, variant="ops f32", tokens=3, seed=[1, 2], seconds=0.001, warm=True)
        assert turn["bytes"] == 4 * 2048 * 8
        assert min(turn["seconds"]) > 0
        with pytest.raises(Failed, match="KeyError"):
            worker.ask("turn", 60, variant="no", tokens=3, seed=[1], seconds=0.001, warm=True)
    finally:
        worker.close()


@pytest.mark.parametrize("op", shapes.OPS)
def test_our_results_are_checked(op: str) -> None:
    """At every level, in a process, as the worker does it: exact levels to float32's rounding."""
    from metal_marlin import _C

    before = _C.cpu_level()
    try:
        for level in _C.cpu_levels():
            contender = ENTRIES["metal_marlin"].make(Options(threads=1, level=level))
            names = ["float32"] if op == "router" else ["mul1 2", "mcg 3", "3inst 4"]
            found = Session(contender).check(op, names)
            assert set(found) == set(names)
            for name, one in found.items():
                assert one["error"] < one["limit"], (level, name)
    finally:
        _C.set_cpu_level(before)


def test_our_windows_walk_through_the_pool() -> None:
    """Each call reads where the last one ended, whichever rate it has, and every rate's copies cover the pool."""
    contender = ENTRIES["metal_marlin"].make(Options(threads=1))
    cold = 4 * CHECKS["linear"].weights
    wide, narrow = (contender.build(CHECKS["linear"], name, cold, None) for name in ("mul1 4", "mul1 2"))
    given, ends = shapes.inputs(CHECKS["linear"], 1, (1,)), []
    for work in (wide, narrow, narrow, wide):
        before = work.pool.next
        work.load(given)
        start = work.starts[work.at]
        assert start >= before or start == 0
        ends.append(start + work.elements)
    assert ends == sorted(ends)
    assert wide.copies * wide.matrix_bytes >= cold
    assert narrow.copies > wide.copies


# ---- the race ----


def test_rounds_interleave_and_pair() -> None:
    runner = race_of(Settings(rounds=6, tokens=(1, 4), seconds=30), a={}, b={})
    try:
        runner.check("moe")
        runner.build(SHAPES["T"])
        runner.heat(SHAPES["T"], (1, 4))
    finally:
        runner.close()
    assert {(s.worker, s.variant, s.tokens) for s in runner.series} == {
        (w, v, t) for w in "ab" for v in "vw" for t in (1, 4)
    }
    for series in runner.series:
        assert series.samples == (0.002,) * 6  # the median of a turn's calls
        assert (series.bits, series.copies, series.error) == (2.5, 3, 0.05)
        assert series.flops == SHAPES["T"].flops(series.tokens)


def test_absent_peers_are_named_with_their_install_command() -> None:
    runner = race_of(ik={"hello": {"absent": "METAL_MARLIN_IK_GGML is not set"}}, torch={})
    runner.close()
    assert [one.name for one in runner.absent] == ["ik"]
    assert "ik_llama.cpp" in runner.absent[0].install
    assert [one.name for one in runner.contestants] == ["torch"]
    assert all(entry.install for name, entry in ENTRIES.items() if name in PEERS)


def test_wrong_results_are_excluded_before_timing() -> None:
    wrong = "{'v': dict(error=1.4, limit=0.9), 'w': dict(failed='OSError: no')}"
    runner = race_of(Settings(rounds=5), a={"check": wrong}, b={"check": "{'v': dict(error=float('inf'), limit=1)}"})
    try:
        runner.check("moe")
        assert [lane.errors for lane in runner.lanes] == [{}, {}]
        runner.build(SHAPES["T"])
        runner.heat(SHAPES["T"], (1,))
    finally:
        runner.close()
    assert runner.series == []
    text = " ".join(runner.excluded)
    assert "a, v left out of moe: its result is off by 1.4 of its size; expected at most 0.9" in text
    assert "a, w left out of moe: OSError: no" in text


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_one_that_dies_or_hangs_or_fails_costs_no_other() -> None:
    turn = "dict(seconds=[0.001], bytes=1.0, delayed=0.0) if turns < 4 else "
    runner = race_of(
        Settings(rounds=7, timeout=2.0), dies={"turn": turn + DIES}, hangs={"turn": turn + "time.sleep(600)"},
        fails={"turn": turn + "1 / 0"}, fine={},
    )  # fmt: skip
    try:
        runner.check("moe")
        runner.build(SHAPES["T"])
        runner.heat(SHAPES["T"], (1,))
    finally:
        runner.close()
    assert {series.worker for series in runner.series} == {"fine"}
    assert all(len(series.samples) == 7 for series in runner.series)
    text = "\n".join(runner.excluded)
    assert "dies left the run: its worker died when asked to 'turn' (SIGKILL)" in text
    assert "hangs left the run: its worker did not answer to 'turn' within 2 s" in text
    assert "fails, v left out at 1 tokens: ZeroDivisionError" in text


def test_the_slow_are_left_out() -> None:
    slow = {"turn": "dict(seconds=[a['tokens'] * 1.0], bytes=1.0, delayed=0.5)"}
    runner = race_of(Settings(rounds=5, slowest=10.0, match=", v"), slow=slow)
    try:
        runner.check("moe")
        runner.build(SHAPES["T"])
        for tokens in (4, 8, 64, 12):
            runner.heat(SHAPES["T"], (tokens,))
    finally:
        runner.close()
    assert [(series.tokens, series.delayed) for series in runner.series] == [(4, 1.0), (8, 1.0)]
    assert "slow, v left out of T at 64 tokens: a call would take 64 s" in runner.excluded


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "host_free_bytes", lambda: 3 * 2**30)
    needs = {"needs": "dict(each={v: 2**30 if v == 'v' else 2**32 for v in a['variants']}, shared=0)"}
    runner = race_of(Settings(memory=0.5), a=needs)
    try:
        runner.check("moe")
        runner.build(SHAPES["S"])
        assert set(runner.lanes[0].built) == {"v"}
    finally:
        runner.close()
    assert "a, w left out of S: its weights take 4.0 GiB, and all together may take 1.5 GiB" in runner.excluded


# ---- what follows ----


OURS = "metal_marlin:best"


def series_of(worker: str, variant: str, median: float, tokens: int = 1, bits: float = 2.0, **more: object) -> Series:
    samples = tuple(median * (1 + 0.01 * i) for i in (-2, -1, 0, 1, 2))
    family = variant.split()[0] if worker.startswith("metal") else "scalar"
    flops = SHAPES["T"].flops(tokens)
    return Series("T", tokens, worker, variant, family, bits, samples, 1e6 * tokens, flops, **more)  # type: ignore[arg-type]


def report_of(*series: Series, **more: object) -> Report:
    contenders = (
        Contestant(OURS, "ours", 2, {"level": "best"}, True, True),
        Contestant("metal_marlin:scalar", "ours", 2, {}, True),
        Contestant("metal_marlin:best:1 thread", "ours", 1, {}, True),
        Contestant("ik", "ik", 2),
        Contestant("transformers", "transformers", 2),
    )  # fmt: skip
    fields = {"settings": Settings(), "machine": {"machine": "a | machine", "torch": "2"}, "yardstick": {
        "copy": 2e10, "f32": 1e11, "bf16": 5e10, "peak": 1e11,
    }, **more}  # fmt: skip
    return Report(
        contenders=contenders, absent=(Absence("ggml", "not here", "pip install it"),), excluded=("x left out",),
        series=series, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


FULL = report_of(
    series_of(OURS, "mul1 2", 0.001), series_of(OURS, "mul1 3", 0.0015, bits=3), series_of(OURS, "mcg 2", 0.003),
    series_of("metal_marlin:scalar", "mul1 2", 0.008), series_of("metal_marlin:best:1 thread", "mul1 2", 0.0019),
    series_of("ik", "IQ2_KT", 0.0025, bits=2.15), series_of("ik", "Q2_K", 0.0009, bits=2.62),
    series_of("ik", "Q2_K_R4", 0.0008, bits=2.62), series_of("transformers", "grouped_mm bf16", 0.0075, bits=16),
    series_of(OURS, "mul1 2", 0.0018, 2), series_of(OURS, "mul1 2", 0.0036, 3),
)  # fmt: skip


def test_baseline_is_ours_at_about_equal_bits() -> None:
    found = {s.name: figures.baseline(FULL, s) for s in FULL.series if s.tokens == 1}
    names = {name: one.variant for name, one in found.items() if one}
    assert names["ik, Q2_K"] == "mul1 2"
    assert names["transformers, grouped_mm bf16"] == "mul1 3"
    assert names["metal_marlin scalar, mul1 2"] == "mul1 2"
    chosen = dataclasses.replace(FULL, settings=Settings(baseline="IQ2_KT"))
    assert {one.variant for s in FULL.series if s.tokens == 1 and (one := figures.baseline(chosen, s))} == {"IQ2_KT"}


def test_row() -> None:
    row = figures.row(FULL, FULL.series[5])
    assert row.ratio is not None
    assert row.ratio.value == pytest.approx(2.5)
    assert row.ratio.low == row.ratio.value == row.ratio.high or row.ratio.low < row.ratio.high
    assert row.bytes_per_second == pytest.approx(4e8)
    assert row.of_copy == pytest.approx(0.02)
    assert row.of_peak == pytest.approx(SHAPES["T"].flops(1) / 0.0025 / 1e11)
    assert figures.row(FULL, FULL.series[0]).ratio is None


def test_ratio_of_a_series_that_ended_early() -> None:
    short = dataclasses.replace(FULL.series[5], samples=FULL.series[5].samples[:3])
    assert figures.ratio(short, dataclasses.replace(FULL.series[0], samples=FULL.series[0].samples)).value > 2


def test_comparisons_take_the_fastest_and_judge() -> None:
    found = {comparison.title: outcomes for comparison, outcomes in figures.compared(FULL, "T")}
    assert found["mul1 2 : ik IQ2_KT"][1].verdict == "met"
    assert found["mcg 2 : ik IQ2_KT"][1].verdict == "missed"
    assert found["mul1 2 : ik Q2_K"][1].peer == "Q2_K_R4"
    assert found["mul1 2 : ik Q2_K"][1].ratio.value == pytest.approx(0.8)
    assert found["mul1 2 : ik's fastest"][1].goal is None
    assert set(found["mul1 2 : grouped_mm bf16"]) == {1}
    noisy = figures.Outcome(figures.Interval(2.1, 1.9, 2.3), "x", 2.0)
    assert noisy.verdict == "about"


def test_scaling_and_steps() -> None:
    ((series, outcome),) = figures.scaling(FULL)
    assert (series.variant, outcome.verdict) == ("mul1 2", "met")
    assert outcome.ratio.value == pytest.approx(1.9)
    (step,) = figures.steps(FULL)
    assert (step.before, step.raw_before, step.verdict) == (2, 2, "missed")
    assert step.per_token.value == pytest.approx(4 / 3)
    assert step.raw.value == pytest.approx(2)


def test_json_round_trip() -> None:
    again = Report.from_json(FULL.to_json())
    assert again == FULL
    assert again.to_json() == FULL.to_json()


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.update(format="other"), "format is 'other'; expected 'metal_marlin cpu report 1'"),
    (lambda d: d.pop("series"), "damaged report"),
    (lambda d: d["settings"].update(colour=1), "damaged report: .*colour"),
    (lambda d: d["series"][0].update(samples=[-1.0]), "expected positive samples"),
])  # fmt: skip
def test_damaged_reports(change, message: str) -> None:
    data = json.loads(FULL.to_json())
    change(data)
    with pytest.raises(BadReport, match=message):
        Report.from_json(json.dumps(data))
    with pytest.raises(BadReport, match="not JSON"):
        Report.from_json("{")


def test_tables_in_a_file_and_in_a_terminal() -> None:
    out = console()
    out.file = io.StringIO()
    terminal.show(out, FULL)
    text = out.file.getvalue()
    for words in (
        "metal_marlin best, mul1 2", "time / baseline", "2.50 (", "mul1 2 : ik IQ2_KT", "✓ ≥ 2",
        "ggml is absent: not here", "pip install it", "x left out", "copies 20.0 GB/s", "From 1 thread to 2",
    ):  # fmt: skip
        assert words in text, words
    table = tables.details(FULL, "T", 1)
    narrow = table.within(70)
    assert "median ms" in narrow.columns
    assert "Too narrow for: runs, error" in narrow.note
    assert all(len(row) == len(narrow.columns) for row in narrow.rows)
    assert table.within(400) is table


def test_markdown() -> None:
    text = terminal.markdown(FULL)
    assert "a \\| machine" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert "| mul1 2 : ik IQ2_KT |" in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_png() -> None:
    assert plots.png(FULL).startswith(b"\x89PNG")
    assert plots.png(report_of()).startswith(b"\x89PNG")  # nothing measured


# ---- peers' libraries ----


def test_ik_needs_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ggml_library.IK_VARIABLE, raising=False)
    with pytest.raises(Absent, match="METAL_MARLIN_IK_GGML is not set and no --library ik=FILE"):
        ENTRIES["ik"].make(Options())
    monkeypatch.setenv(ggml_library.IK_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(Absent, match=r"none\.so is not a file"):
        ENTRIES["ik"].make(Options())
    (tmp_path / "not.so").write_text("no library")
    with pytest.raises(Absent, match=r"not\.so"):
        ENTRIES["ik"].make(Options(library=str(tmp_path / "not.so")))


def test_peers_that_python_lacks_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, entry in (("onnx", "onnxruntime"), ("transformers", "transformers")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(Absent, match=module):
            ENTRIES[entry].make(Options())


# ---- the command ----


@pytest.mark.parametrize(("options", "message"), [
    (["--threads", "0"], "--threads is 0; expected more than 0"),
    (["--tokens", "0,1"], "--tokens has 0; expected at least 1"),
    (["--bits", "2.2"], "--bits has 2.2; expected some of 1, 1.5, 2,"),
    (["--match", "("], "--match is '\\(', which is no regular expression"),
    (["--python", "onnx"], "--python is 'onnx'; expected PEER=PATH with one of metal_marlin, ik"),
    (["--library", "no=x"], "--library is 'no=x'"),
    (["--json", "no/such/folder/x.json"], "expected a file in a folder that can be written"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", *options]) == command.EXIT_REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err


def parsed(*options: str) -> Settings:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.settings_of(parser.parse_args(options))


def test_settings() -> None:
    assert parsed().peers == PEERS
    assert parsed().levels
    assert parsed("--shapes", "R8", "T").ops == ("moe", "router")
    assert parsed("--cold", "64").cold_bytes == 2**26
    sweep = parsed("--sweep")
    assert (sweep.tokens, sweep.peers) == (tuple(range(1, 65)), ())
    assert parsed("--sweep", "--tokens", "1,2").tokens == (1, 2)
    with pytest.raises(Refused):
        parsed("--slowest", "-1")


def alive(session: int) -> bool:
    """Whether anyone of the session is left."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_terminated_run_leaves_no_worker(tmp_path: Path) -> None:
    options = ["--quick", "--spin", "--shapes", "R8", "--peers", "--threads", "1", "--json", str(tmp_path / "r.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "cpu", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        while "starting" not in (line := process.stderr.readline()):
            assert line, "it ended early"
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode == command.EXIT_INTERRUPTED
        assert "interrupted; the tables hold what was finished, and nothing was written" in err
        assert list(tmp_path.iterdir()) == []
        deadline = time.monotonic() + 20
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_small_run(tmp_path: Path) -> None:
    """The whole command, with a peer in an interpreter that has nothing installed: absent, and said so."""
    bare = tmp_path / "bare"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -E -c 'import onnxruntime'\n")
    bare.chmod(0o755)
    options = [
        "--quick", "--shapes", "R8", "--peers", "torch", "onnxruntime", "--threads", "1", "--tokens", "1",
        "--levels", "scalar", "--seconds", "0.1", "--cold", "1", "--python", f"onnxruntime={bare}",
        "--json", "r.json", "--markdown", "r.md", "--png", "r.png",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "cpu", *options], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "To have it: pip install onnxruntime onnx" in done.stdout
    report = Report.from_json((tmp_path / "r.json").read_text())
    assert {series.worker for series in report.series} == {"metal_marlin:scalar", "torch"}
    assert [one.name for one in report.absent] == ["onnxruntime"]
    assert report.yardstick["peak"] > 0
    assert report.yardstick_after["copy"] > 0
    assert "router" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
