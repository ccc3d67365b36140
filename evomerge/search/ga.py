"""A plain genetic algorithm with tournament selection: the baseline that cleverer searches have to beat.

Goldberg and Deb 1991, "A comparative analysis of selection schemes used in genetic algorithms" (tournaments);
blend crossover BLX-alpha after Eshelman and Schaffer 1993; Gaussian mutation; the best members survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Genome, Proposal, frozen_genome
from evomerge.search.base import Ids, Needs, Start
from evomerge.search.elite import Generations
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file. Lengths are in units of the unit cube."""

    population: int = 20
    """Candidates per generation."""
    tournament: int = 3
    """How many are drawn for each parent; the best of them is it."""
    elite: int = 2
    """How many of the best survive beside their children."""
    alpha: float = 0.3
    """How far beyond its parents a child may lie, as a share of their distance."""
    sigma: float = 0.1
    """Standard deviation of a mutated gene; each gene is mutated with probability 1/n."""

    def __post_init__(self) -> None:
        if self.population < 2:
            raise ValueError(f"population: at least 2 are needed, got {self.population}")
        if self.tournament < 1:
            raise ValueError(f"tournament: at least 1 is needed, got {self.tournament}")
        if not 0 <= self.elite < self.population:
            raise ValueError(f"elite: `0 <= elite < population` must hold, but got {self.elite}")
        if self.alpha < 0 or self.sigma < 0:
            raise ValueError("alpha and sigma must not be below 0")


class Ga(Generations[Genome]):
    """Genomes, blended and mutated."""

    needs = Needs(scope="incumbents")

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._axes = tuple(axes)
        self._options = options or Options()
        super().__init__(rng, self._options.tournament, self._options.elite)
        self._ids = ids
        self._group = -1
        self._start: Genome | None = start.genome

    def _next_generation(self) -> None:
        self._group += 1
        genomes = [self._child() for _ in range(self._options.population)]
        if self._start is not None:
            genomes[0], self._start = self._start, None
        self._queue = [Proposal(next(self._ids), self._group, genome=g) for g in genomes]
        self._waiting = {p.id: g for p, g in zip(self._queue, genomes, strict=True)}

    def _child(self) -> Genome:
        n = len(self._axes)
        if not self._able:
            return frozen_genome(self._rng.random(n))
        (_, a), (_, b) = self._parent(), self._parent()
        low, high = np.minimum(a, b), np.maximum(a, b)
        reach = self._options.alpha * (high - low)
        child = self._rng.uniform(low - reach, high + reach)
        mutated = self._rng.random(n) < 1 / n
        child = child + mutated * self._rng.normal(0.0, self._options.sigma, n)
        for i, axis in enumerate(self._axes):
            if axis.kind == "categorical":  # between two choices there is nothing
                child[i] = self._rng.random() if mutated[i] else (a[i] if self._rng.random() < 0.5 else b[i])
        return frozen_genome(np.clip(child, 0.0, 1.0))
