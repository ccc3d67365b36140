"""Random search: independent uniform points of the unit cube. The baseline that every search must beat.

Bergstra and Bengio 2012, "Random Search for Hyper-Parameter Optimization", JMLR 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    population: int = 16
    """Proposals per generation; only groups them, as nothing is learned."""

    def __post_init__(self) -> None:
        if self.population < 1:
            raise ValueError(f"population: `population >= 1` must hold, but got {self.population}")


class RandomSearch:
    """Uniform proposals; the first one is the start. Recommends the best seen."""

    needs = Needs(objectives="any", steady=True, scope="best")

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._n = len(axes)
        self._start: Start | None = start
        self._rng = rng
        self._ids = ids
        self._population = (options or Options()).population
        self._asked = 0
        self._waiting: set[int] = set()

    def ask(self, n: int) -> list[Proposal]:
        """Up to n points, at most to the end of a generation, uniform in [0, 1)^n_axes. Waits for nothing."""
        group, place = divmod(self._asked, self._population)
        out = []
        for _ in range(min(n, self._population - place)):
            if self._start is not None:
                genome, self._start = self._start.genome, None
            else:
                genome = frozen_genome(self._rng.random(self._n))
            out.append(Proposal(next(self._ids), group, genome=genome))
        self._asked += len(out)
        self._waiting.update(p.id for p in out)
        return out

    def tell(self, p: Proposal, r: Result) -> None:
        """Learn nothing. Raises ValueError for a proposal that was not asked or was told already,
        or a NaN loss."""
        check_told(p, r, self._waiting, len(r.losses))
        self._waiting.remove(p.id)

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends a random search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the best seen is among the driver's candidates."""
        return []
