"""TPE on Optuna: proposes where good candidates are dense and bad ones rare.

Bergstra, Bardenet, Bengio and Kegl 2011, "Algorithms for hyper-parameter optimization", NeurIPS; multivariate as in
Falkner, Klein and Hutter 2018 (BOHB). Takes float, int and categorical axes, one objective or several. Trials that
are asked and not told count as bad ones (Optuna's constant liar), so that it can be asked for several at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Proposal, Result
from evomerge.search.base import Ids, Needs, Start
from evomerge.search.optuna_study import Trials, made
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    population: int = 4
    """Candidates that are asked for before any of them is told (without a lag). Groups of 8 ended half a decade of
    loss behind single ones on a mixed bowl of 8 axes and 200 evaluations, groups of 4 level with them."""
    startup: int = 16
    """Uniform points before the first model of good and bad ones."""

    def __post_init__(self) -> None:
        if self.population < 1:
            raise ValueError(f"population: at least 1 is needed, got {self.population}")
        if self.startup < 1:
            raise ValueError(f"startup: at least 1 is needed, got {self.startup}")


class Tpe:
    """Asked in groups, or in steady state."""

    needs = Needs(constraints=True, objectives="any", steady=True, scope="archive")

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._options = options or Options()
        seed, startup = int(rng.integers(2**32)), self._options.startup
        sampler = made(lambda o: o.samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=seed))
        self._trials = Trials(axes, start, ids, sampler, start.objectives)
        self._asked = 0

    def ask(self, n: int) -> list[Proposal]:
        """Up to n points, at most to the end of a group. Waits for nothing."""
        group, place = divmod(self._asked, self._options.population)
        out = [self._trials.ask(group) for _ in range(min(n, self._options.population - place))]
        self._asked += len(out)
        return out

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        self._trials.tell(p, r)

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already."""
        return []
