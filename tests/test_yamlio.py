"""Bounded YAML: nothing runs, nothing expands, nothing is read in silence as something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import UserError
from evomerge.yamlio import MAX_BYTES, MAX_DEPTH, dump_yaml, load_yaml, parse_yaml

KEYS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=6), st.sampled_from(["1e3", "2E-5", "<<", "="])
)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(data=DATA)
def test_written_yaml_reads_back_equal(data: Any) -> None:
    """What dump_yaml writes, parse_yaml reads back with the same values and types, odd names included."""
    back = parse_yaml(dump_yaml(data), "here")

    assert back == data
    assert repr(back) == repr(data)


@pytest.mark.parametrize("text", ["1e3", "1E-3", "+2e5", "12_0e+2", "-1e-06"])
def test_floats_without_a_dot(text: str) -> None:
    """People write 1e-3 and mean a number; quoted it stays text."""
    assert parse_yaml(f"a: {text}", "here") == {"a": float(text)}
    assert parse_yaml(f"a: '{text}'", "here") == {"a": text}


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", " \u2029 ", "a\n\x85b", "\r", "\ufeff", "\x07"])
def test_odd_characters_survive(text: str) -> None:
    """Line breaks of other alphabets and control characters in keys and values read back as they were."""
    assert parse_yaml(dump_yaml({text: [text]}), "here") == {text: [text]}


def test_equal_parts_are_written_out() -> None:
    """The same object twice is written twice: the writer makes no aliases, as the reader takes none."""
    part = {"x": [1, 2]}

    assert parse_yaml(dump_yaml({"a": part, "b": part}), "here") == {"a": part, "b": part}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "here line 3, column 1: the key 'a' stands here twice"),
        ("a: {b: 1, 'b': 2}", "line 1, column 11: the key 'b' stands here twice"),
        ("a: &x 1\nb: *x", "line 2, column 4: aliases (*name) are not accepted"),
        ("<<: {a: 1}", "line 1"),
        ("? [1, 2]\n: x", "a key must be plain text"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !custom 1", "could not determine a constructor"),
        ("a: [1, 2", "line 1"),
        ("a: 'x", "line 1"),
        ("a: 1\n b: 2", "line 2"),
        ("--- 1\n--- 2", "line 2"),
        ("a: \x00", "not readable as YAML"),
        ("a: 2001-02-30", "not readable as YAML"),
        ("a: " + "9" * 5000, "not readable as YAML"),
        ("!!bool x", "not readable as YAML"),
        ("!!int ''", "not readable as YAML"),
        ("!!timestamp x", "not readable as YAML"),
        ("!!map [a]", "not readable as YAML"),
    ],
)
def test_refused_with_line_and_column(text: str, words: str) -> None:
    """Duplicates, aliases, tags and broken text are refused in one line that says where."""
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "here")

    assert str(caught.value).startswith("here")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alias_bombs_are_refused_before_they_expand() -> None:
    """Nested aliases that would expand to billions of elements stop at the first alias."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))

    with pytest.raises(UserError, match=r"line 2, column .*: aliases"):
        parse_yaml(bomb, "here")


def test_depth_is_bounded() -> None:
    """Nesting is read up to the limit and refused beyond, however deep."""

    def nested(n: int) -> str:
        return "[" * n + "]" * n

    assert parse_yaml(nested(MAX_DEPTH), "here") is not None
    for depth in (MAX_DEPTH + 1, 5000):
        with pytest.raises(UserError, match=f"nested deeper than {MAX_DEPTH}"):
            parse_yaml(nested(depth), "here")


def test_files_are_bounded(tmp_path: Path) -> None:
    """A file at the cap is read, one byte more is refused by size before it is parsed."""
    fits, over = tmp_path / "fits.yaml", tmp_path / "over.yaml"
    fits.write_bytes(b"a: 1 #" + b"x" * (MAX_BYTES - 6))
    over.write_bytes(b"a: 1 #" + b"x" * (MAX_BYTES - 5))

    assert load_yaml(fits) == {"a": 1}
    with pytest.raises(UserError, match=f"{MAX_BYTES + 1} bytes of YAML"):
        load_yaml(over)


def test_unreadable_files(tmp_path: Path) -> None:
    """A missing file and foreign bytes are refused by name."""
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")

    with pytest.raises(UserError, match=r"a\.yaml: cannot be read \(No such file"):
        load_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"b\.yaml: is not UTF-8 text"):
        load_yaml(tmp_path / "b.yaml")
