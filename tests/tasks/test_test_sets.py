"""Known test sets: found in any field and any near copy; refused where they would choose, welcome in the report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec
from evomerge.prepare import load_items
from evomerge.schema import validated
from evomerge.tasks.base import NOTHING, Allowed
from evomerge.tasks.test_sets import known, question_digest
from evomerge.tasks.test_sets import test_set_of as find

ASSETS = Path(__file__).parents[1] / "assets" / "eval"
MGSM = "Ein Kleid erfordert 2 Knäuel blaue Wolle und halb so viel weiße Wolle. Wie viele Knäuel braucht man insgesamt?"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        ("mgsm-de", "MGSM de"),
        ("mgsm-zh", "MGSM zh"),
        ("svamp", "SVAMP"),
        ("arc", "ARC-Easy test"),
        ("xcopa-tr", "XCOPA tr test"),
        ("blimp", "BLiMP"),
        ("blimp.hub", "BLiMP"),
        ("xcopa-it.hub", "XCOPA it test"),
        ("gsm8k", None),
        ("mmlu", None),
    ],
)
def test_rows_of_test_sets_are_known(name: str, benchmark: str | None) -> None:
    """Questions of test sets are found in either shape; training and validation rows are not."""
    assert {find(r.values()) for r in read(name)} == {benchmark}


def test_near_copies_are_found() -> None:
    """Case, blanks, punctuation, width and the field make no difference; another word does."""
    assert find([MGSM]) == "MGSM de"
    assert find([3, None, ["x"], "other", "  " + MGSM.upper().replace(" ", "\n").replace("?", " !")]) == "MGSM de"
    assert find([MGSM.replace("2", "\uff12")]) == "MGSM de"
    assert find([MGSM.replace("2", "3")]) is None
    assert question_digest(" ?! ") is None
    assert find(["", "?"]) is None


def test_the_list_is_whole() -> None:
    """All questions of the sets that the list names, each once, as truncated digests."""
    counts = Counter(known().values())

    assert counts["MGSM de"] == counts["MGSM en (GSM8K test)"] == 250
    assert counts["SVAMP"] == 300
    assert sum(counts.values()) > 4500
    assert all(len(d) == 12 and int(d, 16) >= 0 for d in known())


def fitness(tmp_path: Path, **splits: str) -> FitnessSpec:
    rows = [{"question": f"{n} and {n}?", "choices": ["a", "b"], "gold": 0} for n in range(30)]
    for n, split in enumerate(("search", "select", "report")):
        mine = rows[10 * n : 10 * n + 10]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mine), encoding="utf-8")
    files = {s: str(tmp_path / f"{s}.jsonl") for s in ("search", "select", "report")}
    return validated(FitnessSpec, {"tasks": [{"name": "t", "splits": {**files, **splits}}]}, "fitness")


@pytest.mark.parametrize("split", ["search", "select"])
def test_test_sets_do_not_choose(split: str, tmp_path: Path) -> None:
    """A test set among what is searched or selected on is refused by benchmark, count and line, unless allowed."""
    spec = fitness(tmp_path, **{split: str(ASSETS / "arc.jsonl")})

    with pytest.raises(UserError) as caught:
        load_items(spec.tasks, NOTHING)

    text = str(caught.value)
    assert "task 't': 4 of its search and select items are test questions of ARC-Easy test" in text
    assert "arc.jsonl:1" in text
    assert "splits.report only, or allow it with --allow-test-set" in text
    assert len(load_items(spec.tasks, Allowed(test_sets=True))["t"]) == 24


def test_test_sets_may_be_reported_on(tmp_path: Path) -> None:
    """The report split is what a test set is for."""
    spec = fitness(tmp_path, report=str(ASSETS / "arc.jsonl"))

    items = load_items(spec.tasks, NOTHING)["t"]

    assert {i.test_set for i in items if i.split == "report"} == {"ARC-Easy test"}


def test_joined_questions_are_found(tmp_path: Path) -> None:
    """A question in two columns is found once `columns` joins them."""
    path = str(ASSETS / "svamp.hub.jsonl")
    data = {"preset": "svamp", "data": path, "splits": {"search": 1e-9, "select": 0.999, "report": 1e-9}}
    spec = validated(FitnessSpec, {"tasks": [data]}, "fitness").tasks[0]

    assert [find(r.fields.values()) for r in spec.rows(Path(path), "t")] == ["SVAMP"] * 3
