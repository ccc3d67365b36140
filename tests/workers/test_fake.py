"""The made-up evaluator that other tests lean on."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.workers.fake import FakeEvaluator

ITEMS = ItemSet("search", {"a": (4, 2, 9)})


def job(proposal: int, base: str = "base") -> Job:
    return Job(proposal, 0, Recipe.model_validate({"base": base, "merge": []}), ITEMS)


def test_scores_depend_on_the_recipe_alone() -> None:
    """Equal recipes have equal scores whatever their number; other recipes have others."""
    fake = FakeEvaluator(metrics=("m",))
    (a, _), (b, _), (c, _) = fake.evaluate(WorkUnit(0, (job(1), job(2), job(3, "other"))))

    assert a.scores is not None
    assert b.scores is not None
    assert c.scores is not None
    assert np.array_equal(a.scores["a"]["m"], b.scores["a"]["m"])
    assert not np.array_equal(a.scores["a"]["m"], c.scores["a"]["m"])
    assert a.scores["a"]["m"].dtype == np.float32


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_failures_by_proposal(failure: str) -> None:
    """A failure is recorded for the named proposal only."""
    fake = FakeEvaluator(failures={2: failure})
    (a, _), (b, _) = fake.evaluate(WorkUnit(0, (job(1), job(2))))

    assert (a.status, b.status) == ("ok", f"failed:{failure}")
