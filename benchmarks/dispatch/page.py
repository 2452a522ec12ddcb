"""The report as one HTML page with everything in it: text, tables, plots. It loads nothing and runs no script.

Owns the page's order and looks. Written for a reader who has seen neither the study nor this program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from benchmarks.dispatch import plots, study, wording
from benchmarks.dispatch.result import Experiment, Figure, Report, Series

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --paper: #ffffff; --card: #f5f7f9;
  --study: #c2307a; --good: #1c7c54; --bad: #b3392f; --open: #96690a; --info: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe6ee; --soft: #9aa7b5; --line: #323d49; --paper: #12181f;
  --card: #1a222b; --study: #f08cbd; --good: #5fcf9c; --bad: #f0877d; --open: #e3b54f; --info: #7db4ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .3rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h2 .n { display: inline-block; min-width: 1.6em; padding: 0 .35em; margin-right: .45em; border-radius: .3em;
  text-align: center; background: var(--ink); color: var(--paper); font-size: .9em; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .5rem 0; }
.soft, figcaption, small { color: var(--soft); }
.question { font-size: 1.06rem; font-style: italic; margin: .2rem 0 .8rem; }
.verdict { background: var(--card); border-left: .4rem solid var(--tone); border-radius: .3rem; padding: 1rem 1.2rem;
  margin: 1.4rem 0; }
.verdict b { color: var(--tone); font-size: 1.15rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; min-width: 60%; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td.r, th.r { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.study { color: var(--study); }
tr.part td { padding-top: .8rem; color: var(--soft); border-bottom: 0; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 36rem; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: .88rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; }
ul { padding-left: 1.2rem; margin: .4rem 0; } li { margin: .2rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
.absent { background: var(--card); padding: .6rem .9rem; border-radius: .3rem; }
.warn { color: var(--bad); font-weight: 600; }
@media (max-width: 38rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { details > * { display: block; } }
"""
TONES = {"worth it": "good", "not worth it": "bad", "inconclusive": "open", "not applicable": "info"}


