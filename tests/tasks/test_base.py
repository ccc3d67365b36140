"""Tasks: items from files, stable splits, and every bad line named."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import UserError
from evomerge.schema import validated
from evomerge.tasks.base import SPLITS, Item, load_items, normalised, render
from evomerge.tasks.multiple_choice import MultipleChoiceSpec
from evomerge.tasks.rows import Row

Data = dict[str, Any]


def task(**data: Any) -> MultipleChoiceSpec:
    return validated(MultipleChoiceSpec, {"name": "t", "data": "items.jsonl", **data}, "task")


def item(n: Any, **other: Any) -> Data:
    return {"question": f"What is {n}?", "choices": ["a", "b", f"c{n}"], "gold": 1, **other}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def loaded(folder: Path, rows: list[Any], **data: Any) -> tuple[Item, ...]:
    write(folder / "items.jsonl", rows)
    return load_items(task(**data), folder)


def splits(items: tuple[Item, ...]) -> dict[str, str]:
    return {i.content.prompt: i.split for i in items}


def message(folder: Path, rows: list[Any], **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, rows, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("junk")


# -- splits ------------------------------------------------------------------------------------------------


def test_items_are_rendered_and_ordered(tmp_path: Path) -> None:
    """Items come search before select before report, each in file order, with their texts and place."""
    items = loaded(tmp_path, [item(n, id=f"q{n}") for n in range(60)])

    assert [SPLITS.index(i.split) for i in items] == sorted(SPLITS.index(i.split) for i in items)
    for split in SPLITS:
        numbers = [int(i.id[1:]) for i in items if i.split == split]
        assert numbers == sorted(numbers)
    first = next(i for i in items if i.id == "q7")
    assert (first.content.prompt, first.content.choices, first.content.gold) == ("What is 7?", ("a", "b", "c7"), 1)
    assert first.where == "items.jsonl:8"


def test_splits_do_not_depend_on_the_order(tmp_path: Path) -> None:
    """A shuffled file, or one with other items added, leaves every item in its split."""
    rows = [item(n) for n in range(80)]
    before = splits(loaded(tmp_path, rows))
    random.Random(1).shuffle(rows)

    assert splits(loaded(tmp_path, rows)) == before
    more = splits(loaded(tmp_path, [item(n) for n in range(100, 150)] + rows))
    assert before.items() <= more.items()


def test_shares_are_kept(tmp_path: Path) -> None:
    """Hash shares come out near what was asked; what is left over belongs to no split."""
    rows = [item(n) for n in range(2000)]

    counts = Counter(i.split for i in loaded(tmp_path, rows, splits={"search": 0.5, "select": 0.2, "report": 0.1}))

    assert counts["search"] == pytest.approx(1000, abs=90)
    assert counts["select"] == pytest.approx(400, abs=70)
    assert counts["report"] == pytest.approx(200, abs=60)
    assert sum(counts.values()) < 2000


def test_larger_shares_keep_items(tmp_path: Path) -> None:
    """The first split only grows when its share grows: nothing moves from search to report."""
    rows = [item(n) for n in range(200)]
    small, large = (
        splits(loaded(tmp_path, rows, splits={"search": s, "select": 0.1, "report": 0.1})) for s in (0.3, 0.6)
    )

    assert {p for p, s in small.items() if s == "search"} < {p for p, s in large.items() if s == "search"}


def test_equal_content_shares_a_split(tmp_path: Path) -> None:
    """Near copies (case, blanks, width, order of choices) fall into one split and have one digest."""
    rows: list[Any] = []
    for n in range(40):
        rows += [
            item(n, id=f"a{n}"),
            {"id": f"b{n}", "question": f"  WHAT is\t{n}\uff1f", "choices": [f"C{n}", "B", "a"], "gold": 0},
        ]

    items = {i.id: i for i in loaded(tmp_path, rows)}

    assert all(items[f"a{n}"].split == items[f"b{n}"].split for n in range(40))
    assert all(items[f"a{n}"].digest == items[f"b{n}"].digest for n in range(40))
    assert len({i.digest for i in items.values()}) == 40


def test_punctuation_counts() -> None:
    """1+2 and 1-2 are other questions; only case, width and white space are folded."""
    assert len({normalised(x) for x in ("1+2=", "1-2=", "12=")}) == 3
    assert normalised("  Straße \n \uff21 ") == normalised("strasse a")


def test_parallel_items_stay_together(tmp_path: Path) -> None:
    """With group_by, items of one group (translations, paraphrases) are all in one split."""
    rows = [item(f"{n}-{lang}", group=n) for n in range(40) for lang in ("en", "de", "fr")]

    items = loaded(tmp_path, rows, group_by="group")

    by_group: dict[str, set[str]] = {}
    for i in items:
        by_group.setdefault(i.content.prompt.split()[-1].split("-")[0], set()).add(i.split)
    assert len(by_group) == 40
    assert all(len(s) == 1 for s in by_group.values())
    assert set().union(*by_group.values()) == set(SPLITS)


def test_files_of_their_own(tmp_path: Path) -> None:
    """A split may be a file; the others are then cut from `data`, or files too."""
    write(tmp_path / "report.jsonl", [item(n) for n in range(100, 105)])

    items = loaded(
        tmp_path, [item(n) for n in range(40)], splits={"search": 0.5, "select": 0.5, "report": "report.jsonl"}
    )

    counts = Counter(i.split for i in items)
    assert counts["report"] == 5
    assert counts["search"] + counts["select"] == 40


def test_files_of_one_name_in_several_folders(tmp_path: Path) -> None:
    """Items without ids have distinct ones, although the splits' files are called the same."""
    for at, split in enumerate(SPLITS):
        write(tmp_path / split / "t.jsonl", [item(at * 10 + n) for n in range(3)])

    items = load_items(task(data=None, splits={s: f"{s}/t.jsonl" for s in SPLITS}), tmp_path)

    assert len({i.id for i in items}) == 9


