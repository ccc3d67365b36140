"""How much a stage may still ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.config import Budget, Stage
from evomerge.errors import UserError
from evomerge.journal import Journal
from evomerge.rundir import RunDirectory

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Allowance:
    """A budget cut into stages. Shares are cumulative: what an early stage leaves, a later one may use."""

    budget: Budget
    shares: tuple[float, ...]
    items_per_candidate: int
    sampled: bool = False
    """Whether items are sampled, or gradients asked for: then a candidate's price changes, and item evaluations are
    counted as they are."""

    @classmethod
    def of(
        cls, budget: Budget, stages: Sequence[Stage], items_per_candidate: int, *, sampled: bool = False
    ) -> Allowance:
        """`items_per_candidate` at the start. Raises UserError where a stage could not ask for a single candidate."""
        out = cls(budget, tuple(s.share for s in stages), items_per_candidate, sampled)
        if budget.minutes is None:
            before = 0
            for n in range(len(stages)):
                end = out._candidates(n)
                if end <= before:
                    raise UserError(
                        f"search.budget: stage {n + 1} gets no candidate (one takes {items_per_candidate} "
                        "item evaluations); raise the budget or the stage's share"
                    )
                before = end
        return out

    def _until(self, n: int) -> float:
        return min(sum(self.shares[: n + 1]), 1.0) if n + 1 < len(self.shares) else 1.0

    def _candidates(self, n: int) -> int:
        """Candidates that all stages up to n may have asked for together."""
        if self.budget.evaluations is not None:
            return round(self.budget.evaluations * self._until(n))
        return self._items(n) // self.items_per_candidate

    def of_stage(self, n: int) -> int | None:
        """Candidates that stage n may ask for where earlier ones use theirs up; None under a budget of time."""
        if self.budget.minutes is not None:
            return None
        return self._candidates(n) - (self._candidates(n - 1) if n else 0)

    def _items(self, n: int) -> int:
        """Item evaluations that all stages up to n may have made together."""
        assert self.budget.item_evaluations is not None
        return int(self.budget.item_evaluations * self._until(n))

    def left(
        self, n: int, asked: int, journal: Journal, rundir: RunDirectory, *, spent: int = 0, price: int = 1
    ) -> int:
        """Proposals that stage n may still ask for after `asked` of all stages; 0 ends it.

        Where items are sampled, `spent` item evaluations were made so far and the next candidate takes `price`.
        """
        if self.sampled and self.budget.item_evaluations is not None:
            return max(0, self._items(n) - spent) // price
        if self.budget.minutes is None:
            return max(0, self._candidates(n) - asked)
        if journal.replaying:
            # Time is not repeatable: what the journal holds was within it.
            event = journal.next_event
            asks = event["kind"] == "asked" and event["role"] == "search" and event["stage"] == n
            return UNLIMITED if asks else 0
        return UNLIMITED if rundir.seconds < self.budget.minutes * 60 * self._until(n) else 0

    def extended(self, budget: Budget) -> Allowance:
        """The same stages under a larger budget: what is added belongs to the last one."""
        return replace(self, budget=budget)

    @property
    def total(self) -> int | None:
        """Candidates in all, or None where that is not known: under a time budget, or one of sampled items."""
        unknown = self.budget.minutes is not None or (self.sampled and self.budget.item_evaluations is not None)
        return None if unknown else self._candidates(len(self.shares) - 1)
