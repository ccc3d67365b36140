"""NSGA-II on Optuna: non-dominated sorting, crowding distance, SBX crossover, polynomial mutation.

Deb, Pratap, Agarwal and Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE TEC
6(2). Crossover and mutation as there (eta 20, mutation probability 1/n); categorical genes are exchanged uniformly
and redrawn. Optuna's sampler, asked one generation at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.pareto import Losses
from evomerge.proposal import Genome, Proposal, Result
from evomerge.search.base import Ids, Needs, Start
from evomerge.search.optuna_study import Trials, made, renewing
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    population: int = 40
    """Candidates per generation, and how many survive."""
    crossover: float = 0.9
    """Probability that a child has two parents."""

    def __post_init__(self) -> None:
        if self.population < 4:
            raise ValueError(f"population: at least 4 are needed, got {self.population}")
        if not 0 <= self.crossover <= 1:
            raise ValueError(f"crossover: `0 <= crossover <= 1` must hold, but got {self.crossover}")


class Nsga2:
    """Whole generations, the first from the front so far; failed members are asked again, so that all are full."""

    needs = Needs(constraints=True, objectives="several", scope="incumbents")
    options_class = Options

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._options = options or self.options_class()
        self._renewed: dict[int, Any] = {}
        # Half of the first generation stays uniform: a front of close relatives would breed only such.
        others = self._options.population // 2 - 1
        sampler = self._sampler(int(rng.integers(2**32)))
        self._trials = Trials(axes, start, ids, sampler, start.objectives, others=others)
        self._group = 0
        self._told = 0

    def _sampler(self, seed: int) -> Any:
        return made(
            lambda optuna: renewing(optuna.samplers.NSGAIISampler, self._renewed)(**self._operators(optuna), seed=seed)
        )

    def _operators(self, optuna: Any) -> dict[str, Any]:
        return {
            "population_size": self._options.population,
            "crossover": optuna.samplers.nsgaii.SBXCrossover(eta=20),
            "crossover_prob": self._options.crossover,
            "mutation": optuna.samplers.nsgaii.PolynomialMutation(eta=20),
        }

    def begin_with(self, members: Sequence[tuple[Genome, Losses]]) -> None:
        """Candidates that were scored already become the first generation, at most a population of them."""
        for genome, losses in members:
            self._trials.add(genome, losses)

    def ask(self, n: int) -> list[Proposal]:
        """Up to n members of the current generation; [] while its tells are awaited."""
        if self._told == self._options.population:
            self._told = 0
            self._group += 1
        room = self._options.population - self._told - self._trials.waiting
        return [self._trials.ask(self._group) for _ in range(min(n, room))]

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        self._told += self._trials.tell(p, r)

    def incumbents(self) -> list[int]:
        """The survivors, who are the next generation's parents."""
        return [*self._trials.parents(self._group + 1)] if self._told == self._options.population else []

    def renew(self, results: Mapping[int, Result]) -> None:
        """New results of the survivors. Raises ValueError for anybody else, and for a NaN loss."""
        self._renewed.update(self._trials.with_results(self._trials.parents(self._group), results))

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the front is among the driver's candidates."""
        return []
