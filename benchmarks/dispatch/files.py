"""Writing reports: JSON, CSV, and files that are either whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from pathlib import Path

from benchmarks.dispatch.result import Report

COLUMNS = (
    "experiment", "number", "kind", "key", "name", "unit", "x", "count", "median", "lower_quartile", "upper_quartile",
    "low", "high", "study", "study_spread", "formula",
)  # fmt: skip


def write(path: Path, content: str | bytes) -> None:
    """Writes beside `path` and renames, so that a reader, or a Ctrl-C, never sees half a file. OSError as open()."""
    data = content.encode() if isinstance(content, str) else content
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def to_csv(report: Report) -> str:
    """One line for every measured series and every derived figure. Fractions stay fractions; emulated series are left
    out, since a spreadsheet would not say what they are."""
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    lines.writeheader()
    for experiment in report.experiments:
        common = {"experiment": experiment.key, "number": experiment.number}
        for series in experiment.measured():
            low, median, high = series.quartiles
            interval = series.interval(report.settings.seed)
            lines.writerow({
                **common, "kind": "series", "key": series.key, "name": series.name, "unit": series.unit, "x": series.x,
                "count": len(series.samples), "median": median, "lower_quartile": low, "upper_quartile": high,
                "low": interval.low, "high": interval.high, "study": series.study and series.study.value,
                "study_spread": series.study and series.study.spread,
            })  # fmt: skip
        for figure in () if experiment.emulated else experiment.figures:
            lines.writerow({
                **common, "kind": "figure", "key": figure.key, "name": figure.name, "unit": figure.unit,
                "median": figure.value, "low": figure.low, "high": figure.high,
                "study": figure.study and figure.study.value, "formula": figure.formula,
            })  # fmt: skip
    return text.getvalue()
