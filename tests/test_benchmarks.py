"""The dispatch benchmark's statistics, formulas, verdict, reports and command line. Nothing here looks at how fast
anything is.

Statistics are held against closed forms: the bootstrap distribution of a median of three, the normal theory of a
median, and the coverage of an interval over many samples of a known distribution.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
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
from benchmarks.dispatch import (
    command,
    compare,
    files,
    layers,
    memory,
    overlap,
    page,
    plan,
    plots,
    sizes,
    stream,
    study,
    terminal,
    verdict,
    wording,
)
from benchmarks.dispatch import device as devices
from benchmarks.dispatch.device import Device
from benchmarks.dispatch.result import (
    Experiment,
    Figure,
    NotMeasured,
    Plan,
    Published,
    Refused,
    Report,
    Series,
    Settings,
    Verdict,
)
from benchmarks.dispatch.rounds import FEWEST, in_turns
from benchmarks.dispatch.spread import bootstrap, quartiles
from benchmarks.dispatch.workloads import Workload, quietly
from benchmarks.report_json import BadReport
from metal_marlin import _C

ROOT = Path(__file__).resolve().parent.parent
GPU = Settings(device="cuda")


def around(median: float, spread: float = 0.01, count: int = 41) -> tuple[float, ...]:
    """Samples, evenly spaced, whose median is `median`."""
    return tuple(median * (1 + spread * (2 * i / (count - 1) - 1)) for i in range(count))


def stream_of(
    per_op: tuple[float, ...], batch: tuple[float, ...], key: str = "moe", emulated: bool = False
) -> Experiment:
    series = [
        Series(f"{key}_{way}", way, "ms", samples, group=key, emulated=emulated, facts={"workload": "layers"})
        for way, samples in (("per_op", per_op), ("batch", batch))
    ]
    return Experiment("stream", "5", "PyTorch's stream", "How much?", series=tuple(series))


def report_of(*experiments: Experiment, settings: Settings = GPU, machine: str = "a machine") -> Report:
    facts = {"machine": machine, "torch": "2", "system": "an OS", "device": "a GPU"}
    return Report(settings, facts, experiments, verdict.decide(settings, experiments), "2026-01-01T00:00:00+00:00", 1.0)


SWEEP = Experiment(
    "sweep", "", "A sweep", "Which?", "method", "arithmetic", "reading", (
        Series("a1", "line a", "ms", (1.0, 1.1, 1.2), Published(2.4, 0.3, "note"), "s", 1, facts={"n": 1, "ok": True}),
        Series("a2", "line a", "ms", (2.0, 2.1, 2.2), None, "s", 2),
    ), (Figure("f", "a figure", "x", 2.0, 1.9, 2.1, "a2 / a1", Published(1.5)),), ("checked.",), ("noted.",),
    x_label="things", seconds=0.5,
)  # fmt: skip
FULL = report_of(stream_of(around(1.2), around(1.0)), SWEEP, Experiment("gone", "1", "Gone", "Why?", absent="no Metal"))


# ---- statistics ----


def test_quartiles_of_known_samples() -> None:
    assert quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert quartiles([1, 2, 3, 4]) == (1.75, 2.5, 3.25)  # R's quantile(1:4), type 7
    assert quartiles([7]) == (7, 7, 7)
    with pytest.raises(ValueError, match="no samples"):
        quartiles([])


def test_bootstrap_of_three_samples() -> None:
    """The median of three draws from {1, 2, 3}: 27 equally likely cases, counted here."""
    medians = [sorted(draws)[1] for draws in itertools.product((1, 2, 3), repeat=3)]
    assert [medians.count(value) / 27 for value in (1, 2, 3)] == [7 / 27, 13 / 27, 7 / 27]
    assert bootstrap(lambda m: m, (1, 2, 3)) == (2, 1, 3)  # both tails hold 7 / 27 > 2.5 %
    assert bootstrap(lambda m: m, (1, 2, 3), confidence=0.4) == (2, 2, 2)  # and less than 30 %
    draws = []
    bootstrap(lambda m: draws.append(m) or m, (1, 2, 3), resamples=20000)
    share = float(np.mean(np.asarray(draws[0]) == 1))
    assert share == pytest.approx(7 / 27, abs=5 * (7 / 27 * 20 / 27 / 20000) ** 0.5)


def test_bootstrap_of_a_normal_median(rng: np.random.Generator) -> None:
    """The standard error of a normal sample's median is sqrt(pi / 2) sigma / sqrt(n), so the interval is 2 * 1.96 of it
    wide; one sample's own density at its median makes that vary by a few tens of percent."""
    widths = []
    for _ in range(20):
        found = bootstrap(lambda m: m, rng.normal(10, 2, 400))
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (np.pi / 2) ** 0.5 * 2 / 20, rel=0.15)