def test_an_item_in_two_splits_is_refused(tmp_path: Path) -> None:
    """An item of the report file that also stands in the search data is refused with both places."""
    write(tmp_path / "report.jsonl", [item(100), {"question": "what IS 3?", "choices": ["c3", "a", "b"], "gold": 0}])

    text = message(
        tmp_path, [item(n) for n in range(9)], splits={"search": 0.5, "select": 0.5, "report": "report.jsonl"}
    )

    assert "items.jsonl:4" in text
    assert "report.jsonl:2" in text
    assert "splits must be disjoint" in text


def test_an_id_twice_is_refused(tmp_path: Path) -> None:
    """Ids name items in the journal, so they differ."""
    text = message(tmp_path, [item(n, id=n % 30) for n in range(31)])

    assert "the id '0' stands twice" in text


def test_empty_splits_are_refused(tmp_path: Path) -> None:
    """A share so small that nothing falls into it is named."""
    text = message(tmp_path, [item(n) for n in range(5)], splits={"search": 0.9, "select": 0.09, "report": 1e-6})

    assert "split has no items" in text


# -- fields ------------------------------------------------------------------------------------------------


def test_other_fields_and_templates(tmp_path: Path) -> None:
    """Templates put any field into prompt and choices; field names are settings."""
    rows = [{"a": n, "b": 2 * n, "opts": ["x", "y"], "right": 0} for n in range(30)]

    items = loaded(tmp_path, rows, prompt="{a}+{b}=", choice=" {choice}!", choices="opts", gold="right")

    assert {i.content.prompt for i in items} == {f"{n}+{2 * n}=" for n in range(30)}
    assert {i.content.choices for i in items} == {(" x!", " y!")}


