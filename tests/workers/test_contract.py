"""The contract of executors, over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.workers import Done, Executor
from evomerge.workers.fake import FakeEvaluator
from evomerge.workers.inline import InlineExecutor
from evomerge.workers.local import LocalExecutor

Make = Callable[..., Executor]
ITEMS = ItemSet("search", {"a": (0, 1, 2), "b": (5, 3)})


def unit(n: int, jobs: int = 1) -> WorkUnit:
    recipes = [Recipe.model_validate({"base": f"base-{n}-{j}", "merge": []}) for j in range(jobs)]
    return WorkUnit(n, tuple(Job(10 * n + j, 0, r, ITEMS) for j, r in enumerate(recipes)))


@pytest.fixture(params=["inline", pytest.param("local", marks=pytest.mark.slow), "local-2"])
def executor(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Executor] = []

    def make(**settings: Any) -> Executor:
        evaluator = partial(FakeEvaluator, **settings)
        if request.param == "inline":
            made.append(InlineExecutor(evaluator))
        else:
            made.append(LocalExecutor(evaluator, count=2 if request.param == "local-2" else 1, timeout_seconds=60))
        return made[-1]

    yield make
    for e in made:
        e.close()


def drained(executor: Executor, jobs: int) -> list[Done]:
    done: list[Done] = []
    for _ in range(600):
        done += executor.wait(0.1)
        if len(done) >= jobs:
            return done
    raise AssertionError(f"{len(done)} of {jobs} jobs came back")


def test_every_job_comes_back_once(executor: Make) -> None:
    """Units of one and of several jobs: each job is answered once, with its own scores."""
    running = executor()
    units = [unit(n, 1 + n % 3) for n in range(7)]
    for u in units:
        running.submit(u)
    jobs = [j for u in units for j in u.jobs]
    done = drained(running, len(jobs))

    assert sorted(j.proposal for j, _, _ in done) == sorted(j.proposal for j in jobs)
    expected = {j.proposal: FakeEvaluator().evaluate(WorkUnit(0, (j,)))[0][0] for j in jobs}
    for job, evaluation, _ in done:
        assert evaluation.ok
        assert job in jobs
        for task, at in ITEMS.tasks.items():
            for metric in ("accuracy", "cross_entropy"):
                column = evaluation.scores[task][metric]
                assert column.shape == (len(at),)
                assert np.array_equal(column, expected[job.proposal].scores[task][metric])
    assert running.wait(0.01) == []


def test_failed_candidates_are_results(executor: Make) -> None:
    """A recorded failure is no exception and does not touch the other jobs of its unit."""
    running = executor(failures={11: "nan", 20: "error"})
    for n in (1, 2):
        running.submit(unit(n, 3))
    done = {j.proposal: e for j, e, _ in drained(running, 6)}

    assert {p: e.status for p, e in done.items() if not e.ok} == {11: "failed:nan", 20: "failed:error"}
    assert done[11].reason == "made up"
    assert done[11].scores is None


def test_work_may_be_submitted_at_any_time(executor: Make) -> None:
    """Waiting with nothing to do returns nothing; later units are served by the same workers."""
    running = executor()

    assert running.wait(0.01) == []
    for n in range(3):
        running.submit(unit(n))
        assert [j.proposal for j, _, _ in drained(running, 1)] == [10 * n]


def test_close_drops_what_is_queued(executor: Make) -> None:
    """After close nothing comes back, and closing again is harmless."""
    running = executor()
    for n in range(4):
        running.submit(unit(n))
    running.close()
    running.close()

    assert running.wait(0.01) == []
