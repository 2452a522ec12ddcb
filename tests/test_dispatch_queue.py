"""Experiments 1 to 4 of the dispatch benchmark, and its shared events, on the emulator's stand-in for Metal.

What they measure there means nothing; that the code runs, releases what it makes, checks results and says so is tested.
"""

from __future__ import annotations

import platform
import random
from typing import Any

import pytest

from metal_marlin import metal_queue

emulator = pytest.importorskip("emulator")
pytest.importorskip("benchmarks.dispatch.result", reason="benchmarks/ is not on the path")
from benchmarks.dispatch import metal_work, queue  # noqa: E402
from benchmarks.dispatch.result import NotMeasured, Plan, Report, Settings  # noqa: E402

TINY = Settings(repeats=5, seconds=0.1, timeout=20.0)
PLANS = [pytest.param(plan, id=plan.key) for plan in queue.EXPERIMENTS]


def silent(fraction: float, what: str) -> None:
    pass


def test_maps():
    """Composed and squared maps against one step after the other."""
    rng = random.Random(1)
    for count in (0, 1, 2, 3, 17, 100):
        one, x = metal_work.Map(rng.randrange(2**32), rng.randrange(2**32)), rng.randrange(2**32)
        many, expected = one.times(count), x
        for _ in range(count):
            expected = (expected * one.factor + one.addend) % 2**32
        assert (x * many.factor + many.addend) % 2**32 == expected
    first, second = metal_work.Map(metal_work.FACTOR, 1), metal_work.Map(metal_work.FACTOR, 2)
    assert first.then(second) != second.then(first)


@pytest.mark.skipif(platform.system() == "Darwin", reason="there is Metal here")
@pytest.mark.parametrize("plan", PLANS)
def test_absent_without_metal(plan: Plan):
    found = plan.run(TINY, silent)
    assert "no Metal device" in (found.absent or "")
    assert (found.key, found.title, found.series) == (plan.key, plan.title, ())


@pytest.mark.parametrize("plan", PLANS)
def test_runs_and_is_no_measurement(fake_metal: Any, plan: Plan):
    fractions: list[float] = []
    found = plan.run(TINY, lambda fraction, what: fractions.append(fraction))
    assert found.absent is None
    assert found.emulated
    assert found.figures == ()
    assert fractions == sorted(fractions)
    assert all(len(series.samples) >= 5 and min(series.samples) >= 0 for series in found.series)
    assert all("timings mean nothing" in str(series.facts["device"]) for series in found.series)
    assert any("timings mean nothing and are not shown" in note for note in found.notes)
    assert "each launch ran once, in order" in found.checks[0]
    for text in (found.question, found.method, found.arithmetic, found.reading):
        assert len(text) > 20
    with pytest.raises(NotMeasured):
        _ = found.series[0].median


class Unmarked(metal_work.MetalWork):
    """Does not say that it is emulated."""

    def __init__(self, timeout: float, slots: int) -> None:
        super().__init__(timeout, slots)
        self.emulated = False


COUNTS = {"sync": 5, "in_flight": 10, "handlers": 14, "encoders": 10, "events": 4}
FIGURES = {"sync": 3, "in_flight": 8, "handlers": 1, "encoders": 1, "events": 2}


