"""MAP-Elites: the best candidate for every cell of a space of behaviour measures, in place of one best candidate.

Mouret and Clune 2015, "Illuminating search spaces by mapping elites", arXiv 1504.04909; the archive is a grid or a
centroidal Voronoi tessellation (`archive.py`). Children are made by the iso+line operator of Vassiliades and Mouret
2018, "Discovering the elite hypervolume by leveraging interspecies correlation", arXiv 1804.03906:
x = a + sigma_1 N(0, I) + sigma_2 N(0, 1) (b - a) for two elites a and b that are drawn uniformly. Categorical genes,
between which there is no line, come from either parent and are redrawn with probability 1/n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evomerge.errors import UserError
from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search.archive import Archive, Cells, Dimension, Grid, Voronoi, centroids
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.space import Axis

MOST_CELLS = 1000
"""Of a Voronoi archive: its centroids take seconds to find there, and no search fills as many."""


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file. Lengths are in units of the unit cube."""

    population: int = 16
    """Candidates that are asked for before any of them is told (without a lag)."""
    startup: int = 32
    """Uniform points, the start among them, before the first children."""
    iso_sigma: float = 0.1
    """Standard deviation sigma_1 of the noise on every gene. The paper has 0.01 for budgets of 1e5 and more; with
    150 and 600 candidates on made-up skills of 3 and 15 weights 0.1 filled most (0.01 to 0.1 were tried)."""
    line_sigma: float = 0.2
    """Standard deviation sigma_2 along the line to another elite, as a share of their distance."""
    archive: Literal["grid", "cvt"] = "grid"
    """A grid of the measures' own `cells`, or a Voronoi tessellation of `cells` in all."""
    cells: int | None = None
    """Of a Voronoi tessellation."""

    def __post_init__(self) -> None:
        if self.population < 1:
            raise ValueError(f"population: at least 1 is needed, got {self.population}")
        if self.startup < 1:
            raise ValueError(f"startup: at least 1 is needed, got {self.startup}")
        if self.iso_sigma < 0 or self.line_sigma < 0:
            raise ValueError("iso_sigma and line_sigma must not be below 0")
        if self.archive == "grid" and self.cells is not None:
            raise ValueError("cells: goes with archive: cvt; a grid has those of its measures")
        if self.archive == "cvt" and (self.cells is None or not 2 <= self.cells <= MOST_CELLS):
            raise ValueError(f"cells: archive cvt needs 2 to {MOST_CELLS} in all, got {self.cells}")

    def cells_of(self, dimensions: Sequence[Dimension]) -> Cells:
        """The archive's cells over these measures."""
        if self.cells is None:
            return Grid(dimensions)
        return Voronoi(dimensions, centroids(len(dimensions), self.cells))


class MapElites:
    """Asked in groups, or in steady state."""

    needs = Needs(scope="archive", steady=True, measures=1)

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        if not start.measures:
            raise UserError("search: map-elites needs measures, by which its archive is laid out")
        self._axes = tuple(axes)
        self._categorical = np.array([a.kind == "categorical" for a in axes])
        self._start = start
        self._o = options or Options()
        self._rng = rng
        self._ids = ids
        self._archive: Archive[tuple[int, Genome]] = Archive(self._o.cells_of(start.measures))
        self._asked = 0
        self._waiting: dict[int, Genome] = {}

    def ask(self, n: int) -> list[Proposal]:
        """Up to n points, at most to the end of a group. Waits for nothing."""
        group, place = divmod(self._asked, self._o.population)
        out = []
        for _ in range(min(n, self._o.population - place)):
            genome, parents = self._next()
            out.append(Proposal(next(self._ids), group, genome=genome, parents=parents))
            self._asked += 1
        self._waiting |= {p.id: p.genome for p in out if p.genome is not None}
        return out

    def _next(self) -> tuple[Genome, tuple[int, ...]]:
        """The start, uniform points, then children; a genome and the numbers of its parents."""
        if self._asked == 0:
            return self._start.genome, ()
        if self._asked < self._o.startup or not self._archive.elites:
            return frozen_genome(self._rng.random(len(self._axes))), ()
        elites = list(self._archive.elites.values())
        i, j = self._rng.integers(len(elites), size=2)
        (_, (a_id, a)), (_, (b_id, b)) = elites[i], elites[j]
        return self._child(a, b), (a_id,) if a_id == b_id else (a_id, b_id)

    def _child(self, a: Genome, b: Genome) -> Genome:
        n = len(self._axes)
        noise = self._rng.normal(0.0, self._o.iso_sigma, n)
        child = np.clip(a + noise + self._rng.normal(0.0, self._o.line_sigma) * (b - a), 0.0, 1.0)
        if self._categorical.any():
            either = np.where(self._rng.random(n) < 0.5, a, b)
            redrawn = np.where(self._rng.random(n) < 1 / n, self._rng.random(n), either)
            child = np.where(self._categorical, redrawn, child)
        return frozen_genome(child)

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result; what failed stays out of the archive.

        Raises ValueError for a stranger, told twice, a NaN loss, or other than as many finite measures as there are.
        """
        check_told(p, r, self._waiting)
        loss = r.loss
        assert p.genome is not None
        if math.isfinite(loss):
            if r.measures.shape != (len(self._start.measures),):
                raise ValueError(f"{len(self._start.measures)} measures are needed, told {r.measures.tolist()}")
            self._archive.add(r.measures, loss, (p.id, p.genome))
        del self._waiting[p.id]

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the elites are among the driver's candidates."""
        return []
