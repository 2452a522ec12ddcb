"""Numbers and units as people read them, and the report's own sentences, shared by terminal, page and plots."""

from __future__ import annotations

from benchmarks.dispatch.result import Experiment, Figure, Published, Report

UNITS = {"us": "µs", "x": "×"}
TITLE = "Does queueing the layers of a mixture of experts pay?"
HEADLINES = {
    "worth it": "Queueing without waiting is worth it",
    "not worth it": "Not worth a pipeline",
    "inconclusive": "Inconclusive",
    "not applicable": "Not applicable to this device",
}
EMULATED = "emulated, not a measurement"
INTRO = (
    "A GPU works through a queue: the program puts work in and may go on, or it may wait until the work is done. A"
    " published"
    " study asked, on one Mac, whether a language model of the mixture-of-experts kind runs faster if its layers are"
    " queued"
    " with care instead of being waited for, and found: by 7.7 %, too little to bother. This report repeats the"
    " question on one machine, with the spread of every figure, and puts the study's figures beside it."
)
WORDS = {
    "mixture of experts (MoE)": "a layer with many small networks, the experts, of which a router picks a few"
    " (top-k) for each"
    " token",
    "wait, synchronize": "the program stops until the device has done everything it was given",
    "per-op, batch": "waiting after every operation; waiting once, at the end",
    "commit": "on Apple GPUs, handing over what has been collected so far, without waiting",
    "median, middle half": "half of the runs were faster; half of the runs lie in this range",
    "95 % interval": "where the figure would lie in 95 of 100 repetitions of this measurement, by resampling"
    " (bootstrap);"
    " it does not cover another run, or a machine that was busy in a different way",
}


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    value = value or 0.0  # no -0
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 or size == 0 else 4
    return f"{value:,.{digits}f}"


def percent(value: float) -> str:
    """A fraction in percent, one digit, never -0.0."""
    return f"{round(100 * value, 1) or 0.0:.1f}"


def with_unit(value: float, unit: str) -> str:
    """7.7 %, 2.40 ms, 1.08 ×."""
    return f"{percent(value)} %" if unit == "%" else f"{number(value)} {UNITS.get(unit, unit)}"


def interval(figure: Figure) -> str:
    """The ends of a figure's interval, "" if it has none."""
    if figure.low is None or figure.high is None:
        return ""
    if figure.unit == "%":
        return f"{percent(figure.low)} to {percent(figure.high)} %"
    return f"{number(figure.low)} to {number(figure.high)}"


def study(published: Published | None, unit: str) -> str:
    """The study's figure, with its spread."""
    if published is None:
        return ""
    text = with_unit(published.value, unit)
    return text if published.spread is None else f"{text} ± {number(published.spread)}"


def heading(experiment: Experiment) -> str:
    """5  PyTorch's stream: …"""
    return f"{experiment.number}  {experiment.title}" if experiment.number else experiment.title


def facts(report: Report) -> dict[str, str]:
    """The machine and the settings, in the order in which they are shown."""
    s = report.settings
    sizes = f"batch {s.batch}, hidden {s.hidden}, intermediate {s.intermediate}, top {s.top_k} of {s.experts} experts"
    limits = f"at most {s.repeats} rounds and {s.seconds:g} s; took {report.seconds:.0f} s; seed {s.seed}"
    return {
        **report.machine,
        "sizes": f"{sizes}, {s.layers} layers, {s.dtype}" + ("; a quick run" if s.quick else ""),
        "effort": limits + ("; INTERRUPTED" if report.interrupted else ""),
        "began": report.began,
    }
