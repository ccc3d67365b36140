"""The records that travel: genomes, item sets and results."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from evomerge.proposal import Evaluation, ItemSet, Proposal, Result, frozen_genome


def test_genomes_are_copies() -> None:
    """A genome is a read-only float64 copy; what it was made of may change later."""
    source = np.array([0.0, 0.5, 1.0], np.float32)
    g = frozen_genome(source)
    source[0] = 1.0

    assert g.tolist() == [0.0, 0.5, 1.0]
    assert g.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        g[0] = 0.5


@pytest.mark.parametrize("bad", [[1.5], [-1e-9], [float("nan")], [float("inf")], [[0.5]], 0.5])
def test_what_is_no_genome(bad: object) -> None:
    """Points off the cube, numbers that are not finite and other shapes are refused."""
    with pytest.raises(ValueError, match="unit cube"):
        frozen_genome(bad)  # type: ignore[arg-type]


def test_item_sets_are_known_by_their_items() -> None:
    """The id depends on tasks and positions, not on the name or the order of tasks; the count is over all tasks."""
    a = ItemSet("search", {"t": (0, 1), "u": (2,)})

    assert a.id == ItemSet("other", {"u": (2,), "t": (0, 1)}).id
    assert len({a.id, ItemSet("a", {"t": (1, 0), "u": (2,)}).id, ItemSet("a", {"t": (0, 1)}).id}) == 3
    assert (len(a.id), a.count) == (16, 3)


def test_one_loss() -> None:
    """`loss` is the only loss of a scalar search; several losses have none."""
    assert Result(np.array([0.25])).loss == 0.25
    with pytest.raises(ValueError, match="told 2 losses"):
        _ = Result(np.array([0.25, 0.5])).loss


def test_records_travel() -> None:
    """Records survive pickling, for workers in other processes."""
    p = Proposal(3, 1, genome=frozen_genome([0.5]), parents=(1, 2))
    items = ItemSet("search", {"t": (0, 1)})

    back = pickle.loads(pickle.dumps(p))
    assert (back.id, back.group, back.parents, back.genome.tolist()) == (3, 1, (1, 2), [0.5])
    assert pickle.loads(pickle.dumps(items)).id == items.id
    assert pickle.loads(pickle.dumps(Evaluation("failed:nan", reason="x"))) == Evaluation("failed:nan", reason="x")
