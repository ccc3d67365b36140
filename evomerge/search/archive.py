"""Archives of quality-diversity search: the best candidate of every cell of a space of behaviour measures. Numpy only.

The grid of MAP-Elites (Mouret and Clune 2015, "Illuminating search spaces by mapping elites", arXiv 1504.04909), and
the centroidal Voronoi tessellation of CVT-MAP-Elites (Vassiliades, Chatzilygeroudis and Mouret 2018, IEEE TEC 22(4)),
whose number of cells does not grow with the number of measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Member = TypeVar("Member")

EDGE = 1e-6
"""Share of a cell by which a measure may lie below an edge that it means: 0.29 of 100 items is 28.999999999999996."""
POINTS_PER_CELL = 200
ROUNDS = 30


@dataclass(frozen=True)
class Dimension:
    """One measure: [low, high] is cut into `cells` of equal width, and what lies beyond belongs to the outer ones."""

    name: str
    low: float
    high: float
    cells: int
    higher: bool = True
    """Whether more of it is better, for algorithms in which it is a quality as well."""


class Cells(Protocol):
    """A space of measures, cut up."""

    @property
    def total(self) -> int:
        """How many cells there are."""
        ...

    def of(self, measures: Array) -> int:
        """The cell of a vector of measures, shape (n_measures,), from 0 to below `total`."""
        ...


class Grid:
    """Every dimension cut by itself; cells are numbered row by row, the last dimension fastest."""

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self.dimensions = tuple(dimensions)

    @property
    def total(self) -> int:
        """The product of the dimensions' cells."""
        return math.prod(d.cells for d in self.dimensions)

    def of(self, measures: Array) -> int:
        """The cell of a vector of measures."""
        index = 0
        for d, x in zip(self.dimensions, measures.tolist(), strict=True):
            step = math.floor((x - d.low) / (d.high - d.low) * d.cells + EDGE)
            index = index * d.cells + min(max(step, 0), d.cells - 1)
        return index


class Voronoi:
    """A cell is what is nearest to its centre, shape (total, n_measures), every measure being scaled to [0, 1] by its
    bounds. The dimensions' own cells are not used."""

    def __init__(self, dimensions: Sequence[Dimension], centres: Array) -> None:
        self._low = np.array([d.low for d in dimensions])
        self._span = np.array([d.high - d.low for d in dimensions])
        self._centres = centres

    @property
    def total(self) -> int:
        """The number of centres."""
        return len(self._centres)

    def of(self, measures: Array) -> int:
        """The cell of a vector of measures; of equally near centres the first."""
        at = np.clip((measures - self._low) / self._span, 0.0, 1.0)
        return int(((self._centres - at) ** 2).sum(axis=1).argmin())


@cache
def centroids(dimensions: int, total: int) -> Array:
    """Centres of `total` cells that share out the unit cube evenly, shape (total, dimensions): k-means (Lloyd 1982).

    Always the same ones, so that archives of several runs have the same cells.
    """
    from scipy.spatial import KDTree

    points = np.random.Generator(np.random.PCG64(0)).random((POINTS_PER_CELL * total, dimensions))
    centres = points[:total]
    for _ in range(ROUNDS):
        nearest = KDTree(centres).query(points)[1]
        counts = np.bincount(nearest, minlength=total)[:, None]
        sums = np.array([np.bincount(nearest, column, total) for column in points.T]).T
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)  # whoever lost all points stays
    centres.setflags(write=False)
    return centres


class Archive(Generic[Member]):
    """Cell -> its elite: of all that were added there the one of least loss, of equals the first."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.elites: dict[int, tuple[float, Member]] = {}
        """Cell -> loss and member, in the order in which the cells were first filled."""

    def add(self, measures: Array, loss: float, member: Member) -> bool:
        """Take a member in where its cell is empty or its elite worse. Returns whether it was taken.

        Raises ValueError for measures, shape (n_measures,), that are NaN or infinite.
        """
        if not np.isfinite(measures).all():
            raise ValueError(f"measures must be finite numbers, got {measures.tolist()}")
        cell = self.cells.of(measures)
        if cell in self.elites and self.elites[cell][0] <= loss:
            return False
        self.elites[cell] = (loss, member)
        return True
