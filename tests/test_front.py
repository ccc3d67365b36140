"""Several objectives: the front in the journal, the history, the table and the progress."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.config import load
from evomerge.errors import UserError
from evomerge.history import History
from evomerge.pareto import fronts
from evomerge.prepare import prepare
from evomerge.progress import Terminal
from evomerge.refusals import check_algorithm
from evomerge.report.results import text_table
from evomerge.report.status import candidate, candidate_text, status, status_text
from evomerge.run import run
from evomerge.search import ALGORITHMS
from evomerge.warm import finalists_of

GOALS = [{"name": "sums", "tasks": ["sums"]}, {"name": "words", "tasks": ["words"]}]
With = Callable[..., Any]


@pytest.fixture(scope="module")
def two_goals(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run for two objectives, and what its progress said."""
    overrides = {"fitness.objectives": GOALS, "search.algorithm": "random"}
    experiment = load(small_experiment, overrides)
    # Population is a setting of cma-es and of random alike.
    out = tmp_path_factory.mktemp("front") / "run"
    said = StringIO()
    run(experiment, out, Terminal(said))
    return out, said.getvalue()


def test_the_front_is_non_dominated_on_select(two_goals: tuple[Path, str]) -> None:
    """Front members are the finalists that no other finalist dominates there; the winner is one and stands first."""
    history = History.read(two_goals[0])

    assert history.final is not None
    assert history.goals == ("sums", "words")
    ids = history.final["finalists"]
    losses = np.array([history.losses(history.entry(i), "select") for i in ids])
    assert losses.shape == (len(ids), 2)
    assert sorted(history.front) == [i for i, rank in zip(ids, fronts(losses), strict=True) if rank == 0]
    assert history.front[0] == history.winner_id


def test_front_members_are_reported_on(two_goals: tuple[Path, str]) -> None:
    """Every member has scores on all three splits."""
    history = History.read(two_goals[0])

    for i in history.front:
        assert set(history.entry(i).results) == {"search", "select", "report"}


def test_evaluations_have_every_loss(two_goals: tuple[Path, str]) -> None:
    """One column an objective, in place of one loss."""
    history = History.read(two_goals[0])

    for row in history.evaluations:
        assert "loss" not in row
        losses = history.losses(history.entry(row["id"]), row["split"])
        assert [row["loss.sums"], row["loss.words"]] == losses.tolist()


def test_texts_name_the_objectives(two_goals: tuple[Path, str]) -> None:
    """Progress and status count the front; a candidate has its losses by name; the table still works."""
    out, said = two_goals
    history = History.read(out)
    data = candidate(history, history.front[0])

    assert "front of " in said
    assert f"{status(out)['front']} candidates on the front" in status_text(status(out))
    assert set(data["splits"]["select"]["losses"]) == {"sums", "words"}
    assert "sums " in candidate_text(history, data)
    assert "winner" in text_table(history)


def test_a_front_warms_another_run(two_goals: tuple[Path, str], experiment_with: With) -> None:
    """Finalists of a run for several objectives are given best front first."""
    out, _ = two_goals
    history = History.read(out)

    recipes = finalists_of(out, experiment_with())
    assert len(recipes) == sum(history.entry(i).role != "baseline" for i in history.final["finalists"])  # type: ignore[index]


def test_a_scalar_algorithm_is_refused(experiment_with: With) -> None:
    """The complaint names the objectives and what can take several."""
    experiment = experiment_with(**{"fitness.objectives": GOALS})

    with pytest.raises(
        UserError, match=r"cma-es minimises one loss, the fitness has 2 objectives \(sums, words\).*random"
    ):
        prepare(experiment)


MEASURES = [{"name": t, "tasks": [t], "metric": "accuracy", "low": 0, "high": 1, "cells": 4} for t in ("sums", "words")]


