"""Validation errors become one line that names the place as people wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import UserError
from evomerge.schema import validated


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(gt=0)
    from_: str = Field("", alias="from")


class Other(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(ge=1)
    by: Literal["x", "y"] = "x"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    named: str | Inner = ""
    by_key: Mapping[str, Inner] = {}
    rows: tuple[Inner, ...] = ()
    either: Literal["a"] | Inner | tuple[Inner, ...] = "a"
    parted: Inner | Other | None = None
    some: Mapping[str, str] = Field({"x": "y"}, min_length=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"Rows": []}, "unknown key 'Rows'; did you mean 'rows'?"),
        ({"int": 1}, "unknown key 'int'"),
        ({"rows": [{"size": 1}, {"siz": 1}]}, "unknown key 'rows.1.siz'; did you mean 'size'?"),
        ({"rows": [{"size": 1, "form": "x"}]}, "unknown key 'rows.0.form'; did you mean 'from'?"),
        ({"parted": {"count": 0}}, "parted.count: expected at least 1, got 0"),
        ({"parted": {"count": 1, "by": "z"}}, "parted.by: expected 'x' or 'y', got 'z'"),
        ({"parted": {"count": 1, "bu": "x"}}, "unknown key 'parted.bu'; did you mean 'by'?"),
        ({"rows": [{}]}, "the key 'rows.0.size' is missing"),
        ({"by_key": {"Math": {"size": 0}}}, "by_key.Math.size: expected more than 0, got 0"),
        ({"by_key": {"str": {"size": 0}}}, "by_key.str.size: expected more than 0, got 0"),
        ({"by_key": {"Math": {"Size": 1}}}, "unknown key 'by_key.Math.Size'; did you mean 'size'?"),
        ({"named": {"size": 0}}, "named.size: expected more than 0, got 0"),
        ({"named": {}}, "the key 'named.size' is missing"),
        ({"named": 3}, "named: expected a text or a mapping with keys such as size, from, got 3"),
        ({"either": {"size": -1}}, "either.size: expected more than 0, got -1"),
        ({"either": [{"size": 1}, {"size": "x"}]}, "either.1.size: expected a whole number, got 'x'"),
        ({"either": "b"}, "either: expected 'a' or a mapping with keys such as size, from or a list"),
        ({"rows": [{"size": "x" * 10_000}]}, "rows.0.size"),
        ({"by_key": ["a"]}, "by_key: expected a mapping, such as {name: value}, got a list"),
        ({"by_key": {"a": "b"}}, "by_key.a: expected a mapping with keys such as size, from, got 'b'"),
        ({"by_key": None}, "by_key: expected a mapping, such as {name: value}, got nothing"),
        ({"rows": 3}, "rows: expected a list, such as [one, two], got 3"),
        ({"rows": [{"size": 1.5}]}, "rows.0.size: expected a whole number, got 1.5"),
        ({"some": {}}, "some: expected 1 or more entries, got an empty mapping"),
        ({"some": {"a": "b", "c": []}}, "some.c: expected a text, got an empty list"),
        ([1], "expected a mapping of keys, got list"),
        (None, "expected a mapping of keys, got NoneType"),
    ],
)
def test_one_line_that_names_the_place(data: Any, words: str) -> None:
    """The path has keys and positions only, the message the rule and what came, within a readable length."""
    with pytest.raises(UserError) as caught:
        validated(Outer, data, "file.yaml")

    text = str(caught.value)
    assert text.startswith("file.yaml: ")
    assert words in text
    assert "\n" not in text
    assert len(text) < 450


def test_a_misspelt_key_comes_first() -> None:
    """Where a key is misspelt and therefore another one missing, the misspelt one is named."""
    with pytest.raises(UserError, match=r"unknown key 'rows\.0\.siez'"):
        validated(Outer, {"rows": [{"siez": 1}]}, "f")


def test_good_data_passes() -> None:
    """Good data becomes the model."""
    assert validated(Outer, {"either": [{"size": 2}]}, "f").either == (Inner(size=2),)