def test_bootstrap_covers(rng: np.random.Generator) -> None:
    """Of 300 intervals about 285 hold the true median; a binomial's five deviations are 19, and small samples cost a
    few percent."""
    hits = sum(
        low <= 1.0 <= high
        for _, low, high in (bootstrap(lambda m: m, rng.lognormal(0, 0.5, 60), resamples=500) for _ in range(300))
    )
    assert 285 - 19 - 9 <= hits <= 300


def test_bootstrap_in_blocks_covers_a_drifting_machine(rng: np.random.Generator) -> None:
    """Samples that remember the one before (an AR(1) process with coefficient 0.8 has the standard error of a ninth as
    many independent ones): drawn singly, intervals miss most of the time; in blocks they don't."""
    hits = {1: 0, 20: 0}
    for _ in range(200):
        noise, samples = rng.normal(size=500), np.zeros(500)
        for i in range(1, 500):
            samples[i] = 0.8 * samples[i - 1] + noise[i]
        for block in hits:
            found = bootstrap(lambda m: m, samples[100:], resamples=300, block=block)
            hits[block] += found.low <= 0 <= found.high
    assert hits[1] < 130
    assert hits[20] > 160


def test_bootstrap_pairs_rounds(rng: np.random.Generator) -> None:
    """A slow round slows both columns: paired, an exact ratio has no spread at all."""
    batch = rng.lognormal(0, 0.5, 50)
    paired = bootstrap(lambda a, b: (a - b) / b, 1.25 * batch, batch)
    assert paired == pytest.approx((0.25, 0.25, 0.25))
    unpaired = bootstrap(lambda a, b: (a - b) / b, 1.25 * batch, batch, paired=False)
    assert unpaired.high - unpaired.low > 0.1
    assert bootstrap(lambda a, b: a / b, batch, batch[::-1], seed=3) == bootstrap(
        lambda a, b: a / b, batch, batch[::-1], seed=3
    )
    with pytest.raises(ValueError, match=r"\[50, 49\] samples; expected equally many"):
        bootstrap(lambda a, b: a / b, batch, batch[1:])
    with pytest.raises(ValueError, match="no samples"):
        bootstrap(lambda: 0)


def test_overlap_bound() -> None:
    """min / sum is what the best schedule of two jobs on two workers saves: both begin at once."""
    for router, experts in ((1.0, 1.0), (1.0, 3.0), (9.0, 1.0), (0.5, 99.5)):
        one_after_the_other, side_by_side = router + experts, max(router, experts)
        assert overlap.potential(router, experts) == pytest.approx(1 - side_by_side / one_after_the_other)
    np.testing.assert_allclose(overlap.potential(np.array([1.0, 4.0]), np.array([3.0, 4.0])), [0.25, 0.5])


def test_the_studys_arithmetic() -> None:
    """The percentages that the study prints, from the times that it prints."""
    assert round(100 * study.of_batch(), 1) == 7.7
    assert round(100 * study.of_per_op(), 1) == 7.1
    assert round(100 * study.overlap(), 1) == 6.9


# ---- memory ----


def test_memory_formula() -> None:
    assert memory.buffered_bytes(128, 14336, 2) == 3_670_016  # the study's 3.5 MB
    assert memory.buffered_bytes(128, 14336, 2, 2) == 7_340_032
    assert memory.buffered_bytes(128, 14336, 2, 2, top_k=4) == 29_360_128
    assert memory.buffered_bytes(1, 768, 4, 8, top_k=8, layers=3) == 3 * 8 * 768 * 4  # no more buffers than layers


