"""Answers judged: numbers in many scripts, patterns, normalisation; and what a file may not ask for."""

from __future__ import annotations

import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import UserError
from evomerge.schema import validated
from evomerge.tasks.base import Item
from evomerge.tasks.generation import MAX_TEXT, Extract, GenerationSpec, Normalise, SlowPattern, numbers, right, tidy

NUMBERS: list[tuple[str, str, list[float]]] = [
    ("The answer is 1,234.50 dollars.", ".", [1234.5]),
    ("Sie zahlt 1.234,5 Euro.", ",", [1234.5]),
    ("10-5=5", ".", [10, 5, 5]),
    ("(3)-4, x-2", ".", [3, 4, 2]),
    ("-5, \u22127, -$3.50, $-4, \uff0d6", ".", [-5, -7, -3.5, -4, -6]),
    ("\uff11\uff18\u500b", ".", [18]),
    ("\uff11\uff0c\uff12\uff13\uff14\uff0e\uff15", ".", [1234.5]),
    ("\u0663\u066b\u0665 \u0967\u0968", ".", [3.5, 12]),
    ("1\u00a0234 and 1'234'567 and 1\u2019000", ".", [1234, 1234567, 1000]),
    ("1,2,3", ".", [1, 2, 3]),
    ("12,3456 1,234,56", ".", [12, 3456, 1234, 56]),
    (".5 and 0.5", ".", [0.5, 0.5]),
    ("3. 4", ".", [3, 4]),
    ("1e3, 2e, 3e-2", ".", [1000, 2, 0.03]),
    ("50% of 3/4", ".", [50, 3, 4]),
    ("- 4", ".", [4]),
    ("x\u00b2 \u00bd none \u4e00", ".", []),
    ("007", ".", [7]),
]


@pytest.mark.parametrize(("text", "decimal", "expected"), NUMBERS, ids=[t for t, _, _ in NUMBERS])
def test_numbers(text: str, decimal: str, expected: list[float]) -> None:
    """Signs, currency, grouping, decimals, exponents, digits of other scripts."""
    assert [float(Decimal(n)) for n in numbers(text, decimal)] == expected


@given(value=st.decimals(-(10**9), 10**9, allow_nan=False, places=3), grouped=st.booleans(), comma=st.booleans())
def test_a_printed_number_is_read_back(value: Decimal, grouped: bool, comma: bool) -> None:
    """Whatever Python prints, with groups or without, either decimal mark."""
    text = f"{value:,}" if grouped else f"{value}"
    if comma:
        text = text.translate(str.maketrans(".,", ",."))

    assert [Decimal(n) for n in numbers(f"so {text} it is", "," if comma else ".")] == [value]


@given(text=st.text(max_size=200), decimal=st.sampled_from(".,"))
def test_any_text_gives_numbers_that_decimal_takes(text: str, decimal: str) -> None:
    """Junk gives numbers or none, never an error."""
    assert all(Decimal(n).is_finite() for n in numbers(text, decimal))


@pytest.mark.parametrize(
    ("text", "targets", "extract", "normalise", "expected"),
    [
        (" 19", ["19"], None, ("strip",), True),
        (" 19", ["19"], None, (), False),
        ("Nineteen", ["19", "nineteen"], None, ("case",), True),
        ("", ["19"], None, ("strip",), False),
        ("the  red, hat!", ["The red hat"], None, ("case", "punctuation", "spaces"), True),
        ("\uff21\uff22", ["AB"], None, ("unicode",), True),
        ("\uff21\uff22", ["AB"], None, (), False),
        ("So 3 + 4 = 7", ["7"], {"number": True}, ("strip",), True),
        ("So 3 + 4 = 7", ["3"], {"number": True, "take": "first"}, (), True),
        ("$1,000.00", ["1000"], {"number": True}, (), True),
        ("0.3333334", ["0.3333333"], {"number": True}, (), True),
        ("0.3333334", ["0.3333333"], {"number": True, "tolerance": 0}, (), False),
        ("3.14", ["3"], {"number": True, "tolerance": 0.2}, (), True),
        ("none", ["3"], {"number": True}, (), False),
        ("#### 42\n#### 43", ["43"], {"regex": r"#### (\S+)"}, (), True),
        ("#### 42\n#### 43", ["42"], {"regex": r"#### (\S+)", "take": "first"}, (), True),
        ("#### 1,042 apples", ["1042"], {"regex": "#### (.+)", "number": True}, (), True),
        ("42", ["42"], {"regex": r"#### (\S+)"}, (), False),
        ("(B)", ["B"], {"regex": "[A-D]"}, (), True),
        ("a or b", ["b"], {"regex": r"(?:(a)|b)"}, (), False),
    ],
)
def test_right(text: str, targets: list[str], extract: Any, normalise: tuple[Normalise, ...], expected: bool) -> None:
    """Extraction, then normalisation, then comparison with any accepted answer."""
    how = None if extract is None else Extract.model_validate(extract)

    assert right(text, targets, how, normalise) is expected


def test_only_the_end_of_a_huge_text_counts() -> None:
    """A bounded number of characters is looked at: the last ones."""
    how = Extract(number=True, take="first")

    assert right("1 " + " " * MAX_TEXT + "2", ["2"], how, ())


