"""Rows of data files: every format reads alike, and what is wrong is named by file and row."""

from __future__ import annotations

import builtins
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.errors import UserError
from evomerge.tasks import rows as module
from evomerge.tasks.rows import READERS, Row, rows

TEXTS = [
    {"q": "plain", "n": "1"},
    {"q": "a, b\tc", "n": "02"},
    {"q": 'she said "no"', "n": ""},
    {"q": "two\nlines", "n": "-3"},
    {"q": "漢字 🙂", "n": "x"},
]


def written(path: Path, data: list[dict[str, Any]]) -> Path:
    form = path.suffix
    if form in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(data[0]), delimiter="\t" if form == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(data)
    elif form == ".parquet":
        pq.write_table(pa.Table.from_pylist(data), path, row_group_size=2)
    elif form == ".json":
        path.write_text(json.dumps(data), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in data), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(rows(path, "task 't'"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", READERS)
def test_all_formats_read_alike(form: str, tmp_path: Path) -> None:
    """The same rows in the same order, whatever stands in a text."""
    path = written(tmp_path / f"x{form}", TEXTS)

    got = list(rows(path, "t"))

    assert [dict(r.fields) for r in got] == TEXTS
    assert len({r.where for r in got}) == len(TEXTS)


def test_places(tmp_path: Path) -> None:
    """A row is called by its line where lines are counted, also below a field of two lines, else by its number."""
    for form, numbers in ((".jsonl", [1, 2, 3, 4, 5]), (".csv", [2, 3, 4, 5, 7]), (".parquet", [1, 2, 3, 4, 5])):
        got = list(rows(written(tmp_path / f"x{form}", TEXTS), "t"))
        assert [r.where for r in got] == [f"x{form}:{n}" for n in numbers]
    assert got[1].bad("wrong").args[0] == f"{tmp_path / 'x.parquet'} row 2: wrong"


def test_parquet_keeps_types(tmp_path: Path) -> None:
    """Lists, mappings, numbers and nulls come as themselves, over many batches of rows."""
    data = [{"i": n, "c": {"text": ["a", "b"], "label": ["1", "2"]}, "none": None} for n in range(600)]

    got = [dict(r.fields) for r in rows(written(tmp_path / "x.parquet", data), "t")]

    assert got == data


def test_spreadsheets(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends and empty lines, as spreadsheets write them, are no part of the data."""
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n1,2\r\n\r\n"3",4\r\n')

    assert [dict(r.fields) for r in rows(path, "t")] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields, the header has 2"),
        ("x.csv", b"a,b\n1\n", "line 2: 1 fields, the header has 2"),
        ("x.csv", b"a,a\n1,2\n", "line 1: the names of the columns should differ"),
        ("x.csv", b"a,\n1,2\n", "line 1: the names of the columns should differ"),
        ("x.csv", b'a,b\n1,"2\n' + b"3," * 100_000, "line 2: not readable (field larger than"),
        ("x.csv", b'a,b\n1,"2" 3\n', "line 2: not readable"),
        ("x.csv", b'a,b\n1,"2', "line 2: not readable"),
        ("x.csv", b"a,b\n" + b"1," * 1_100_000, "line 2: longer than"),
        ("x.csv", b"a,b\n1,\xff\n", "is not UTF-8 text"),
        ("x.csv", b"a,b\n", "holds no items"),
        ("x.csv", b"", "holds no items"),
        ("x.json", b"{}", "expected a list of objects, got dict"),
        ("x.json", b'{"a": 1}\n{"a": 2}\n', "is not JSON; one object a line goes by the name .jsonl"),
        ("x.json", b'[{"a": 1}, 2]', "row 2: expected a JSON object, got int"),
        ("x.json", b'[{"a": "\\ud800"}]', "row 1: holds half of a surrogate pair"),
        ("x.json", b"\xff", "is not UTF-8 text"),
        ("x.json", b"[" * 100_000, "is not JSON"),
        ("x.json", b"[]", "holds no items"),
        ("x.parquet", b"", "is no readable parquet file"),
        ("x.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read"),
        ("x.parquet", b'{"a": 1}\n', "is no readable parquet file"),
        ("x.txt", b"a", "the name should end in one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("x", b"a", "the name should end in one of"),
    ],
)
def test_bad_files_are_one_line(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    """Ragged rows, open quotes, long fields, foreign bytes and other formats are named by file and row."""
    (tmp_path / name).write_bytes(data)

    text = complaint(tmp_path / name)

    assert words in text
    assert name in text


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files over the caps are refused by their size, parquet also by what it unpacks to."""
    small = written(tmp_path / "x.parquet", [{"a": "same " * 1000}] * 600)
    monkeypatch.setattr(module, "MAX_FILE", 500_000)
    monkeypatch.setattr(module, "MAX_JSON", 10)

    assert small.stat().st_size < 500_000
    assert "unpacks to more than 500000 bytes" in complaint(small)
    assert "read at once; write it as .jsonl" in complaint(written(tmp_path / "x.json", TEXTS))
    monkeypatch.setattr(module, "MAX_FILE", 10)
    assert "larger than 10 bytes" in complaint(small)


def test_parquet_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow the extra to install is named."""
    path = written(tmp_path / "x.parquet", TEXTS)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)

    assert "parquet needs pyarrow: pip install 'evomerge[data]'" in complaint(path)


def test_fields_within_fields() -> None:
    """A dotted name goes into a mapping; a field that is really called so comes first; null is no value."""
    row = Row({"choices": {"text": ["a"], "none": None}, "choices.label": "own", "t": "x"}, "x:1", "here")

    assert row.field("choices.text") == ["a"]
    assert row.field("choices.label") == "own"
    assert row.has("choices.text")
    assert not row.has("choices.none")
    assert not row.has("t.text")
    with pytest.raises(UserError, match=r"here: the field 'choices\.txt' is missing"):
        row.field("choices.txt")


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.Table.from_pylist(TEXTS), PARQUET)
GOOD = PARQUET.getvalue().to_pybytes()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(sorted(READERS)),
    data=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='a,"\n\r\t\0{}[]:1', max_size=60).map(str.encode),
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
            lambda x: GOOD[: x[0]] + bytes([x[1]]) + GOOD[x[0] + 1 :]
        ),
    ),
)
def test_junk_is_rows_or_one_line(form: str, data: bytes, tmp_path: Path) -> None:
    """Whatever a file holds, damaged parquet too, it is read into rows or refused in one line."""
    path = tmp_path / f"x{form}"
    path.write_bytes(data)
    try:
        got = list(rows(path, "t"))
    except UserError as e:
        assert "\n" not in str(e)  # noqa: PT017 (either outcome is right)
    else:
        assert all(isinstance(r.fields, dict) for r in got)
