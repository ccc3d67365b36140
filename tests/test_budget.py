"""How much a stage may still ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.budget import UNLIMITED, Allowance
from evomerge.config import Budget, Stage
from evomerge.errors import UserError
from evomerge.journal import Journal


class Clock:
    """A run directory that has run for a given time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def stages(*shares: float) -> tuple[Stage, ...]:
    return tuple(Stage(space="per-layer", share=s) for s in shares)


def left(a: Allowance, n: int, asked: int, journal: Any, seconds: float = 0.0) -> int:
    return a.left(n, asked, journal, Clock(seconds))  # type: ignore[arg-type]


def test_evaluations_are_shared_out(tmp_path: Path) -> None:
    """Shares are cumulative: what an early stage leaves a later one may use, and together they spend all."""
    a = Allowance.of(Budget(evaluations=100), stages(0.25, 0.75), 10)

    with Journal(tmp_path / "j") as j:
        assert [left(a, 0, n, j) for n in (0, 24, 25, 30)] == [25, 1, 0, 0]
        assert [left(a, 1, n, j) for n in (20, 25, 99, 100, 101)] == [80, 75, 1, 0, 0]
    assert a.total == 100


@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3, 1 / 3), (0.1,) * 10, (0.14, 0.86), (1.0,)])
@pytest.mark.parametrize("evaluations", [17, 100, 461])
def test_nothing_is_lost_to_rounding(shares: tuple[float, ...], evaluations: int) -> None:
    """The last stage may use exactly the whole budget, whatever the shares sum to in floating point."""
    assert Allowance.of(Budget(evaluations=evaluations), stages(*shares), 1).total == evaluations


def test_item_evaluations_pay_for_candidates() -> None:
    """A budget in item evaluations is spent in whole candidates."""
    a = Allowance.of(Budget(item_evaluations=1999), stages(0.5, 0.5), 100)

    assert a.total == 19
    assert a._candidates(0) == 9


@pytest.mark.parametrize(
    ("budget", "shares", "stage"),
    [
        (Budget(evaluations=1), (0.5, 0.5), 1),
        (Budget(evaluations=10), (0.99, 0.01), 2),
        (Budget(item_evaluations=99), (1.0,), 1),
    ],
)
def test_stages_without_a_candidate_are_refused(budget: Budget, shares: tuple[float, ...], stage: int) -> None:
    """A budget too small for every stage is refused, naming the stage and the price of a candidate."""
    with pytest.raises(UserError, match=rf"stage {stage} gets no candidate \(one takes 100 item evaluations\)"):
        Allowance.of(budget, stages(*shares), 100)


def test_minutes_end_by_the_clock(tmp_path: Path) -> None:
    """Under a time budget a stage may ask until its share of the time is over; the total is unknown."""
    a = Allowance.of(Budget(minutes=10), stages(0.5, 0.5), 100)

    with Journal(tmp_path / "j") as j:
        assert [left(a, 0, 5, j, s) for s in (0.0, 299.0, 300.0)] == [UNLIMITED, UNLIMITED, 0]
        assert [left(a, 1, 5, j, s) for s in (300.0, 599.0, 600.0)] == [UNLIMITED, UNLIMITED, 0]
    assert a.total is None


def test_replayed_minutes_follow_the_journal(tmp_path: Path) -> None:
    """On replay what stands in the journal was within the time, however late it is now, and no more than that."""
    a = Allowance.of(Budget(minutes=1), stages(0.5, 0.5), 100)
    with Journal(tmp_path / "j") as j:
        j.record("asked", id=0, role="search", stage=0)
        j.record("asked", id=1, role="mean", stage=0)

    with Journal(tmp_path / "j") as j:
        assert left(a, 0, 0, j, 1e9) == UNLIMITED
        assert left(a, 1, 0, j, 0.0) == 0
        j.take("asked")
        assert left(a, 0, 1, j, 0.0) == 0
        j.take("asked")
        assert left(a, 0, 1, j, 0.0) == UNLIMITED
        assert left(a, 0, 1, j, 1e9) == 0
