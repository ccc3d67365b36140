"""MAP: quadratic surrogates of all losses from a few candidates, and the front of the surrogates.

"MAP: Low-Compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation", arXiv 2406.07529: a design of
points is evaluated, every loss is fitted by a quadratic behind a link, and the front is searched on the fits, which
costs nothing. Differences: the front is searched within the box that was sampled, not beyond it; its members are
evaluated, those first that are farthest from what is known, and the fits are made anew with them, generation by
generation; fits that do not predict left-out candidates are refused: then NSGA-II goes on from what was evaluated; and
fits may rest on the losses' slopes at the points of the design, of which then few are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.pareto import Losses, order
from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.search.nsga2 import Nsga2
from evomerge.search.nsga2 import Options as Nsga2Options
from evomerge.search.optuna_study import LAST_BITS
from evomerge.search.surrogate import Points, Surrogate, farthest, fit, front_of, least_points, losses_of
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    population: int = 10
    """Candidates per generation: of the design, of the surrogates' front, and of NSGA-II where they are refused."""
    design: float = 2.0
    """Candidates of the design, as a multiple of those that determine a quadratic of n axes: (n + 1)(n + 2)/2, with
    gradients n + 1."""
    r2: float = 0.5
    """Share of every loss's variance that its surrogate must predict where it was not fitted."""
    gradients: bool = False
    """Whether the design is scored with gradients. Its candidates then count as four each (`GRADIENT_PRICE`): up to six
    axes that costs more than a design without, beyond less, for losses that are near quadratic."""

    def __post_init__(self) -> None:
        if self.population < 4:
            raise ValueError(f"population: at least 4 are needed, got {self.population}")
        if self.design < 1:
            raise ValueError(f"design: at least 1 is needed, got {self.design:g}")
        if not self.r2 < 1:
            raise ValueError(f"r2: `r2 < 1` must hold, but got {self.r2:g}")

    def evaluations(self, axes: int) -> int:
        """Candidates of the design."""
        return max(int(np.ceil(self.design * self.least(axes))), 2)

    def least(self, axes: int) -> int:
        """Candidates without which there is no surrogate."""
        return least_points(axes, slopes=self.gradients)


