"""Multiple choice: where choices and the right one stand in a row."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.schema import validated
from evomerge.tasks.base import EDITS
from evomerge.tasks.multiple_choice import Choices, MultipleChoiceSpec
from evomerge.tasks.rows import Row

TEXTS = ["red", "green", "blue"]


def spec(**keys: Any) -> MultipleChoiceSpec:
    return validated(MultipleChoiceSpec, {"name": "t", "data": "x.jsonl", "prompt": "?", **keys}, "task")


def parsed(fields: dict[str, Any], **keys: Any) -> Choices:
    content = spec(**keys).parse(Row(fields, "x:1", "x line 1")).content
    assert isinstance(content, Choices)
    return content


@pytest.mark.parametrize(
    ("fields", "keys", "gold"),
    [
        ({"choices": TEXTS, "gold": 2}, {}, 2),
        ({"choices": TEXTS, "gold": "2"}, {}, 2),
        ({"choices": TEXTS, "gold": "C"}, {}, 2),
        ({"choices": ["2", "1", "0"], "gold": "2"}, {}, 2),  # a position, whatever the choices say
        ({"choices": TEXTS}, {"gold": 1}, 1),
        ({"a": "red", "b": "green", "c": "blue", "gold": 1}, {"choices": ["a", "b", "c"]}, 1),
        ({"o": {"text": TEXTS}, "gold": 1}, {"choices": "o.text"}, 1),
        ({"choices": TEXTS, "key": "B"}, {"gold_label": "key"}, 1),
        ({"choices": TEXTS, "key": "2"}, {"gold_label": "key"}, 1),
        ({"choices": TEXTS, "key": "x", "l": ["y", "z", "x"]}, {"gold_label": "key", "labels": "l"}, 2),
        ({"choices": TEXTS, "key": "1", "l": ["3", "2", "1"]}, {"gold_label": "key", "labels": "l"}, 2),
        ({"choices": TEXTS, "gold": "2"}, {"gold_label": "key"}, 2),  # no such field: the position
        ({"choices": ["2", "1", "0"], "right": "2"}, {"gold_text": "right"}, 0),
    ],
)
def test_the_right_one_is_found(fields: dict[str, Any], keys: dict[str, Any], gold: int) -> None:
    """By position (number, digits, letter), by label, by text, or always the same; choices in one field or several."""
    assert parsed(fields, **keys).gold == gold


@pytest.mark.parametrize(
    ("fields", "keys", "words"),
    [
        ({"gold": "3"}, {}, "should be the position of the right choice, 0 to 2 or A to C, got '3'"),
        ({"gold": "D"}, {}, "got 'D'"),
        ({"gold": "AB"}, {}, "got 'AB'"),
        ({"gold": ""}, {}, "got ''"),
        ({"gold": "9" * 5000}, {}, "got '999"),
        ({"gold": "red"}, {}, "got 'red'"),
        ({}, {"gold": 3}, "got 3"),
        ({"key": "D"}, {"gold_label": "key"}, "'key' should be one of the labels ['A', 'B', 'C'], got 'D'"),
        ({"key": "0"}, {"gold_label": "key"}, "got '0'"),
        ({"key": "A", "l": ["A"]}, {"gold_label": "key", "labels": "l"}, "'l' should be a list of 3 labels"),
        ({"key": ["A"]}, {"gold_label": "key"}, "got ['A']"),
        ({"right": "rot"}, {"gold_text": "right"}, "'right' should be one of the choices ['red', 'green', 'blue']"),
        ({}, {"choices": ["a", "b"]}, "the field 'a' is missing"),
    ],
)
def test_wrong_answers_are_named(fields: dict[str, Any], keys: dict[str, Any], words: str) -> None:
    """What names no choice is refused at the row's place."""
    with pytest.raises(UserError) as caught:
        parsed({"choices": TEXTS, **fields}, **keys)

    assert str(caught.value).startswith("x line 1: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("gold", [True, -1, 1.5])
def test_a_constant_is_a_position(gold: Any) -> None:
    """`gold` is a field's name or a position."""
    with pytest.raises(UserError):
        spec(gold=gold)


def test_letters() -> None:
    """{lettered} lists the choices, {letter} stands for one; the order of the options makes no other item."""
    keys = {"prompt": "Q\n{lettered}\nA:", "choice": " {letter}"}
    one = spec(**keys).parse(Row({"choices": TEXTS, "gold": 0}, "", ""))
    other = spec(**keys).parse(Row({"choices": TEXTS[::-1], "gold": 2}, "", ""))
    third = spec(**keys).parse(Row({"choices": ["x", *TEXTS[1:]], "gold": 2}, "", ""))

    assert one.content.prompt == "Q\nA. red\nB. green\nC. blue\nA:"
    assert one.content.choices == (" A", " B", " C")
    assert one.identity == other.identity != third.identity


def test_many_choices() -> None:
    """Choices behind Z have numbers for letters."""
    many = [f"c{n}" for n in range(77)]

    got = parsed({"choices": many, "gold": 76}, choice="{letter}")

    assert (got.choices[25], got.choices[26], got.choices[76], got.gold) == ("Z", "27", "77", 76)


# -- columns, values, edits ------------------------------------------------------------------------------------


def shaped(fields: dict[str, Any], **keys: Any) -> dict[str, Any]:
    s = spec(**keys)
    return dict(s._edited(s._replaced(s._named(Row(fields, "x:1", "x line 1")))).fields)


def test_columns_take_the_first_that_is_there() -> None:
    """A field, a field within one, a template, several fields as a list; null is as good as missing."""
    keys: dict[str, Any] = {"columns": {"q": ["a", "b.c", "{d} {e}", ["f", "g"]]}}

    assert shaped({"a": 1, "b": {"c": 2}}, **keys)["q"] == 1
    assert shaped({"a": None, "b": {"c": 2}}, **keys)["q"] == 2
    assert shaped({"d": "x", "e": "y"}, **keys)["q"] == "x y"
    assert shaped({"d": "x", "f": "y", "g": "z"}, **keys)["q"] == ["y", "z"]
    with pytest.raises(UserError, match=r"columns\.q needs 'a' or 'b\.c' or .*all of f, g; its fields are d"):
        shaped({"d": "x"}, **keys)


def test_columns_do_not_see_each_other() -> None:
    """All names are taken from the file's own fields, so two fields may be exchanged."""
    assert shaped({"a": 1, "b": 2}, columns={"a": ["b"], "b": ["a"]}) == {"a": 2, "b": 1}
    assert shaped({"a": 1}, columns={"self": ["a"]})["self"] == 1


def test_values_replace_and_edits_change() -> None:
    """Values are looked up, then texts and lists of texts are edited."""
    got = shaped(
        {"r": "cause", "p": " It fell. ", "c": ["Él", "İx", ""]},
        values={"r": {"cause": "because", "effect": "so"}},
        edits={"p": "drop_last", "c": "lower_first"},
    )

    assert got == {"r": "because", "p": "It fell", "c": ["él", "i̇x", ""]}
    assert EDITS["behind_hashes"]("a #### b\n#### 7 ") == "7"
    assert EDITS["behind_hashes"]("7") == "7"
    assert EDITS["strip"](" a b ") == "a b"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"values": {"r": {"x": "y"}}}, "the field 'r' should be one of x, got 'cause'"),
        ({"values": {"l": {"x": "y"}}}, "the field 'l' should be one of x, got [1]"),
        ({"values": {"z": {"x": "y"}}}, "the field 'z' (values) is missing"),
        ({"edits": {"l": "strip"}}, "the field 'l' should be text or a list of texts, got [1]"),
        ({"edits": {"z": "strip"}}, "the field 'z' (edits) is missing"),
    ],
)
def test_what_cannot_be_replaced_is_named(keys: dict[str, Any], words: str) -> None:
    """Unknown values and fields are refused at the row's place."""
    with pytest.raises(UserError) as caught:
        shaped({"r": "cause", "l": [1]}, **keys)

    assert str(caught.value).startswith(f"x line 1: {words}")
