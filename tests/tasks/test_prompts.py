"""Few-shot examples: never an item, the same for the same seed, and every bad key or file named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import load
from evomerge.errors import UserError
from evomerge.schema import validated
from evomerge.tasks.base import Item
from evomerge.tasks.multiple_choice import MultipleChoiceSpec

Data = dict[str, Any]


def row(n: int, **other: Any) -> Data:
    return {"question": f"What is {n}?", "choices": [" no", f" it is {n}"], "gold": 1, "lang": f"g{n // 2}", **other}


def write(path: Path, rows: list[Data]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def loaded(folder: Path, few_shot: Data, **other: Any) -> tuple[Item, ...]:
    data = {"name": "t", "data": "items.jsonl", "few_shot": {"data": "shots.jsonl", **few_shot}, **other}
    return validated(MultipleChoiceSpec, data, "task").load(folder)


def shots(items: tuple[Item, ...]) -> list[tuple[str, str]]:
    """The task's examples, after checking that all items share them."""
    assert len({i.content.shots for i in items}) == 1
    return [(s.prompt, s.answer) for s in items[0].content.shots]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty items, and a file of sixty rows that holds all of them."""
    write(tmp_path / "items.jsonl", [row(n) for n in range(40)])
    write(tmp_path / "shots.jsonl", [row(n) for n in range(60)])
    return tmp_path


def test_examples_are_never_items(folder: Path) -> None:
    """Of a file that also holds every item, near copies included, only the others are chosen."""
    write(folder / "shots.jsonl", [row(n, question=f" what IS {n}?") for n in range(60)])

    chosen = {p for p, _ in shots(loaded(folder, {"count": 20}))}
    assert chosen == {f" what IS {n}?" for n in range(40, 60)}


def test_what_no_split_takes_may_be_an_example(folder: Path) -> None:
    """One file for items and examples: examples come from the share that no split takes."""
    items = loaded(folder, {"data": "items.jsonl", "count": 3}, splits={"search": 0.4, "select": 0.2, "report": 0.2})

    assert len(items) < 40
    assert not {p for p, _ in shots(items)} & {i.content.prompt for i in items}


def test_examples_share_no_group_with_items(folder: Path) -> None:
    """Where parallel items are grouped, an example whose group has an item is left out too."""
    write(folder / "items.jsonl", [row(n) for n in range(0, 40, 2)])

    assert len(shots(loaded(folder, {"count": 30}))) == 30
    assert {p for p, _ in shots(loaded(folder, {"count": 20}, group_by="lang"))} == {
        f"What is {n}?" for n in range(40, 60)
    }


def test_the_seed_chooses_not_the_order(folder: Path) -> None:
    """The same seed chooses the same examples in the same order from a shuffled file; another seed others."""
    first = shots(loaded(folder, {"count": 5}))
    rows = [row(n) for n in range(60)]
    random.Random(1).shuffle(rows)
    write(folder / "shots.jsonl", rows + rows)

    assert shots(loaded(folder, {"count": 5})) == first
    assert len(set(first)) == 5
    assert shots(loaded(folder, {"count": 5, "seed": 1})) != first
    assert shots(loaded(folder, {"count": 6}))[:5] == first


def test_answers(folder: Path) -> None:
    """The right choice, rendered; or a template over the example's fields."""
    for prompt, answer in shots(loaded(folder, {"count": 4}, choice="{choice}!")):
        assert answer == f" it is {prompt.removeprefix('What is ').removesuffix('?')}!"
    assert {a for _, a in shots(loaded(folder, {"count": 4, "answer": " -> {gold}"}))} == {" -> 1"}


def test_without_examples_there_are_none(folder: Path) -> None:
    """No key, no shots."""
    items = MultipleChoiceSpec(name="t", data="items.jsonl").load(folder)

    assert {i.content.shots for i in items} == {()}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"few_shot": {"data": "shots.jsonl", "count": 21}}, "has 20 examples that are no items of the task, 21 were"),
        ({"few_shot": {"data": "none.jsonl", "count": 1}}, "'t', few_shot: .*none.jsonl: cannot be read"),
        ({"few_shot": {"data": "shots.jsonl", "count": 0}}, "few_shot.count: .*got 0"),
        ({"few_shot": {"data": "shots.jsonl", "count": 65}}, "few_shot.count: .*got 65"),
        ({"few_shot": {"data": "shots.jsonl", "cuont": 2}}, "unknown key 'few_shot.cuont'; did you mean 'count'"),
        ({"few_shot": {"count": 2}}, "the key 'few_shot.data' is missing"),
        ({"few_shot": {"data": "shots.jsonl", "count": 2, "answer": "{goal}"}}, "line .*: the field 'goal' is missing"),
        ({"system": "You are kind."}, "system: is a turn of a chat; set chat_template: true"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, data: Data, words: str) -> None:
    """Too few examples, unreadable files, bad keys, bad templates."""
    with pytest.raises(UserError, match=words) as caught:
        validated(MultipleChoiceSpec, {"name": "t", "data": "items.jsonl", **data}, "task").load(folder)
    assert "\n" not in str(caught.value)


def test_paths_are_the_fitness_files(folder: Path, small_experiment: Path) -> None:
    """The examples' file stands relative to the file that names it; where it lies is no part of the identity."""
    ids = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        experiment = json.loads(small_experiment.read_text())
        tasks = [{"name": "t", "data": "../items.jsonl", "few_shot": {"data": f"{name}.jsonl", "count": 2}}]
        experiment["fitness"] = {"tasks": tasks}
        path = folder / name / "e.yaml"
        path.write_text(json.dumps(experiment))
        found = load(path)
        assert found.tasks[0].few_shot.data == str(folder / name / f"{name}.jsonl")  # type: ignore[attr-defined]
        ids.append(found.identity({}, {}, "float32"))
    assert ids[0] == ids[1]
