"""Whole generations with tournaments and an elite: what genetic algorithms share, whatever their genotype is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

import numpy as np

from evomerge.proposal import Proposal, Result
from evomerge.search.base import check_renewed, check_told

G = TypeVar("G")
"""A genotype."""


class Generations(ABC, Generic[G]):
    """A generation's parents are the elite so far and the generation before."""

    def __init__(self, rng: np.random.Generator, tournament: int, elite: int) -> None:
        """`tournament` members are drawn for each parent, `elite` of the best survive beside their children."""
        self._rng = rng
        self._tournament, self._elites = tournament, elite
        self._queue: list[Proposal] = []
        self._waiting: dict[int, G] = {}
        self._told: list[tuple[float, int, G]] = []
        self._parents: list[tuple[float, int, G]] = []
        self._elite: list[tuple[float, int, G]] = []

    @abstractmethod
    def _next_generation(self) -> None:
        """Queue its members, with their genotypes in `_waiting`."""

    def ask(self, n: int) -> list[Proposal]:
        """Up to n members of the current generation; [] while its tells are awaited."""
        if not self._queue:
            if self._waiting:
                return []
            self._next_generation()
        out, self._queue = self._queue[:n], self._queue[n:]
        return out

    @property
    def _able(self) -> bool:
        """Whether a parent has a loss."""
        return any(math.isfinite(loss) for loss, _, _ in self._parents)

    def _parent(self) -> tuple[int, G]:
        """A tournament's winner: its number and genotype; ties by number."""
        drawn = self._rng.integers(len(self._parents), size=self._tournament)
        _, number, genotype = min((self._parents[i] for i in drawn), key=lambda m: m[:2])
        return number, genotype

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        check_told(p, r, self._waiting)
        self._told.append((r.loss, p.id, self._waiting.pop(p.id)))
        if not self._waiting:
            self._parents = [*self._elite, *self._told]
            self._elite = sorted(self._parents, key=lambda m: m[:2])[: self._elites]
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
