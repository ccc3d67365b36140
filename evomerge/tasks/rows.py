"""Rows of data files: one mapping of fields each, with the place that complaints name. Bounded, UTF-8, no code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, nearest

MAX_FILE = 1_000_000_000
MAX_LINE = 2_000_000


@dataclass(frozen=True)
class Row:
    """One row: its fields, its short name (`file:line`) and the place that complaints begin with."""

    fields: Mapping[str, Any]
    where: str
    place: str

    def bad(self, what: str) -> UserError:
        """A complaint about this row."""
        return UserError(f"{self.place}: {what}")

    def field(self, name: str, why: str = "") -> Any:
        """A field's value. Raises UserError naming the nearest one where it is missing."""
        if name not in self.fields:
            reason = f" ({why})" if why else ""
            raise self.bad(f"the field {name!r}{reason} is missing{nearest(name, map(str, self.fields))}")
        return self.fields[name]

    def with_fields(self, **more: Any) -> Row:
        """The row with some fields replaced or added."""
        return replace(self, fields={**self.fields, **more})


def rows(path: Path, who: str) -> Iterator[Row]:
    """All rows of a JSONL file, in order. `who` names the task in complaints about the file as a whole.

    Raises UserError for files that cannot be read, are too large, hold no rows or no objects.
    """
    found = False
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: larger than {MAX_FILE} bytes")
        with path.open(encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    found = True
                    yield _row(line, f"{path.name}:{n}", f"{path} line {n}")
    except OSError as e:
        raise UserError(f"{who}: {path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{who}: {path}: is not UTF-8 text") from None
    if not found:
        raise UserError(f"{who}: {path}: holds no items; expected one JSON object a line")


def _row(line: str, where: str, place: str) -> Row:
    row = Row({}, where, place)
    if len(line) > MAX_LINE:
        raise row.bad(f"longer than {MAX_LINE} characters")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise row.bad("is not JSON; expected one object a line") from None
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise row.bad("holds half of a surrogate pair, which is no text") from None
    if not isinstance(data, dict):
        raise row.bad(f"expected a JSON object, got {type(data).__name__}")
    return replace(row, fields=data)
