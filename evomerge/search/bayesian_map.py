"""Bayesian MAP: as MAP, but the second part of the design goes where the surrogates of the first err most.

arXiv 2406.07529, its adaptive variant for few experts: directions from the origin are cut into bins of hyperspherical
angles; bins are drawn by a softmax over the surrogates' squared errors within them, plus half the error's spread over
subsamples. Differences: errors are those of left-out candidates, of all objectives together; subsamples are drawn
afresh; a bin without candidates scores as the worst that has some, else it would never be looked at; and radii are
shares of the way to the side of the cube.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.proposal import Genome
from evomerge.search.map import Map
from evomerge.search.map import Options as MapOptions
from evomerge.search.surrogate import Points

FIRST = 0.6
"""Share of the design before the first round."""
TEMPERATURE = 0.07
SUBSAMPLES, SHARE = 30, 0.8
"""Subsamples of the candidates that an error's spread is taken over, and the share of candidates in each."""
SHORTEST = 0.2
"""Least share of the way from the origin to the side of the cube; nearer the base there is little to learn."""


@dataclass(frozen=True)
class Options(MapOptions):
    """Settings of the experiment file: those of MAP, and the rounds of its adaptive half."""

    rounds: int = 3
    """Parts that the rest of the design is cut into; the surrogates are fitted anew before each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds: at least 1 is needed, got {self.rounds}")


class BayesianMap(Map):
    """MAP's loop with another second part of the design."""

    needs = dataclasses.replace(Map.needs, most_axes=6)
    options_class = Options

    @property
    def _first(self) -> int:
        """Candidates before the first round: at least as many as a fit needs."""
        whole, least = self._options.evaluations(len(self._axes)), self._options.least(len(self._axes))
        return min(max(math.ceil(FIRST * whole), least), whole)

    def _missing(self) -> int:
        """To the end of the first part, then to the end of a round."""
        assert isinstance(self._options, Options)
        first, told = self._first, len(self._losses)
        if told < first:
            return first - told
        left = super()._missing()
        return min(left, math.ceil((left + told - first) / self._options.rounds))

    def _design(self, k: int) -> list[Genome]:
        """k points: MAP's, then uniform ones of drawn bins."""
        if len(self._losses) < self._first or not k:
            return super()._design(k)
        n = len(self._axes)
        bins = Bins(n)
        errors = np.mean([s.errors**2 for s in self._surrogates()], axis=0)
        scores = bins.scores(np.array(self._genomes), errors, self._rng)
        chances = np.exp((scores - scores.max()) / TEMPERATURE)
        drawn = self._rng.choice(bins.count, size=k, p=chances / chances.sum())
        directions = bins.directions(drawn, self._rng)
        # Shares of the way to where a direction leaves the cube.
        lengths = self._rng.uniform(SHORTEST, 1.0, (k, 1)) / directions.max(axis=1, keepdims=True)
        return list(self._snapped(np.clip(lengths * directions, 0.0, 1.0)))


class Bins:
    """Directions of the positive orthant in bins of equal hyperspherical angles, which run from 0 to pi/2."""

    def __init__(self, axes: int) -> None:
        self._shape = (4 if axes < 4 else 2,) * (axes - 1)
        self.count = math.prod(self._shape)

    def of(self, points: Points) -> NDArray[np.int64]:
        """The bin of each point, shape (n,)."""
        out = np.zeros(len(points), dtype=np.int64)
        for i, parts in enumerate(self._shape):
            angle = np.arctan2(np.linalg.norm(points[:, i + 1 :], axis=1), points[:, i])
            out = out * parts + np.minimum(np.floor(angle / (np.pi / 2) * parts), parts - 1).astype(np.int64)
        return out

    def scores(self, points: Points, errors: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Mean squared error of each bin plus half its standard deviation over subsamples, shape (count,)."""
        of = self.of(points)
        samples = [rng.permutation(len(points))[: math.ceil(SHARE * len(points))] for _ in range(SUBSAMPLES)]
        out = np.full(self.count, -np.inf)
        for b in np.unique(of):
            means = [errors[s][of[s] == b].mean() for s in samples if (of[s] == b).any()]
            out[b] = errors[of == b].mean() + 0.5 * np.std(means or [0.0])
        return np.where(np.isfinite(out), out, out.max())

    def directions(self, bins: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        """A unit vector within each bin, uniform in its angles, shape (n, n_axes)."""
        rest, columns = np.ones(len(bins)), []
        for i, at in enumerate(np.unravel_index(bins, self._shape) if self._shape else ()):
            angle = (at + rng.random(len(bins))) * (np.pi / 2) / self._shape[i]
            columns.append(rest * np.cos(angle))
            rest = rest * np.sin(angle)
        return np.column_stack([*columns, rest])