@pytest.mark.parametrize(
    ("algorithm", "change"),
    [
        ("cma-es", {"fitness.objectives": GOALS}),
        ("random", {"fitness.objectives": GOALS, "search.items": {"policy": "adaptive"}}),
        ("greedy-soup", {"fitness.objectives": GOALS, "search.items": {"policy": "halving", "rungs": [6, 20]}}),
        ("niches", {"fitness.objectives": GOALS, "search.lag": 2}),
        (
            "cma-es",
            {
                "fitness.objectives": GOALS,
                "fitness.constraints": [{"name": "kept", "kind": "forgetting", "at_most": 1}],
            },
        ),
        ("nsga-ii", {}),
        ("nested-map", {"fitness.measures": MEASURES}),
        ("nsga-iii", {"search.items": {"policy": "adaptive"}}),
        ("tpe", {"search.items": {"policy": "adaptive"}}),
    ],
)
def test_a_refusal_names_all_that_would_do(algorithm: str, change: dict[str, Any], experiment_with: With) -> None:
    """Each algorithm in `use ...` passes as the experiment stands; no other one does."""
    experiment = experiment_with(**change)
    named: set[str] = set()
    passing = set()
    for name in ALGORITHMS:
        try:
            check_algorithm(experiment, name)
            passing.add(name)
        except UserError as e:
            if name == algorithm and "; use " in str(e):
                named = {a for a in re.findall(r"[\w-]+", str(e).rpartition("; use ")[2]) if a in ALGORITHMS}

    assert algorithm not in passing
    assert named == passing != set()


@pytest.mark.parametrize("algorithm", ["cma-es", "tpe"])
def test_the_winner_keeps_the_constraints(algorithm: str, experiment_with: With, tmp_path: Path) -> None:
    """A limit that few candidates keep on search and select decides who wins, whether the algorithm knows of it."""
    free = run(experiment_with(**{"search.algorithm": algorithm}), tmp_path / "free")
    means = [r["sums.accuracy"] for r in free.evaluations if r["split"] == "select"]
    limit = {"name": "sums", "tasks": ["sums"], "metric": "accuracy", "at_least": float(np.max(means))}
    overrides = {"search.algorithm": algorithm, "fitness.constraints": [limit]}

    history = run(experiment_with(**overrides), tmp_path / "bound")
    rows = {r["id"]: r["sums.accuracy"] for r in history.evaluations if r["split"] == "select"}
    assert history.winner_id is not None
    assert rows[history.winner_id] == max(rows.values())


def test_replay_is_exact(two_goals: tuple[Path, str], small_experiment: Path) -> None:
    """A finished run, run again, adds nothing."""
    out, _ = two_goals
    before = (out / "journal.jsonl").read_bytes()

    run(load(small_experiment, {"fitness.objectives": GOALS, "search.algorithm": "random"}), out)
    assert (out / "journal.jsonl").read_bytes() == before


def test_a_pareto_search_begins_with_the_front_so_far(experiment_with: With, tmp_path: Path) -> None:
    """NSGA-II's second stage asks first for what the first one left on the front; a cut journal is completed alike."""
    stages = [
        {"space": "one-weight-per-expert", "share": 0.5, "settings": {"population": 12}},
        {"space": "per-layer", "share": 0.5, "settings": {"population": 12}},
    ]
    change = {
        "fitness.objectives": GOALS,
        "search_space": {"stages": stages},
        "search": {"algorithm": "nsga-ii", "seed": 1, "probes": False, "budget": {"evaluations": 24}},
    }
    out = tmp_path / "out"
    history = run(experiment_with(**change), out)

    first = [e for e in history.entries.values() if e.stage <= 0]
    losses = np.array([history.losses(e, "search") for e in first])
    front = {e.recipe_id for e, rank in zip(first, fronts(losses), strict=True) if rank == 0}
    second = [e.recipe_id for e in history.entries.values() if e.stage == 1 and e.role == "search"]
    expressible = front & {e.recipe_id for e in first if e.stage == 0}
    assert len(expressible) > 1
    count = min(len(expressible), 6)  # at most half of the first generation
    assert set(second[:count]) <= expressible
    assert len(set(second[:count])) == count
    whole = (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-30]))
    run(experiment_with(**change), out)
    assert (out / "journal.jsonl").read_bytes() == whole
