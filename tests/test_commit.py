"""Committing: results enter the journal in candidate order, whoever finishes first, and never twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.commit import Committer
from evomerge.errors import RunError
from evomerge.journal import Journal, read
from evomerge.manifest import Manifest
from evomerge.proposal import Evaluation, ItemSet, Telemetry, WorkUnit
from evomerge.recipe import Recipe
from evomerge.rundir import RunDirectory, read_telemetry
from evomerge.workers import Done
from evomerge.workers.fake import FakeEvaluator

SEARCH = ItemSet("search", {"t": (0, 1, 2)})
SELECT = ItemSet("select", {"t": (3, 4)})


class Scrambled:
    """An executor that hands results back in any order, in any portions."""

    def __init__(self, seed: int = 0, portion: int = 2, failures: dict[int, str] | None = None) -> None:
        self._rng = random.Random(seed)
        self._portion = portion
        self._evaluator = FakeEvaluator(metrics=("accuracy",), failures=failures or {})
        self._queue: list[WorkUnit] = []
        self.units: list[WorkUnit] = []

    @property
    def proposals(self) -> list[int]:
        """What was submitted, in order."""
        return [u.jobs[0].proposal for u in self.units]

    def submit(self, unit: WorkUnit) -> None:
        self._queue.append(unit)
        self.units.append(unit)

    def wait(self, seconds: float) -> list[Done]:
        assert self._queue, "waiting for a result that nobody computes"
        self._rng.shuffle(self._queue)
        done, self._queue = self._queue[: self._portion], self._queue[self._portion :]
        return [(j, *r) for u in done for j, r in zip(u.jobs, self._evaluator.evaluate(u), strict=True)]

    def close(self) -> None:
        self._queue.clear()

    @property
    def idle(self) -> bool:
        """True where every unit was handed back."""
        return not self._queue


class Run:
    """A journal, an executor and a committer over one folder."""

    def __init__(self, folder: Path, executor: Scrambled) -> None:
        self.folder, self.executor = folder, executor

    def evaluate(self, *groups: tuple[Iterable[tuple[int, Recipe]], ItemSet], stop_after: int = 10**9) -> list[Any]:
        """(proposal, evaluation) of all groups; a `stop_after` drops everything behind that many results."""
        out: list[Any] = []
        with (
            RunDirectory(self.folder) as rundir,
            Journal(self.folder / "journal.jsonl") as journal,
            closing(Committer(journal, self.executor, rundir, lambda: False)) as committer,
        ):
            for group, items in ((list(g), i) for g, i in groups):
                committer.submit(group, items)
                for proposal, recipe in group:
                    pair = (proposal, committer.commit(proposal, recipe, items))
                    out.append(pair)
                    told = read(self.folder / "journal.jsonl")[0]
                    assert pair[0] in [e["id"] for e in told], "in the journal before it is yielded"
                    if len(out) == stop_after:
                        return out
            self.cached = sum("cached" in e for e in self.told)
        return out

    @property
    def journal(self) -> bytes:
        return (self.folder / "journal.jsonl").read_bytes()

    @property
    def told(self) -> list[dict[str, Any]]:
        return read(self.folder / "journal.jsonl")[0]


@pytest.fixture(scope="module")
def recipes(manifest_of: Any) -> list[Recipe]:
    """Ten different canonical recipes."""
    m: Manifest = manifest_of()

    def one(weight: float) -> Recipe:
        rule = {"method": "task_arithmetic", "sources": {"math": {"weight": weight}}}
        return Recipe.model_validate({"merge": [rule]}).canonical(m)

    return [one(0.1 * (i + 1)) for i in range(10)]


def test_order_is_that_of_the_candidates(tmp_path: Path, recipes: list[Recipe]) -> None:
    """Whatever the order of finishing and the number that finish at once, the journal is the same bytes."""
    journals = set()
    for n, (seed, portion) in enumerate(itertools.product(range(3), (1, 2, 7))):
        run = Run(tmp_path / str(n), Scrambled(seed, portion))
        done = run.evaluate((enumerate(recipes), SEARCH))
        assert [p for p, _ in done] == list(range(10))
        assert [e["id"] for e in run.told] == list(range(10))
        journals.add(run.journal)

    assert len(journals) == 1


def test_results_belong_to_their_candidates(tmp_path: Path, recipes: list[Recipe]) -> None:
    """Each candidate gets the scores of its own recipe."""
    run = Run(tmp_path, Scrambled(3, 4))

    done = run.evaluate((enumerate(recipes), SEARCH))

    alone = FakeEvaluator(metrics=("accuracy",))
    for (_, evaluation), recipe in zip(done, recipes, strict=True):
        rng = np.random.Generator(np.random.PCG64(int(recipe.id[:12], 16)))
        assert np.array_equal(evaluation.scores["t"]["accuracy"], rng.random(3).astype(np.float32))
    assert alone.failures == {}


def test_equal_recipes_are_evaluated_once(tmp_path: Path, recipes: list[Recipe]) -> None:
    """Copies within a group share one evaluation; each is told, and the copies are marked as cached."""
    a, b = recipes[:2]
    run = Run(tmp_path, Scrambled(1))

    done = run.evaluate(([(0, a), (1, b), (2, a), (3, a)], SEARCH))

    assert run.executor.proposals == [0, 1]
    assert run.cached == 2
    assert [e.get("cached", False) for e in run.told] == [False, False, True, True]
    assert done[0][1].scores["t"]["accuracy"].tobytes() == done[3][1].scores["t"]["accuracy"].tobytes()


def test_known_recipes_are_not_evaluated_again(tmp_path: Path, recipes: list[Recipe]) -> None:
    """A recipe of an earlier group is answered from the cache on the same items, and evaluated on others."""
    a, b = recipes[:2]
    run = Run(tmp_path, Scrambled())

    run.evaluate(([(0, a)], SEARCH), ([(1, b), (2, a)], SEARCH), ([(2, a)], SELECT))

    assert [(u.jobs[0].proposal, u.jobs[0].items.name) for u in run.executor.units] == [
        (0, "search"),
        (1, "search"),
        (2, "select"),
    ]


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_failures_are_told_with_their_reason(tmp_path: Path, recipes: list[Recipe], failure: str) -> None:
    """A failed candidate is a recorded result; a copy of it, in the group or later, shares it."""
    a, b = recipes[:2]
    run = Run(tmp_path, Scrambled(failures={0: failure}))

    done = run.evaluate(([(0, a), (1, b), (2, a)], SEARCH), ([(3, a)], SEARCH))

    assert [e.status for _, e in done] == [f"failed:{failure}", "ok", *[f"failed:{failure}"] * 2]
    assert [e["reason"] for e in run.told] == ["made up", "", "made up", "made up"]
    assert run.told[0]["scores"] is None
    assert run.executor.proposals == [0, 1]


@pytest.mark.parametrize("failures", [{}, {0: "nan"}, {1: "error", 4: "nan"}])
def test_replay_from_any_point(tmp_path: Path, recipes: list[Recipe], failures: dict[int, str]) -> None:
    """Stopped after any result and run again, the journal ends in the same bytes and nothing is scored twice."""
    a, b, c, d = recipes[:4]
    groups = (
        ([(0, a), (1, b), (2, a), (3, c)], SEARCH),
        ([(4, d), (5, b), (6, a)], SEARCH),
        ([(0, a), (4, d)], SELECT),
    )
    whole = Run(tmp_path / "whole", Scrambled(failures=failures))
    expected = whole.evaluate(*groups)

    for cut in range(len(expected)):
        folder = tmp_path / str(cut)
        if cut:
            first = Run(folder, Scrambled(5, failures=failures))
            first.evaluate(*groups, stop_after=cut)
            assert len(first.told) == cut
        second = Run(folder, Scrambled(6, 1, failures=failures))
        done = second.evaluate(*groups)

        assert second.journal == whole.journal
        assert [(p, e.status, e.reason) for p, e in done] == [(p, e.status, e.reason) for p, e in expected]
        assert second.executor.idle, "no result is left over that a later group could mistake for its own"
        recorded = {(e["id"], e["items"]) for e in second.told[:cut]}
        assert not recorded & {(u.jobs[0].proposal, u.jobs[0].items.id) for u in second.executor.units}


def test_a_copy_of_a_recorded_result_is_not_evaluated(tmp_path: Path, recipes: list[Recipe]) -> None:
    """Cut between two copies of a recipe, the second is answered by the recorded first, on these items only."""
    a = recipes[0]
    groups = (([(0, a), (1, a)], SEARCH), ([(0, a)], SELECT))
    Run(tmp_path, Scrambled()).evaluate(*groups, stop_after=1)
    run = Run(tmp_path, Scrambled())

    done = run.evaluate(*groups)

    assert [(u.jobs[0].proposal, u.jobs[0].items.name) for u in run.executor.units] == [(0, "select")]
    assert [len(e.scores["t"]["accuracy"]) for _, e in done] == [3, 3, 2]


def test_a_journal_of_another_order_is_refused(tmp_path: Path, recipes: list[Recipe]) -> None:
    """Recorded results on other items than the replay asks for end it, naming the event."""
    a, b = recipes[:2]
    Run(tmp_path, Scrambled()).evaluate(([(0, a), (1, b)], SEARCH))

    with pytest.raises(RunError, match="event 0: the journal has results of candidate 0"):
        Run(tmp_path, Scrambled()).evaluate(([(0, a), (1, b)], SELECT))
    with pytest.raises(RunError, match="results of candidate 0 where the replay has 1"):
        Run(tmp_path, Scrambled()).evaluate(([(1, b), (0, a)], SEARCH))


def test_telemetry_stays_beside_the_journal(tmp_path: Path, recipes: list[Recipe]) -> None:
    """One line of telemetry for each evaluation, none of it in the journal."""
    run = Run(tmp_path, Scrambled())
    run.evaluate((enumerate(recipes[:3]), SEARCH))

    lines = read_telemetry(tmp_path / "telemetry.jsonl")
    assert sorted(x["proposal"] for x in lines) == [0, 1, 2]
    assert b"build_seconds" not in run.journal


def test_evaluation_knows_whether_it_is_ok() -> None:
    """Only the status `ok` is ok; telemetry is no part of it."""
    assert Evaluation("ok", {}).ok
    assert not Evaluation("failed:nan").ok
    assert not hasattr(Evaluation("ok"), "build_seconds")
    assert Telemetry().attempts == 1