def html(report: Report) -> str:
    """The page."""
    facts = wording.facts(report)
    machine = " · ".join(facts[name] for name in ("device", "machine", "system") if name in facts)
    body = [
        f"<h1>{escape(wording.TITLE)}</h1>",
        f'<p class="soft">Measured on {escape(machine)}; torch {escape(facts["torch"])}; {escape(report.began)}</p>',
    ]
    if report.interrupted:
        body.append('<p class="warn">This run was interrupted: it holds what was finished.</p>')
    body += [
        _verdict(report),
        f"<p>{escape(wording.INTRO)}</p>",
        "<details open><summary>The words used here</summary><dl>",
        *(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in wording.WORDS.items()),
        "</dl></details>",
    ]
    ran = [e for e in report.experiments if e.absent is None]
    absent = [e for e in report.experiments if e.absent is not None]
    body += [_experiment(experiment) for experiment in ran]
    if absent:
        body.append("<h2>Not run here</h2><dl>")
        body += [
            f"<dt>{escape(wording.heading(e))}</dt><dd>{escape(e.question)} <br>{escape(e.absent or '')}</dd>"
            for e in absent
        ]
        body.append("</dl>")
    body += [
        "<h2>The machine and the settings</h2><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        "</dl>",
        f'<p class="soft">Figures in <span style="color:var(--study)">this colour</span> and diamonds in plots are of'
        f" {escape(study.WHAT)}. Made by <code>python -m benchmarks dispatch</code> of metal_marlin;"
        " its docs/dispatch.md explains every experiment.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(wording.TITLE)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    found = report.verdict
    plot = plots.summary_svg(found)
    figure = (
        f"<figure>{plot}<figcaption>Dots: measured; bars: 95 % intervals. On a GPU, a bar wholly right of the dashed"
        " line says that queueing without waiting pays, one wholly left of it that it hardly does; one across it leaves"
        " it open.</figcaption></figure>"
    )
    table = _figures(found.figures) if found.figures else ""
    return (
        f'<section class="verdict" style="--tone: var(--{TONES[found.outcome]})">'
        f"<b>{escape(wording.HEADLINES[found.outcome])}</b>"
        f"<p>{escape(found.recommendation)}</p></section>{figure if plot else ''}"
        f"<details><summary>The arithmetic</summary>{table}<p>{escape(found.arithmetic)}</p></details>"
    )


def _experiment(experiment: Experiment) -> str:
    number = f'<span class="n">{escape(experiment.number)}</span>' if experiment.number else ""
    parts = [
        f'<h2 id="{escape(experiment.key)}">{number}{escape(experiment.title)}</h2>',
        f'<p class="question">{escape(experiment.question)}</p>',
    ]
    if experiment.emulated:
        parts.append(f'<p class="warn">These timings are {escape(wording.EMULATED)}; none is shown.</p>')
    if experiment.method:
        parts.append(f"<p>{escape(experiment.method)}</p>")
    for title, svg in plots.svgs(experiment):
        heading = f"<h3>{escape(title[0].upper() + title[1:])}</h3>" if title else ""
        parts.append(f"{heading}<figure>{svg}</figure>")
    if experiment.reading:
        parts.append(f'<p class="soft">{escape(experiment.reading)}</p>')
    if experiment.figures and not experiment.emulated:
        parts.append(_figures(experiment.figures))
    if experiment.arithmetic:
        parts.append(f"<p><b>Arithmetic.</b> {escape(experiment.arithmetic)}</p>")
    parts.append(_sentences("To know when judging this", experiment.notes))
    parts.append(_sentences("Checked before anything was timed", experiment.checks))
    if experiment.series:
        parts.append(f"<details><summary>All {len(experiment.series)} series</summary>{_series(experiment)}</details>")
    return "\n".join(part for part in parts if part)


def _sentences(title: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h3>{escape(title)}</h3><ul>{items}</ul>" if items else ""


def _row(cells: Sequence[tuple[str, str]], tag: str = "td") -> str:
    return "<tr>" + "".join(f'<{tag} class="{kind}">{escape(text)}</{tag}>' for text, kind in cells) + "</tr>"


def _figures(figures: Sequence[Figure]) -> str:
    intervals, studied = any(f.low is not None for f in figures), any(f.study for f in figures)
    head = [("", ""), ("value", "r")]
    head += [("95 % interval", "r")] if intervals else []
    head += [("study", "r")] if studied else []
    lines = [_row([*head, ("formula", "")], "th")]
    for figure in figures:
        cells = [(figure.name, ""), (wording.with_unit(figure.value, figure.unit), "r")]
        cells += [(wording.interval(figure), "r")] if intervals else []
        cells += [(wording.study(figure.study, figure.unit), "r study")] if studied else []
        lines.append(_row([*cells, (figure.formula, "soft")]))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _series(experiment: Experiment) -> str:
    swept = any(series.x is not None for series in experiment.series)
    head = [("", "")] + ([(experiment.x_label, "r")] if swept else [])
    lines = [_row([*head, ("median", "r"), ("middle half", "r"), ("runs", "r"), ("study", "r")], "th")]
    last = ""
    for series in experiment.series:
        workload = str(series.facts.get("workload", ""))
        if workload and workload != last:
            lines.append(f'<tr class="part"><td colspan="6">{escape(workload)}</td></tr>')
        last = workload
        lines.append(_row(_series_cells(series, swept)))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _series_cells(series: Series, swept: bool) -> list[tuple[str, str]]:
    cells = [(series.name, "")] + ([(f"{series.x:g}" if series.x is not None else "", "r")] if swept else [])
    runs = str(len(series.samples))
    if series.emulated:
        return [*cells, (wording.EMULATED, "r"), ("", "r"), (runs, "r"), ("", "r")]
    low, median, high = series.quartiles
    spread = f"{wording.number(low)} – {wording.number(high)}" if len(series.samples) > 1 else ""
    return [
        *cells, (wording.with_unit(median, series.unit), "r"), (spread, "r"), (runs, "r"),
        (wording.study(series.study, series.unit), "r study"),
    ]  # fmt: skip
