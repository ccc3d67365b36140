"""Plans: plain arrays that travel."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from evomerge.prepare import prepare
from evomerge.score.plan import item_sets


def test_plans_are_picklable_without_torch(experiment_with: Callable[..., Any]) -> None:
    """What travels to workers holds numpy arrays only and keeps its id."""
    for plan in prepare(experiment_with()).plans.values():
        data = pickle.dumps(plan)

        assert b"torch" not in data
        assert pickle.loads(data).id == plan.id


def test_trees_are_consistent(experiment_with: Callable[..., Any]) -> None:
    """Every choice has targets; rows point at the token in front of the target; positions follow the context."""
    for plan in prepare(experiment_with()).plans.values():
        for tree in plan.trees:
            context = int((tree.segments == 0).sum())

            assert set(tree.owners) == set(range(len(tree.lengths)))
            assert np.array_equal(tree.positions[:context], len(plan.prefix) + np.arange(context))
            for c in range(len(tree.lengths)):
                rows, targets = tree.rows[tree.owners == c], tree.targets[tree.owners == c]
                branch = tree.tokens[tree.segments == c + 1]
                assert rows[0] == context - 1
                assert np.array_equal(branch, targets[:-1]), "all but the last target are inputs of the branch"
                assert np.array_equal(tree.tokens[rows[1:]], targets[:-1])
                assert np.array_equal(tree.positions[rows], len(plan.prefix) + context - 1 + np.arange(len(rows)))


def test_item_sets_cover_every_split(experiment_with: Callable[..., Any]) -> None:
    """One full item set a split, over all tasks, disjoint."""
    plans = prepare(experiment_with()).plans
    sets = item_sets(plans)

    assert {s: i.count for s, i in sets.items()} == {"search": 24, "select": 12, "report": 16}
    for task, plan in plans.items():
        positions = [p for i in sets.values() for p in i.tasks[task]]
        assert sorted(positions) == list(range(len(plan.trees)))