@given(text=st.text(max_size=50), how=st.sets(st.sampled_from(["strip", "spaces", "case", "punctuation", "unicode"])))
def test_normalising_is_stable(text: str, how: set[Normalise]) -> None:
    """White space and punctuation that an option removes are gone."""
    once = tidy(text, tuple(how))

    assert "strip" not in how or once == once.strip()
    assert "spaces" not in how or "  " not in once
    assert "punctuation" not in how or not set(once) & set(".,!?")


def test_endless_patterns_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catastrophic backtracking raises within a bounded time, with the pattern named."""
    monkeypatch.setattr("evomerge.tasks.generation.PATTERN_SECONDS", 0.05)

    with pytest.raises(SlowPattern, match=r"'\(a\+\)\+\$' took longer than 0.05 s on an answer of 5001 characters"):
        right("a" * 5000 + "!", ["a"], Extract(regex="(a+)+$"), ())


def test_extract_travels() -> None:
    """Specs are pickled to workers; patterns are compiled there again."""
    how = pickle.loads(pickle.dumps(Extract(regex=r"(\d+)")))

    assert how.answer("a 1 b 22") == "22"


# -- files ----------------------------------------------------------------------------------------------------


def loaded(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[Item, ...]:
    (folder / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {"name": "t", "kind": "generation", "data": "items.jsonl", **fields}
    return validated(GenerationSpec, data, "task").load(folder)


def rows(count: int = 30, **fields: Any) -> list[dict[str, Any]]:
    return [{"question": f"{n}+1=", "target": str(n + 1), **fields} for n in range(count)]


def test_targets(tmp_path: Path) -> None:
    """A text, a number, or a list of accepted ones; the first one is what few-shot examples show."""
    for target, expected in (("x", ("x",)), (3, ("3",)), (0.5, ("0.5",)), (["a", 2], ("a", "2"))):
        items = loaded(tmp_path, rows(answer=target), target="answer")
        assert {i.content.targets for i in items} == {expected}
        assert GenerationSpec(kind="generation", name="t", data="x").answer_of(items[0].content) == expected[0]


def test_questions_are_what_makes_items_equal(tmp_path: Path) -> None:
    """The same question with another answer is the same item."""
    items = loaded(tmp_path, rows() + rows(target="0"))

    assert len({i.digest for i in items}) == 30
    assert len(items) == 60


def test_examples_show_the_target(tmp_path: Path) -> None:
    """Few-shot examples of a generation task: prompt and target, or the working that a template takes."""
    (tmp_path / "shots.jsonl").write_text('{"question": "9+9=", "target": "18", "answer": "9 and 9 are 18. #### 18"}\n')

    few = {"data": "shots.jsonl", "count": 1}
    assert {(s.prompt, s.answer) for s in loaded(tmp_path, rows(), few_shot=few)[0].content.shots} == {("9+9=", "18")}
    worked = loaded(tmp_path, rows(), few_shot={**few, "answer": " {answer}"})
    assert worked[0].content.shots[0].answer == " 9 and 9 are 18. #### 18"


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"target": None}, {}, "line 1: 'target' should be a text, a number or a list of them, got None"),
    ({"target": True}, {}, "got True"),
    ({"target": []}, {}, r"got \[\]"),
    ({"target": ["a", {}]}, {}, "should be a text"),
    ({"target": "  "}, {}, "line 1: 'target' is empty once normalised"),
    ({"target": "?!"}, {"normalise": ["punctuation"]}, "is empty once normalised"),
    ({"target": "none"}, {"extract": "number"}, "line 1: 'target' should be one number .extract: number., got 'none'"),
    ({"target": "3/4"}, {"extract": "number"}, "should be one number"),
    ({}, {"target": "anser"}, "the field 'anser' .*missing"),
    ({}, {"extract": {}}, "extract: give a regex, or number: true, or both"),
    ({}, {"extract": {"regex": "("}}, "extract.regex: is no regular expression"),
    ({}, {"extract": {"regex": "x" * 501}}, "extract.regex: .*at most 500"),
    ({}, {"extract": {"regex": "(?R)?a"}}, "recursive patterns are not supported"),
    ({}, {"extract": {"regex": "((a{1000}){1000}){9}"}}, "multiply to 9000000, at most 10000"),
    ({}, {"extract": {"regx": "a"}}, "unknown key 'extract.regx'; did you mean 'regex'"),
    ({}, {"extract": {"number": True, "tolerance": float("nan")}}, "extract.tolerance"),
    ({}, {"max_tokens": 0}, "max_tokens: .*got 0"),
    ({}, {"max_tokens": 100_000}, "max_tokens: .*32768"),
    ({}, {"stop": [""]}, "stop.0: "),
    ({}, {"stop": ["x"] * 17}, "stop: .*at most 16"),
    ({}, {"normalise": ["lower"]}, "normalise.0: "),
    ({}, {"metric": "accuracy"}, "unknown metric 'accuracy'"),
]


@pytest.mark.parametrize(("row", "fields", "words"), BAD)
def test_what_is_wrong_is_named(tmp_path: Path, row: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    """Bad targets by file and line, bad keys by name, before any model is loaded."""
    with pytest.raises(UserError, match=words) as caught:
        loaded(tmp_path, rows(**row), **fields)
    assert "\n" not in str(caught.value)