class Map:
    """First the design, whose failed members are replaced; then the front; or NSGA-II."""

    needs = Needs(
        objectives="several",
        axis_kinds=frozenset({"float", "int"}),
        scope="archive",
        design=lambda axes, options: options.evaluations(axes),
    )
    options_class = Options

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._axes = tuple(axes)
        self._options: Options = options or self.options_class()
        self._begin = start
        self._rng = rng
        self._ids = ids
        self._fixed = _start_and_corners(start.genome)
        self._filling = space_filling(len(axes), rng)
        self._designed = 0
        self._group = -1
        self._queue: list[Proposal] = []
        self._waiting: dict[int, Genome] = {}
        self._asked: set[bytes] = set()
        self._genomes: list[Genome] = []
        self._losses: list[Losses] = []
        self._slopes: list[NDArray[np.float64]] = []
        """What was told and did not fail; slopes of shape (n_objectives, n_axes), NaN where they were not asked for."""
        self._nsga2: Nsga2 | None = None

    def ask(self, n: int) -> list[Proposal]:
        """Up to n members of the current generation; [] while its tells are awaited."""
        if not self._queue and not self._waiting and self._nsga2 is None:
            self._next_generation()
        if self._nsga2 is not None:
            asked = self._nsga2.ask(n)
            return [dataclasses.replace(p, group=self._group + p.group) for p in asked]
        out, self._queue = self._queue[:n], self._queue[n:]
        return out

    def _next_generation(self) -> None:
        self._group += 1
        size = self._options.population
        if missing := self._missing():
            points = self._design(min(size, missing))
        else:
            surrogates = self._surrogates()
            worst = min(range(len(surrogates)), key=lambda i: surrogates[i].r2)
            if surrogates[worst].r2 < self._options.r2:
                self._fall_back(worst, surrogates[worst])
                return
            points = self._front(surrogates, size)
            points += self._design(size - len(points))
        genomes = [frozen_genome(g) for g in points]
        self._asked.update(g.tobytes() for g in genomes)
        self._queue = [Proposal(next(self._ids), self._group, genome=g) for g in genomes]
        self._waiting = {p.id: g for p, g in zip(self._queue, genomes, strict=True)}

    @property
    def differentiates(self) -> bool:
        """The design with gradients, what follows without: of the front the losses are wanted, and of many."""
        return self._options.gradients and self._missing() > 0

    def _missing(self) -> int:
        """Candidates that the design, or this part of it, still lacks; 0 where it is complete."""
        return max(self._options.evaluations(len(self._axes)) - len(self._losses), 0)

    def _design(self, k: int) -> list[Genome]:
        """k points: the start and the corners, in turns with space-filling ones, so that a cut design has of both."""
        points = []
        for _ in range(k):
            point = next(self._fixed, None) if self._designed % 2 == 0 else None
            points.append(next(self._filling) if point is None else point)
            self._designed += 1
        return list(self._snapped(np.array(points).reshape(k, len(self._axes))))

    def _surrogates(self) -> list[Surrogate]:
        points, losses, slopes = (np.array(told) for told in (self._genomes, self._losses, self._slopes))
        return [
            fit(points, losses[:, i], slopes[:, i] if self._options.gradients else None) for i in range(losses.shape[1])
        ]

    def _front(self, surrogates: Sequence[Surrogate], k: int) -> list[Genome]:
        """Up to k members of the surrogates' front that were not asked before, far from what is known."""
        known = np.array(self._losses)
        best = np.array(self._genomes)[order(known)[: self._options.population]]
        points, losses = front_of(lambda x: losses_of(surrogates, self._snapped(x)), best, self._rng)
        points = self._snapped(points)
        new = [i for i, p in enumerate(points) if p.tobytes() not in self._asked]
        return [points[new[i]] for i in farthest(losses[new], known, k)] if new else []

    def _snapped(self, points: Points) -> Points:
        """The points with whole-numbered genes in the middle of their level."""
        out = points.copy()
        for i, axis in enumerate(self._axes):
            if axis.levels is not None:
                out[:, i] = (np.minimum(np.floor(out[:, i] * axis.levels), axis.levels - 1) + 0.5) / axis.levels
        return out

    def _fall_back(self, objective: int, surrogate: Surrogate) -> None:
        """Hand over to NSGA-II, whose first generation are the best so far."""
        self._begin.note(
            f"search: the surrogates of {len(self._losses)} candidates do not predict others (objective "
            f"{objective + 1}: R2 {surrogate.r2:.2f} on left-out candidates, {self._options.r2:g} is needed): NSGA-II "
            "goes on; narrower bounds or a larger `design` may help"
        )
        nsga2 = Nsga2(self._axes, self._begin, self._rng, self._ids, Nsga2Options(self._options.population))
        best = order(np.array(self._losses))[: self._options.population]
        nsga2.begin_with([(self._genomes[i], self._losses[i]) for i in best])
        self._nsga2 = nsga2

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, a NaN loss, or in a design with gradients
        none."""
        if self._nsga2 is not None:
            self._nsga2.tell(p, r)
            return
        check_told(p, r, self._waiting, self._begin.objectives)
        scored = bool(np.isfinite(r.losses).all())
        if scored and self.differentiates and r.gradient is None:
            raise ValueError(f"proposal {p.id} was told without its gradient")
        asked = self._waiting.pop(p.id)
        if scored:
            assert p.genome is not None
            unknown = np.full((len(r.losses), len(self._axes)), np.nan)
            self._slopes.append(unknown if r.gradient is None else r.gradient)
            # Of a journal from another host the point that was scored counts, but last bits are not worth another path.
            self._genomes.append(p.genome if np.max(np.abs(p.genome - asked)) > LAST_BITS else asked)
            self._losses.append(r.losses)

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the front is among the driver's candidates."""
        return []


def _start_and_corners(start: Genome) -> Iterator[Genome]:
    """The start, then each gene alone at 1 with the others at 0, as of experts alone."""
    yield start
    for i in range(len(start)):
        corner = np.zeros(len(start))
        corner[i] = 1.0
        yield corner


def space_filling(axes: int, rng: np.random.Generator) -> Iterator[Genome]:
    """Sobol's points of the unit cube, scrambled by `rng`, without end."""
    from scipy.stats import qmc

    sobol = qmc.Sobol(axes, rng=rng)
    while True:
        yield sobol.random(1)[0]
