"""Non-dominated sorting, crowding and the compromise, against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.pareto import compromise, crowding, fronts, hypervolume, order

LOSSES = st.tuples(st.integers(1, 25), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-3, 3).map(float))
)
"""Few levels, so that ties and copies are common."""


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(a <= b) and np.any(a < b))


@given(LOSSES)
def test_ranks_are_those_of_peeling(losses: np.ndarray) -> None:
    """A member's rank is one more than the largest among those that dominate it; 0 where none does."""
    rank = fronts(losses)

    assert set(rank) == set(range(rank.max() + 1))
    for i, x in enumerate(losses):
        above = [j for j in range(len(losses)) if dominates(losses[j], x)]
        assert rank[i] == (1 + max(rank[j] for j in above) if above else 0)


@given(LOSSES)
def test_order_is_by_front_and_complete(losses: np.ndarray) -> None:
    """A permutation that never puts a dominated member before one that dominates it."""
    at = order(losses)

    assert sorted(at) == list(range(len(losses)))
    place = {int(i): n for n, i in enumerate(at)}
    for i in range(len(losses)):
        for j in range(len(losses)):
            if dominates(losses[i], losses[j]):
                assert place[i] < place[j]


@given(LOSSES.filter(lambda x: x.shape[1] == 1))
def test_one_objective_is_plain_sorting(losses: np.ndarray) -> None:
    """Stable, so that equal losses keep the order of their numbers."""
    assert order(losses).tolist() == sorted(range(len(losses)), key=lambda i: (losses[i, 0], i))


def test_crowding_by_hand() -> None:
    """Ends are infinite; inner members have the scaled distance between their neighbours, summed over objectives."""
    losses = np.array([[0.0, 10.0], [1.0, 6.0], [2.0, 4.0], [10.0, 0.0]])

    assert crowding(losses) == pytest.approx([np.inf, 0.2 + 0.6, 0.9 + 0.6, np.inf])
    assert crowding(losses[:2]).tolist() == [np.inf, np.inf]
    assert crowding(np.ones((3, 2)))[1] == 0.0


def test_compromise_is_nearest_to_the_ideal_point() -> None:
    """Objectives count alike whatever their units; a constant one does not count."""
    losses = np.array([[0.0, 1000.0, 5.0], [0.2, 300.0, 5.0], [1.0, 0.0, 5.0]])

    assert compromise(losses) == 1
    assert compromise(losses[:1]) == 0


@given(LOSSES, st.randoms(use_true_random=False))
def test_violators_come_last_by_how_much(losses: np.ndarray, rng: object) -> None:
    """Whoever keeps the constraints is ordered as without them; the others follow by their violation."""
    violations = np.array([rng.choice([0.0, 0.0, 0.5, 1.5]) for _ in losses])  # type: ignore[attr-defined]
    at = order(losses, violations)

    assert sorted(at) == list(range(len(losses)))
    assert violations[at].tolist() == sorted(violations)
    kept = np.flatnonzero(violations == 0)
    if len(kept):
        assert at[: len(kept)].tolist() == kept[order(losses[kept])].tolist()


@given(LOSSES.filter(lambda x: x.shape[1] <= 3 and len(x) <= 8))
def test_hypervolume_counts_cells(losses: np.ndarray) -> None:
    """On the integer grid the volume is the number of unit cells that some vector dominates."""
    reference = np.full(losses.shape[1], 2.0)
    cells = np.stack(np.meshgrid(*[np.arange(-3, 2)] * losses.shape[1], indexing="ij"), axis=-1)
    cells = cells.reshape(-1, losses.shape[1])
    dominated = (losses[None] <= cells[:, None]).all(axis=2).any(axis=1)

    assert hypervolume(losses, reference) == pytest.approx(float(dominated.sum()))


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_agrees_with_pymoo(objectives: int) -> None:
    """Random vectors, many of them dominated, equal or beyond the reference: the volume is pymoo's."""
    from pymoo.indicators.hv import HV

    rng = np.random.default_rng(objectives)
    for n in (1, 5, 40):
        losses = np.round(rng.random((n, objectives)) * 1.2, 2)
        losses[-1] = losses[0]
        reference = np.ones(objectives)

        assert hypervolume(losses, reference) == pytest.approx(HV(ref_point=reference)(losses), abs=1e-12)
