"""Fronts: the table, picking a member, hypervolume over time; on a made-up run so that every number is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.history import History
from evomerge.report.front import best_where, front, front_text, knee, members, preferred, progress


def scores(history: History, number: int, task: str) -> float:
    found = history.entry(number).scores("select")
    assert found is not None
    return float(found[task]["accuracy"].mean(dtype=np.float64))


def test_rows_are_the_journals(front_run: History) -> None:
    """Members in the order of the first objective, with losses and scores as the journal has them."""
    data = front(front_run)

    assert len(data["members"]) > 1
    assert {m["id"] for m in data["members"]} == set(front_run.front)
    firsts = [m["losses"]["first"] for m in data["members"]]
    assert firsts == sorted(firsts)
    for m in data["members"]:
        assert m["scores"]["select"]["sums"]["score"] == pytest.approx(scores(front_run, m["id"], "sums"))
        assert set(m["scores"]["report"]) == {"sums", "words"}
    assert sum(m["winner"] for m in data["members"]) == 1
    assert front_text(data).count("\n") == len(data["members"]) + 1


def test_preferences_pick_the_ends_and_between(front_run: History) -> None:
    """All weight on one objective picks its best member; the knee has the least sum of scaled losses."""
    numbers = members(front_run)
    losses = np.array([front_run.losses(front_run.entry(i), "select") for i in numbers])

    assert preferred(front_run, {"first": 1.0}) == numbers[int(losses[:, 0].argmin())]
    assert preferred(front_run, {"second": 2.0}) == numbers[int(losses[:, 1].argmin())]
    scaled = (losses - losses.min(axis=0)) / np.ptp(losses, axis=0)
    assert knee(front_run) == numbers[int(scaled.sum(axis=1).argmin())]


def test_best_where_a_threshold_holds(front_run: History) -> None:
    """The best on one task among members that reach a score on another."""
    numbers = members(front_run)
    middle = sorted(scores(front_run, i, "words") for i in numbers)[len(numbers) // 2]

    picked = best_where(front_run, "sums", [f"words>={middle}"])
    able = [i for i in numbers if scores(front_run, i, "words") >= middle]
    assert scores(front_run, picked, "sums") == max(scores(front_run, i, "sums") for i in able)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h: best_where(h, "sums", ["words>=2"]), "no member of the front has words>=2"),
        (lambda h: best_where(h, "sums", ["words>0.5"]), "expected TASK>=NUMBER"),
        (lambda h: best_where(h, "sums", ["wrods>=0.5"]), "did you mean 'words'"),
        (lambda h: best_where(h, "sum", []), "did you mean 'sums'"),
        (lambda h: preferred(h, {"fist": 1.0}), "did you mean 'first'"),
        (lambda h: preferred(h, {"first": -1.0}), "weights are 0 or more"),
        (lambda h: preferred(h, {"first": 0.0}), "one of them above 0"),
    ],
)
def test_wrong_picks_are_told(front_run: History, call: Callable[[History], Any], words: str) -> None:
    """Each in one line, with the nearest name."""
    with pytest.raises(UserError, match=words):
        call(front_run)


def test_hypervolume_grows(front_run: History) -> None:
    """The front so far only gets better, within the unit box."""
    curve = progress(front_run)

    values = [v for _, v in curve]
    assert len(curve) > 10
    assert values == sorted(values)
    assert 0.0 < values[-1] <= 1.0


def test_the_command(front_run: History, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and a picked member's recipe from the command line; errors end with status 2."""
    assert main(["front", str(front_run.path)]) == 0
    assert "non-dominated" in capsys.readouterr().out
    assert main(["front", str(front_run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objectives"] == ["first", "second"]
    assert main(["front", str(front_run.path), "--prefer", "first=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == preferred(front_run, {"first": 1.0})
    assert main(["front", str(front_run.path), "--where", "sums>=0.1"]) == 2
    assert main(["front", str(front_run.path), "--prefer", "first"]) == 2


def test_one_objective_has_a_front_of_one(finished_run: Path) -> None:
    """A scalar run's front is its winner."""
    history = History.read(finished_run)

    assert members(history) == (history.winner_id,)
