"""A plain genetic algorithm with tournament selection: the baseline that cleverer searches have to beat.

Goldberg and Deb 1991, "A comparative analysis of selection schemes used in genetic algorithms" (tournaments);
blend crossover BLX-alpha after Eshelman and Schaffer 1993; Gaussian mutation; the best members survive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search.base import Ids, Needs, Start, check_renewed, check_told
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


class Ga:
    """Whole generations; a generation's parents are the elite so far and the generation before."""

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
        self._rng = rng
        self._ids = ids
        self._group = -1
        self._queue: list[Proposal] = []
        self._waiting: dict[int, Genome] = {}
        self._told: list[tuple[float, int, Genome]] = []
        self._parents: list[tuple[float, int, Genome]] = []
        self._elite: list[tuple[float, int, Genome]] = []
        self._start: Genome | None = start.genome

    def ask(self, n: int) -> list[Proposal]:
        """Up to n members of the current generation; [] while its tells are awaited."""
        if not self._queue:
            if self._waiting:
                return []
            self._next_generation()
        out, self._queue = self._queue[:n], self._queue[n:]
        return out

    def _next_generation(self) -> None:
        self._group += 1
        genomes = [self._child() for _ in range(self._options.population)]
        if self._start is not None:
            genomes[0], self._start = self._start, None
        self._queue = [Proposal(next(self._ids), self._group, genome=g) for g in genomes]
        self._waiting = {p.id: g for p, g in zip(self._queue, genomes, strict=True)}

    def _child(self) -> Genome:
        n = len(self._axes)
        if not any(math.isfinite(loss) for loss, _, _ in self._parents):
            return frozen_genome(self._rng.random(n))
        a, b = self._parent(), self._parent()
        low, high = np.minimum(a, b), np.maximum(a, b)
        reach = self._options.alpha * (high - low)
        child = self._rng.uniform(low - reach, high + reach)
        mutated = self._rng.random(n) < 1 / n
        child = child + mutated * self._rng.normal(0.0, self._options.sigma, n)
        for i, axis in enumerate(self._axes):
            if axis.kind == "categorical":  # between two choices there is nothing
                child[i] = self._rng.random() if mutated[i] else (a[i] if self._rng.random() < 0.5 else b[i])
        return frozen_genome(np.clip(child, 0.0, 1.0))

    def _parent(self) -> Genome:
        drawn = self._rng.integers(len(self._parents), size=self._options.tournament)
        best: tuple[float, int, Genome] = min((self._parents[i] for i in drawn), key=lambda m: m[:2])
        return best[2]

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        check_told(p, r, self._waiting)
        del self._waiting[p.id]
        assert p.genome is not None
        self._told.append((r.loss, p.id, p.genome))
        if not self._waiting:
            self._parents = [*self._elite, *self._told]
            self._elite = sorted(self._parents, key=lambda m: m[:2])[: self._options.elite]
            self._told = []

    def incumbents(self) -> list[int]:
        """The elite: it stands beside the next generation, and is left out here where it failed."""
        return [] if self._waiting else [i for loss, i, _ in self._elite if math.isfinite(loss)]

    def renew(self, results: Mapping[int, Result]) -> None:
        """New losses of the elite. Raises ValueError for anybody else, and for a NaN loss."""
        check_renewed(results, [i for _, i, _ in self._elite])
        self._elite = [(results[i].loss if i in results else loss, i, g) for loss, i, g in self._elite]

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the best member is among the driver's candidates."""
        return []