def test_layer_peak() -> None:
    """Counted by hand for 2 tokens, top 3, so 6 rows, of hidden 5 and intermediate 20 or 2, in bytes of 2."""
    assert memory.layer_peak_bytes(2, 5, 20, 2, 3) == 2 * (6 * 5 + 4 * 6 * 20)  # rows; gate, up, silu, product
    assert memory.layer_peak_bytes(2, 5, 2, 2, 3) == 2 * (
        3 * 6 * 5 + 3 * 6 * 2
    )  # rows, down, weighted; gate, up, product


# ---- the verdict ----


@pytest.mark.parametrize(("per_op", "outcome"), [(1.05, "not worth it"), (1.3, "worth it"), (1.15, "inconclusive")])
def test_verdict_follows_the_interval(per_op: float, outcome: str) -> None:
    noise = around(1.0, 0.02)
    found = verdict.decide(GPU, [stream_of(tuple(per_op * b for b in reversed(noise)), noise)])
    assert found.outcome == outcome
    of_batch, of_per_op = found.figures
    assert of_batch.value == pytest.approx(per_op - 1)
    assert of_per_op.value == pytest.approx((per_op - 1) / per_op)
    assert of_batch.low is not None
    assert of_batch.high is not None
    if outcome == "inconclusive":
        assert of_batch.low < 0.15 < of_batch.high
    assert "7.7%" in found.arithmetic
    assert "7.1%" in found.arithmetic


def test_verdict_on_the_studys_figures() -> None:
    series = stream_of(around(study.PER_OP.value), around(study.BATCH.value))
    assert verdict.decide(GPU, [series]).outcome == "not worth it"
    assert verdict.decide(dataclasses.replace(GPU, threshold=0.05), [series]).outcome == "worth it"


def test_verdict_beyond_the_queue() -> None:
    bound = Experiment("overlap", "6", "", "?", figures=(Figure("potential", "", "%", 0.08, 0.07, 0.09),))
    found = verdict.decide(GPU, [stream_of(around(1.3), around(1.0)), bound])
    assert "at most 8.0% of their time (7.0% to 9.0%), under the threshold" in found.recommendation


def test_verdict_on_a_cpu_and_on_nothing() -> None:
    cpu = verdict.decide(Settings(device="cpu"), [stream_of(around(1.5), around(1.0))])
    assert cpu.outcome == "not applicable"
    assert "this machine's noise" in cpu.recommendation
    assert verdict.decide(GPU, []).outcome == "inconclusive"


def test_emulated_timings_are_never_measurements() -> None:
    """No statistic, no verdict, no table, no spreadsheet, no plot."""
    fake = stream_of(around(98765.4), around(1.0), emulated=True)
    with pytest.raises(NotMeasured, match="moe_per_op: timings of a fake or an emulator"):
        _ = fake.series[0].median
    fake = dataclasses.replace(fake, figures=(Figure("gain", "gain", "%", 98764.4),))
    found = verdict.decide(GPU, [fake])
    assert (found.outcome, found.figures) == ("inconclusive", ())
    report = report_of(fake)
    assert plots.parts(fake) == []
    shown = [page.html(report), files.to_csv(report), text_of(report, 100)]
    for text in shown:
        assert not re.search(r"98[,.]?76", text)
    assert "emulated, not a measurement" in shown[0]
    assert "emulated, not a measurement" in shown[2]
    assert compare.changes(report, report) == []
    assert Report.from_json(report.to_json()) == report


# ---- reports ----


def text_of(report: Report, width: int) -> str:
    out = terminal.console()
    out.file, out.width = io.StringIO(), width
    terminal.show(out, report)
    return out.file.getvalue()


def test_json_round_trip() -> None:
    again = Report.from_json(FULL.to_json())
    assert again == FULL
    assert again.to_json() == FULL.to_json()
    assert again.find("sweep").find("a1").study == Published(2.4, 0.3, "note")


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.update(format="something else"), "format is 'something else'; expected 'metal_marlin dispatch report"),
    (lambda d: d.pop("verdict"), "damaged report"),
    (lambda d: d["settings"].update(colour="red"), "damaged report: .*colour"),
    (lambda d: d["experiments"][0]["series"][0].update(samples=[]), "expected finite samples and at least one"),
])  # fmt: skip
def test_damaged_reports(change, message: str) -> None:
    data = json.loads(FULL.to_json())
    change(data)
    with pytest.raises(BadReport, match=message):
        Report.from_json(json.dumps(data))


