"""A report as JSON: a format's name first, then its fields."""

from __future__ import annotations

import json
import re
from typing import Any


class BadReport(ValueError):
    """A file that is not a report, or another version's."""


def dumps(format_name: str, fields: dict[str, Any]) -> str:
    """The whole report, floats as they are. `loads` gives the same fields back. ValueError: a NaN or an infinity."""
    text = json.dumps({"format": format_name, **fields}, indent=1, allow_nan=False)
    # a series' samples on one line, so that two reports can be told apart by diff
    return re.sub(r"\[\s+([-+.\de,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def loads(format_name: str, text: str) -> dict[str, Any]:
    """The fields. BadReport: not JSON, not a report, or another format's."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadReport(f"not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != format_name:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BadReport(f"format is {found!r}; expected {format_name!r}")
    del data["format"]
    return data
