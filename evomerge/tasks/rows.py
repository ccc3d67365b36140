"""Rows of data files: one mapping of fields each, with the place that complaints name. Bounded, UTF-8, no code.

The format goes by the file's name: `.jsonl` and `.ndjson` (one object a line), `.json` (a list of objects), `.csv`
and `.tsv` (a header row; every value is text), `.parquet`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from evomerge.errors import UserError, nearest

MAX_FILE = 1_000_000_000
"""Bytes of a file, for parquet also of its columns when unpacked."""
MAX_JSON = 200_000_000
"""Bytes of a .json file, which is read as a whole."""
MAX_LINE = 2_000_000
"""Characters of a line; a field of .csv holds at most 131,072 (csv.field_size_limit)."""
PARQUET_ROWS = 256
"""Rows that are unpacked at a time."""

_ABSENT = object()


@dataclass(frozen=True)
class Row:
    """One row: its fields, its short name (`file:line`, or `file:row`) and the place that complaints begin with."""

    fields: Mapping[str, Any]
    where: str
    place: str

    def bad(self, what: str) -> UserError:
        """A complaint about this row."""
        return UserError(f"{self.place}: {what}")

    def has(self, name: str) -> bool:
        """Whether there is such a field with a value other than null."""
        return self._look(name) not in (_ABSENT, None)

    def field(self, name: str, why: str = "") -> Any:
        """A field's value; `outer.inner` goes into a field that is a mapping itself.

        Raises UserError naming the nearest field where it is missing.
        """
        value = self._look(name)
        if value is _ABSENT:
            reason = f" ({why})" if why else ""
            raise self.bad(f"the field {name!r}{reason} is missing{nearest(name, map(str, self.fields))}")
        return value

    def with_fields(self, /, **more: Any) -> Row:
        """The row with some fields replaced or added."""
        return replace(self, fields={**self.fields, **more})

    def _look(self, name: str) -> Any:
        if name in self.fields:
            return self.fields[name]
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return _ABSENT
            value = value[part]
        return value


def rows(path: Path, who: str) -> Iterator[Row]:
    """All rows of a file, in order. `who` names the task in complaints about the file as a whole.

    Raises UserError for files that cannot be read, are too large, hold no rows or something else than rows.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{who}: {path}: the name should end in one of {', '.join(READERS)}")
    found = False
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: larger than {MAX_FILE} bytes")
        for row in read(path):
            found = True
            yield row
    except OSError as e:
        reason = e.strerror or " ".join(str(e).split())[:200]
        raise UserError(f"{who}: {path}: cannot be read ({reason})") from None
    except UnicodeDecodeError:
        raise UserError(f"{who}: {path}: is not UTF-8 text") from None
    if not found:
        raise UserError(f"{who}: {path}: holds no items; expected one JSON object a line, or rows below a header")


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines of a file, none read further than MAX_LINE."""
    n = 0
    while line := file.readline(MAX_LINE + 1):
        n += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{path} line {n}: longer than {MAX_LINE} characters")
        yield line


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for n, line in enumerate(_lines(path, file), 1):
            if line.strip():
                row = Row({}, f"{path.name}:{n}", f"{path} line {n}")
                try:
                    data = json.loads(line)
                except (ValueError, RecursionError):
                    raise row.bad("is not JSON; expected one object a line") from None
                yield _with_object(row, data)


def _json_list(path: Path) -> Iterator[Row]:
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path}: larger than {MAX_JSON} bytes, all of which are read at once; write it as .jsonl")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON; one object a line goes by the name .jsonl") from None
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of objects, got {type(data).__name__}")
    for n, fields in enumerate(data, 1):
        yield _with_object(Row({}, f"{path.name}:{n}", f"{path} row {n}"), fields)


def _with_object(row: Row, data: Any) -> Row:
    if not isinstance(data, dict):
        raise row.bad(f"expected a JSON object, got {type(data).__name__}")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise row.bad("holds half of a surrogate pair, which is no text") from None
    return replace(row, fields=data)


def _comma_separated(path: Path) -> Iterator[Row]:
    return _table(path, ",")


def _tab_separated(path: Path) -> Iterator[Row]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
        begin = 1
        try:
            header = next(reader, [])
            if header and (len(set(header)) < len(header) or not all(header)):
                raise UserError(f"{path} line 1: the names of the columns should differ and not be empty, got {header}")
            while True:
                begin = reader.line_num + 1  # a quoted field may go over several lines
                values = next(reader, None)
                if values is None:
                    return
                if not values:
                    continue
                row = Row({}, f"{path.name}:{begin}", f"{path} line {begin}")
                if len(values) != len(header):
                    raise row.bad(f"{len(values)} fields, the header has {len(header)}")
                yield replace(row, fields=dict(zip(header, values, strict=True)))
        except csv.Error as e:
            raise UserError(f"{path} line {begin}: not readable ({e}); long texts belong into .jsonl") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'evomerge[data]', or write it as .jsonl") from None
    try:
        with pq.ParquetFile(path) as file:
            n = unpacked = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                unpacked += batch.nbytes
                if unpacked > MAX_FILE:
                    raise UserError(f"{path}: unpacks to more than {MAX_FILE} bytes")
                for fields in batch.to_pylist():
                    n += 1
                    yield Row(fields, f"{path.name}:{n}", f"{path} row {n}")
    except (UserError, UnicodeDecodeError):
        raise
    except (pa.ArrowException, ValueError, OverflowError) as e:  # values that Python has no place for, such as dates
        raise UserError(f"{path}: is no readable parquet file ({' '.join(str(e).split())[:200]})") from None


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
}
