"""Greedy soup: experts join the running mean, best first, where that does not hurt.

Wortsman et al. 2022, "Model soups", arXiv 2203.05482, algorithm 1. No search space: the recipes are plain means of
whole experts, K single ones and K - 1 additions. Ties are let in, as there (`>=` on scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Proposal, Result
from evomerge.search.base import Ids, Needs, Start
from evomerge.search.recipes import Mixes
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Nothing to set."""


class GreedySoup:
    """First every expert alone, then one addition at a time."""

    needs = Needs(proposes="recipes", scope="archive")

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._mixes = Mixes(start, ids)
        self._mixes.begin([{e: 1.0} for e in self._mixes.manifest.experts])
        self._soup: list[str] = []
        self._loss = math.inf
        self._line: list[str] = []
        """Experts that have not been tried in the soup, best first; the one that is being tried stands first."""

    def ask(self, n: int) -> list[Proposal]:
        """Up to n recipes; [] while tells are awaited, and at the end."""
        return self._mixes.ask(n)

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        told = self._mixes.tell(p, r)
        if told is None:
            return
        if not self._soup:
            ranked = sorted((t for t in told if math.isfinite(t[0])), key=lambda t: t[0])
            if not ranked:
                return
            self._line = [expert for _, mix in ranked for expert in mix]
            self._loss = ranked[0][0]
            self._soup = [self._line.pop(0)]
        else:
            tried = self._line.pop(0)
            [(loss, _)] = told
            if loss <= self._loss:
                self._soup.append(tried)
                self._loss = loss
        if self._line:
            members = [*self._soup, self._line[0]]
            self._mixes.begin([dict.fromkeys(members, 1.0 / len(members))])

    def stop(self) -> Mapping[str, float]:
        """When every expert was tried."""
        return {"experts_in_the_soup": float(len(self._soup))} if self._mixes.done else {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already."""
        return []