@pytest.mark.parametrize("plan", PLANS)
def test_figures(fake_metal: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: figures come with their intervals and formulas."""
    monkeypatch.setattr(queue, "MetalWork", Unmarked)
    found = plan.run(TINY, silent)
    assert (len(found.series), len(found.figures)) == (COUNTS[plan.key], FIGURES[plan.key])
    assert not found.emulated
    for figure in found.figures:
        assert figure.low <= figure.value <= figure.high
        assert figure.formula
        assert figure.unit in ("%", "us")
    studied = [series for series in found.series if series.study]
    assert len(studied) == {"sync": 1, "in_flight": 3, "handlers": 2, "encoders": 3, "events": 0}[plan.key]
    if plan.key == "sync":  # the arithmetic, once more and without the bootstrap
        medians = {series.key: series.median for series in found.series}
        cost = next(figure for figure in found.figures if figure.key == "waiting")
        assert cost.value == pytest.approx((medians["blocking"] - medians["queued"]) * 1e3)


@pytest.mark.parametrize("marked", [True, False], ids=["emulated", "as on a GPU"])
def test_the_whole_report(fake_metal: Any, monkeypatch: pytest.MonkeyPatch, marked: bool):
    """All five through the runner and onto the page, with plots where they are measurements."""
    pytest.importorskip("matplotlib")
    from benchmarks.dispatch import page, plan

    if not marked:
        monkeypatch.setattr(queue, "MetalWork", Unmarked)
    experiments = queue.EXPERIMENTS
    report = plan.run_all(TINY, {"machine": "a test", "torch": "", "metal_marlin": ""}, experiments, lambda one: silent)
    assert [experiment.absent for experiment in report.experiments] == [None] * len(experiments)
    assert Report.from_json(report.to_json()) == report
    assert report.verdict.outcome not in ("worth it", "not worth it")
    html = page.html(report)
    assert all(experiment.question in html for experiment in experiments)
    assert (html.count("<svg") > 4, "emulated, not a measurement" in html) == (not marked, marked)


def test_calibration_follows_the_gpu(fake_metal: Any, monkeypatch: pytest.MonkeyPatch):
    """Steps are chosen so that a launch takes TARGET_MS, whatever the GPU's speed, and the results stay right."""
    monkeypatch.setattr(metal_work.MetalWork, "gpu_ms", lambda self, commands: self.steps / 1000)
    work = metal_work.MetalWork(20.0)
    assert work._calibrate() == 1000
    assert work.check()


def test_a_launch_that_did_nothing_is_noticed(fake_metal: Any):
    work = metal_work.MetalWork(20.0)
    with fake_metal.faults(error=True):
        commands = work.encode()
        commands.commit()
        with pytest.raises(RuntimeError, match="ended in an error: Caused GPU Timeout"):
            work.wait(commands)
    with pytest.raises(AssertionError, match="256 of 256 words are wrong, the first at 0: 0; expected"):
        work.check()


@pytest.mark.parametrize("slip", ["twice", "other order"])
def test_a_wrong_row_of_launches_is_noticed(fake_metal: Any, slip: str):
    work = metal_work.MetalWork(20.0)
    assert work.check()
    commands = work.queue.commands()
    work.launch(commands, addend=metal_work.ADDEND)
    work.launch(commands, addend=metal_work.OTHER_ADDEND)
    one, other = (metal_work.Map(metal_work.FACTOR, addend).times(work.steps) for addend in (metal_work.ADDEND, 12345))
    assert work.slots[0].map == one.then(other)
    work.slots[0].map = one.then(other).then(one) if slip == "twice" else other.then(one)
    commands.commit()
    work.wait(commands)
    with pytest.raises(AssertionError, match="words are wrong"):
        work.check()


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.id != "sync"])  # Metal's own wait has no timeout
def test_a_gpu_that_does_not_answer(fake_metal: Any, plan: Plan):
    with (
        fake_metal.faults(stall=True),
        pytest.raises(TimeoutError, match=r"after 0\.05 s; expected it to be completed"),
    ):
        plan.run(Settings(repeats=5, seconds=0.1, timeout=0.05), silent)


@pytest.mark.parametrize("plan", PLANS)
def test_an_interrupted_run_releases_everything(fake_metal: Any, plan: Plan):
    def interrupt(fraction: float, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(TINY, interrupt)


def test_an_error_of_the_gpu_is_told(fake_metal: Any):
    with fake_metal.faults(error=True), pytest.raises(RuntimeError, match="MTLCommandBufferErrorDomain"):
        queue.HANDLERS.run(TINY, silent)
    with fake_metal.faults(no_library=True), pytest.raises(RuntimeError, match="compiler refused"):
        queue.HANDLERS.run(TINY, silent)


def test_the_device_says_that_it_is_none(fake_metal: Any):
    assert metal_queue.device_problem() is None
    with fake_metal.faults(no_device=True):
        assert "no Metal device" in (queue.SYNC.run(TINY, silent).absent or "")