BAD: list[tuple[Any, str]] = [
    ("not json", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({"question": "q", "gold": 0}, "the field 'choices' is missing"),
    ({"question": "q", "choices": ["a", "b"], "glod": 0}, "the field 'gold' is missing; did you mean 'glod'?"),
    (item(1, choices=["a"]), "'choices' should be a list of two or more texts"),
    (item(1, choices=["a", 3]), "'choices' should be a list of two or more texts"),
    (item(1, choices=["a", ""]), "'choices' should be a list of two or more texts"),
    (item(1, choices="ab"), "'choices' should be a list of two or more texts"),
    (item(1, choices=["a", "a"]), "two of the choices are equal"),
    (item(1, gold=3), "'gold' should be the position of the right choice, 0 to 2 or A to C, got 3"),
    (item(1, gold=-1), "got -1"),
    (item(1, gold="3"), "got '3'"),
    (item(1, gold=True), "got True"),
    (item(1, gold=1.0), "got 1.0"),
    ({"choices": ["a", "b"], "gold": 0}, "the field 'question' is missing"),
    ({"Question": "q", "choices": ["a", "b"], "gold": 0}, "did you mean 'Question'?"),
    (item(1, question=["q"]), "the field 'question' should be text, got list"),
    (item(1, question="\ud800"), "half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_bad_items_are_named_by_file_and_line(tmp_path: Path, row: Any, words: str) -> None:
    """The file and the line of a bad item are named, with what was expected."""
    text = message(tmp_path, [item(1), "", row, item(2)])

    assert "items.jsonl line 3: " in text
    assert words in text


def test_missing_group_field(tmp_path: Path) -> None:
    """An item without the field that group_by names is refused."""
    assert "the field 'group' (group_by) is missing" in message(tmp_path, [item(1)], group_by="group")


@pytest.mark.parametrize(("rows", "words"), [([], "holds no items"), (["", "  "], "holds no items")])
def test_empty_files_are_refused(tmp_path: Path, rows: list[str], words: str) -> None:
    """A file without items is refused by name."""
    text = message(tmp_path, rows)

    assert words in text
    assert "items.jsonl" in text


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A missing file and foreign bytes are refused by task and name."""
    with pytest.raises(UserError, match=r"task 't': .*items\.jsonl: cannot be read"):
        load_items(task(), tmp_path)
    (tmp_path / "items.jsonl").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"items\.jsonl: is not UTF-8 text"):
        load_items(task(), tmp_path)


def test_long_lines_are_refused(tmp_path: Path) -> None:
    """A line beyond the cap is refused by its place, without being parsed."""
    assert "line 2: longer than" in message(tmp_path, [item(1), '"' + "x" * 2_000_001])


# -- templates -----------------------------------------------------------------------------------------------


def test_templates_only_insert() -> None:
    """A place is replaced by a field's text: no attributes, indices, formats or expressions, and not twice."""
    fields = {"a": "{b}", "b": 7, "secret": "s"}

    assert render("{a} {b}", Row(fields, "", "here")) == "{b} 7"
    for template in ("{a.__class__}", "{a[0]}", "{b!r}", "{b:>9}", "{0}", "{}", "{{b}", "{ b }", "%(b)s", "$b"):
        assert render(template, Row(fields, "", "here")) == template.replace("{b}", "7")


def test_templates_name_the_missing_field() -> None:
    """A place without a field names the place and the nearest field."""
    with pytest.raises(UserError, match=r"here: the field 'qestion' is missing; did you mean 'question'\?"):
        render("{qestion}", Row({"question": "x"}, "", "here"))


# -- strangers' files ------------------------------------------------------------------------------------------

FIELDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**30),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.text(max_size=3), st.integers(), st.none()), max_size=4),
)
ROWS = st.one_of(
    st.text(max_size=40).map(lambda s: s.replace("\n", " ")),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("question", "choices", "gold", "id", "group"), FIELDS)).map(
        json.dumps
    ),
    st.sampled_from([json.dumps(item(n)) for n in range(30)]),
    st.sampled_from(['{"question": "\\ud83d", "choices": ["\\udc00", "b"], "gold": 0}', "\ufeff{}", "\x00", "{}\r{}"]),
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROWS, max_size=6), grouped=st.booleans())
def test_junk_lines_raise_only_user_errors(folder: Path, rows: list[str], grouped: bool) -> None:
    """Whatever a file holds, it is read into disjoint splits, or refused in one line."""
    (folder / "items.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))

    try:
        outcome: Any = load_items(task(group_by="group" if grouped else None), folder)
    except UserError as e:
        outcome = str(e)
    if isinstance(outcome, str):
        assert outcome
        assert "\n" not in outcome
    else:
        assert {i.split for i in outcome} == set(SPLITS)