def test_no_json() -> None:
    with pytest.raises(BadReport, match="not JSON"):
        Report.from_json("{")
    with pytest.raises(BadReport, match="format is 'list'"):
        Report.from_json("[]")


def test_series_and_experiments_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="expected finite samples"):
        Series("a", "a", "ms", (1.0, float("nan")))
    with pytest.raises(ValueError, match="two series or figures share a key"):
        Experiment("e", "", "", "", series=(SWEEP.series[0],) * 2)
    with pytest.raises(ValueError, match="cannot be absent"):
        Experiment("e", "", "", "", series=SWEEP.series, absent="why")


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(files.to_csv(FULL))))
    assert [row["key"] for row in rows] == ["moe_per_op", "moe_batch", "a1", "a2", "f"]
    assert (float(rows[2]["median"]), rows[2]["study"], rows[2]["x"]) == (1.1, "2.4", "1")
    assert (rows[4]["kind"], rows[4]["formula"]) == ("figure", "a2 / a1")


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_keeps_to_its_width(width: int) -> None:
    """Piped: no escape codes, no line too long, nothing lost."""
    text = text_of(FULL, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in ("line a", "2.40 ms ± 0.300", "Not run: no Metal", "checked.", "noted.", "Queueing without waiting"):
        assert word in text, word


def test_page_stands_alone() -> None:
    """One file: nothing is loaded, no script runs; ids are unique; every experiment and every word is there."""
    text = page.html(FULL)
    assert not re.search(r"<script|<link|src=|@import|url\((?!#)", text)
    links = set(re.findall(r'(?:href|src)="(?!#)([^"]*)"', text))
    assert links == set()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'href="#([^"]*)"', text):
        assert reference in ids
    assert text.count("<svg") == 3  # the verdict, experiment 5, the sweep
    assert plots.INK not in text
    for experiment in FULL.experiments:
        assert experiment.title.replace("'", "&#x27;") in text
    nasty = dataclasses.replace(FULL, machine={**FULL.machine, "machine": "<b>&"})
    assert "<b>&" not in page.html(nasty)


def test_png() -> None:
    assert plots.png(FULL).startswith(b"\x89PNG")
    assert plots.png(report_of()).startswith(b"\x89PNG")  # nothing measured


def test_numbers_for_people() -> None:
    assert [wording.number(v) for v in (0, 0.01234, 0.1234, 1.234, 12.34, 1234.5)] == [
        "0.000", "0.0123", "0.123", "1.23", "12.3", "1,234",
    ]  # fmt: skip
    assert wording.with_unit(-0.0001, "%") == "0.0 %"
    assert sizes.amount(3_670_016) == "3.5 MiB"


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    files.write(target, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        files.write(target, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.json", "old")]


def test_a_file_that_cannot_be_drawn_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "png", lambda report: 1 / 0)
    outcome = command.save(FULL, {name: tmp_path / name for name in ("png", "json")})
    assert outcome == {tmp_path / "png": "ZeroDivisionError: division by zero", tmp_path / "json": None}
    assert [p.name for p in tmp_path.iterdir()] == ["json"]


# ---- compare ----


def test_compare_finds_a_factor() -> None:
    slower = dataclasses.replace(FULL.experiments[0], series=tuple(
        dataclasses.replace(s, samples=tuple(2 * v for v in s.samples)) for s in FULL.experiments[0].series
    ))  # fmt: skip
    changes = {c.key: c for c in compare.changes(FULL, report_of(slower, SWEEP))}
    assert changes["moe_batch"].ratio == pytest.approx(2)
    assert changes["moe_batch"].low < 2 < changes["moe_batch"].high
    assert changes["moe_batch"].word == "higher"
    assert (changes["a1"].ratio, changes["a1"].word) == (1, "same")
    assert set(changes) == {"moe_per_op", "moe_batch", "a1", "a2"}


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(FULL.to_json())
    b.write_text(dataclasses.replace(FULL, machine={**FULL.machine, "machine": "another"}).to_json())
    assert main(["compare", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "differs  machine: a machine | another" in text
    assert "1.00" in text
    assert main(["compare", str(a), str(b), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["changes"]) == 4
    b.write_text("{}")
    assert main(["compare", str(a), str(b)]) == 2
    assert "b.json: format is None" in capsys.readouterr().err
    assert main(["compare", str(a), str(tmp_path / "none")]) == 2


# ---- running ----


def test_rounds_take_turns() -> None:
    calls: list[str] = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = in_turns(works, Device("cpu"), Settings(repeats=20, seconds=60))
    assert len(found["a"]) == len(found["b"]) == 20
    pairs = list(zip(calls[2::2], calls[3::2], strict=True))  # after a warm-up of each
    assert {tuple(sorted(pair)) for pair in pairs} == {("a", "b")}
    assert len(set(pairs)) == 2  # in both orders
    hurried = in_turns(works, Device("cpu"), Settings(repeats=20, seconds=1e-9))
    assert len(hurried["a"]) == FEWEST


def ran(key: str, outcome: BaseException | None = None) -> Plan:
    def run(settings: Settings, progress: object) -> Experiment:
        if outcome:
            raise outcome
        return Experiment(key, "", key, "?", notes=(f"{settings.seconds:.0f}",))

    return Plan(key, "", key, "?", run)


def run_plans(*plans: Plan, seconds: float = 8.0) -> Report:
    return plan.run_all(Settings(seconds=seconds), {}, plans, lambda _: lambda fraction, what: None)


def test_an_interrupted_run_keeps_what_was_finished() -> None:
    report = run_plans(ran("first"), ran("second", KeyboardInterrupt()), ran("third"))
    assert report.interrupted
    assert [e.absent for e in report.experiments] == [None, "interrupted while it ran", "interrupted before it ran"]


def test_a_failure_is_reported_and_the_next_one_runs() -> None:
    report = run_plans(ran("first", RuntimeError("no pipeline\nmore")), ran("second"))
    assert [e.absent for e in report.experiments] == ["failed: RuntimeError: no pipeline", None]


def test_nothing_runs_after_a_timeout() -> None:
    report = run_plans(ran("first", TimeoutError("no answer within 5 s")), ran("second"))
    assert [e.absent for e in report.experiments] == [
        "failed: no answer within 5 s", "not run: the device had stopped answering",
    ]  # fmt: skip


def test_time_is_shared() -> None:
    report = run_plans(ran("first"), ran("second"))
    assert [e.notes for e in report.experiments] == [("4",), ("8",)]  # what the first left goes to the second


def test_the_watch_gives_up() -> None:
    """A wait that lasts too long ends the program with a message: a thread inside a driver can't be interrupted."""
    code = "import time\nfrom benchmarks.dispatch.device import Watch\nw = Watch(0.2)\nw.since = time.monotonic()\n"
    code += "time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == devices.EXIT_LATE
    assert "the device has not answered for 0.2 s" in done.stderr


@pytest.mark.parametrize(("options", "message"), [
    (["--batch", "100000000"], r"these sizes need [\d,.]+ TiB \(experts .* CPU has .* free"),
    (["--batch", "0"], "--batch is 0; expected at least 1"),
    (["--hidden", "100"], "--hidden is 100; expected a multiple of 128"),
    (["--top-k", "9"], "--top-k is 9; expected at most 8, of 8 experts"),
    (["--experts", "9999"], "--experts is 9999; expected at most 512"),
    (["--threshold", "15"], "--threshold is 15; expected a fraction such as 0.15"),
    (["--seconds", "-1"], "--seconds is -1"),
    (["--device", "mps"], "--device is mps, which is off"),
    (["--json", "no/such/folder/x.json"], "expected a file in a folder that can be written"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if options[-1] == "mps" and devices.default_kind() == "mps":
        pytest.skip("this machine has an Apple GPU")
    device = [] if "--device" in options else ["--device", "cpu"]
    assert main(["dispatch", *device, *options]) == command.EXIT_REFUSED
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.out == ""


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_a_missing_package_is_named(module: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{module!r}] = None\nfrom benchmarks.__main__ import main\n"
    code += f"sys.exit(main(['dispatch', '--quick', '--html', {str(tmp_path / 'x.html')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == command.EXIT_REFUSED
    assert module in done.stderr
    assert "pip install 'metal_marlin[bench]'" in done.stderr


def test_a_quick_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: exit status, four files, tables, what a CPU is told."""
    options = ["--device", "cpu", "--quick", "--seconds", "2", "--threads", "1", "--report", str(tmp_path / "out")]
    assert main(["dispatch", *options]) == 0
    captured = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"report.{x}" for x in ("csv", "html", "json", "png")
    ]
    assert "Not applicable to this device" in captured.out
    assert "there is no queue" in " ".join(captured.out.replace("│", " ").split())
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert not report.interrupted
    for key in ("waiting", "stream", "sweep", "overlap", "fusion", "memory"):
        found = report.find(key)
        assert found is not None
        assert found.absent is None, f"{key}: {found.absent}"
        assert found.checks or key == "memory"
        assert found.question.endswith("?")
    assert main(["compare", *[str(tmp_path / "out" / "report.json")] * 2]) == 0


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dispatch", "--device", "cpu", "--quick", "--only", "memory", "--json", "-"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert [e.key for e in report.experiments] == ["memory"]
    assert report.verdict == Verdict("inconclusive", report.verdict.recommendation, 0.15, (), report.verdict.arithmetic)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_leaves_no_file_and_prints_what_it_has(tmp_path: Path) -> None:
    options = [
        "--device",
        "cpu",
        "--seconds",
        "14",
        "--repeats",
        "100000",
        "--threads",
        "1",
        "--report",
        str(tmp_path),
    ]
    command_line = [sys.executable, "-m", "benchmarks", "dispatch", "--only", "memory", "waiting", "stream", *options]
    process = subprocess.Popen(
        command_line,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("[1/3]"), first
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == command.EXIT_INTERRUPTED
    assert "interrupted; the tables hold what was finished, and nothing was written" in err
    assert "The price of one wait" in out
    assert "Not run: interrupted" in out
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_fit_are_refused_with_their_need() -> None:
    with pytest.raises(Refused, match="make --batch, --hidden, --intermediate, --experts or --layers smaller"):
        sizes.check(Settings(**{**sizes.defaults("cpu"), "hidden": 128 * 10**5}), Device("cpu"))


def test_commits_through_the_emulator(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Mac runs in experiment 5, its ops on the emulated stream: waiting, not waiting and committing after every
    layer give the same bits. (The residual is torch's own op, which the emulator does not run, and is left out.)"""
    settings = Settings(device="cpu", batch=2, hidden=128, intermediate=128, experts=4, top_k=2, dtype="float32")
    layer, x = layers.PackedMoE(settings), layers.tokens(settings, 2)
    device = Device("cpu")
    commits = []
    monkeypatch.setattr(Device, "commits", None)
    monkeypatch.setattr(Device, "wait", lambda self: emulated.synchronize())
    monkeypatch.setattr(Device, "commit", lambda self: commits.append(_C.mps_commit()))

    def run(after_op, after_layer):
        y = x
        for _ in range(2):
            y = layer.together(y, *layer.route(y, after_op), after_op)
            after_layer()
        return y

    workload = Workload("moe", "layers", run)
    assert stream.check(workload, device) == "layers: finite, and the same bits however it waits."
    assert len(commits) == 2
    assert workload.ops() == 4
    emulated.synchronize()
    series, figures = stream.compare(workload, device, Settings(repeats=5), lambda fraction, what: None, "moe")
    assert [s.key for s in series] == ["moe_per_op", "moe_batch", "moe_commit"]
    assert [f.key for f in figures] == ["moe_of_batch", "moe_of_per_op", "moe_commit"]


def test_transformers_speaks_again_after_a_workload() -> None:
    """Its verbosity and progress bars are the process's: other tests, and a user's notebook, go on with theirs."""
    logging = pytest.importorskip("transformers").utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quietly(logging):
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
