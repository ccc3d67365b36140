"""CycleQD: each measure in turn is the quality, the others are its archive's.

Kuroki, Nakamura, Akiba and Tang 2024, "Agent Skill Acquisition for Large Language Models via CycleQD", arXiv
2410.14735. After its released code (SakanaAI/CycleQD): one archive a task, begun with the experts; elite sampling;
model-merging crossover, by which a child's task vector is the weighted mean of its parents' with weights drawn from
N(1, sigma^2); and mutation along singular directions, which adds U (w S) V^T to a child, U S V^T being the task vector
of the expert whose task is the quality and w uniform in [0, 0.1). Every candidate goes to every archive.

Where we depart from it: w has one entry for each of the four bands of `merge/methods.py`, the same in all layers, where
the code has one for each direction of each matrix. So members are coefficients (n_experts, n_bands) of a `spectral`
recipe, exactly, and no checkpoint is kept. Norms, embedding and head, of which the code leaves out norms only, have the
mean of the bands. Measures are not tied to experts; the expert of a measure is the one that is best at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import UserError
from evomerge.merge.methods import BANDS
from evomerge.proposal import Proposal, Result
from evomerge.recipe import DECIMALS, Recipe, Rule
from evomerge.search.archive import Archive, Grid
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.search.recipes import mixture
from evomerge.space import Axis

Array = NDArray[np.float64]
Member = tuple[int, Array]
"""A proposal's number and its coefficients: of each expert's task vector by band, shape (n_experts, n_bands)."""

LEAST, SPAN = 0.5, 0.8
"""Elite sampling: a factor is LEAST for the worst value in an archive and LEAST + SPAN for the best."""


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    population: int = 8
    """Candidates per generation; the first one has the experts only."""
    crossover_sigma: float = 0.01
    """Standard deviation of a parent's weight around 1; weights are then divided by their sum."""
    mutation: Literal["singular", "coefficients"] = "singular"
    """Along bands of singular directions of the quality's expert, or by noise on every expert's coefficient; with the
    latter members are linear mixes of the experts, and archives fill faster: in 90 evaluations of the experiment
    skills-archive 29 and 31 cells of 81 (seeds 1 and 2), with the paper's 24 and 24."""
    rate: float = 0.1
    """Mutation along singular directions: how much of each band of the expert is added at most."""
    sigma: float = 0.2
    """Mutation of coefficients: its standard deviation. Without it children stay between the experts: on three
    made-up skills 0, 0.1 and 0.2 filled 19, 47 and 58 cells of 216 with 300 candidates."""

    def __post_init__(self) -> None:
        if self.population < 1:
            raise ValueError(f"population: at least 1 is needed, got {self.population}")
        if not 0.0 <= self.crossover_sigma <= 0.3:  # beyond it the weights may sum to almost nothing
            raise ValueError(f"crossover_sigma: `0 <= crossover_sigma <= 0.3` must hold, got {self.crossover_sigma:g}")
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate: `0 <= rate <= 1` must hold, got {self.rate:g}")
        if not 0.0 <= self.sigma < math.inf:
            raise ValueError(f"sigma: `0 <= sigma` must hold, got {self.sigma:g}")


def elite_shares(qualities: Array, cells: Array) -> Array:
    """How probable each elite is as a parent, shape (n_elites,): the better on all measures, the more.

    `qualities` have the shape (n_elites,), `cells` are the elites' places along the archive's dimensions, shape
    (n_elites, n_dimensions), counted so that more is better.
    """
    shares = np.ones(len(qualities))
    for column in (qualities, *cells.T):
        low, high = column.min(), column.max()
        if high > low:
            shares *= LEAST + SPAN * (column - low) / (high - low)
    out: Array = shares / shares.sum()
    return out


class CycleQd:
    """Whole generations; the archive that parents are drawn from changes from child to child."""

    needs = Needs(scope="archive", proposes="recipes", measures=2, methods=("linear", "spectral"))

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        assert start.manifest is not None
        if len(start.measures) < 2:
            raise UserError("search: cycleqd needs two measures or more: one is the quality, the others its archive's")
        self._manifest, self._dtype = start.manifest, start.dtype
        self._dimensions = start.measures
        self._o = options or Options()
        self._rng, self._ids = rng, ids
        others = [self._dimensions[:k] + self._dimensions[k + 1 :] for k in range(len(self._dimensions))]
        self._archives: list[Archive[Member]] = [Archive(Grid(o)) for o in others]
        self._seeds: list[Member] = []
        # Of each measure the quality and the place of the expert that is best at it; the first while none is known.
        self._best = [(-math.inf, 0)] * len(self._dimensions)
        self._group = -1
        self._step = 0
        self._queue: list[tuple[Array, tuple[int, ...]]] = []
        self._waiting: dict[int, Array] = {}

    def ask(self, n: int) -> list[Proposal]:
        """Up to n members of the current generation; [] while its tells are awaited.

        The experts alone are recipes that every run scores as baselines already, so they cost nothing.
        """
        if not self._queue:
            if self._waiting:
                return []
            self._next_generation()
        taken, self._queue = self._queue[:n], self._queue[n:]
        out = []
        for weights, parents in taken:
            p = Proposal(next(self._ids), self._group, recipe=self._recipe(weights), parents=parents)
            if not parents:
                self._seeds.append((p.id, weights))
            self._waiting[p.id] = weights
            out.append(p)
        return out

    def _recipe(self, member: Array) -> Recipe:
        """Linear where the bands of each expert agree, so that the experts have the recipes of the baselines."""
        experts = self._manifest.experts
        if np.all(member == member[:, :1]):
            shares = dict(zip(experts, member[:, 0].tolist(), strict=True))
            shares[self._manifest.base] = 1.0 - sum(shares.values())
            return mixture(shares, self._manifest, self._dtype)
        sources = {n: dict(zip(BANDS, row.tolist(), strict=True)) for n, row in zip(experts, member, strict=True)}
        rule = Rule(method="spectral", sources=sources)
        data = {"base": self._manifest.base, "dtype": self._dtype, "merge": [rule]}
        return Recipe.model_validate(data).canonical(self._manifest)

    def _next_generation(self) -> None:
        self._group += 1
        if not self._seeds:
            self._queue = [(np.tile(row[:, None], len(BANDS)), ()) for row in np.eye(len(self._manifest.experts))]
        else:
            self._queue = [self._child() for _ in range(self._o.population)]

    def _child(self) -> tuple[Array, tuple[int, ...]]:
        """A child of two elites of the archive whose turn it is; of two experts where nothing is in it."""
        k = self._step % len(self._archives)
        self._step += 1
        members, shares = self._candidates(k)
        pair = self._rng.choice(len(members), size=min(2, len(members)), replace=False, p=shares)
        parents = [members[i] for i in pair]
        w = self._rng.normal(1.0, self._o.crossover_sigma, len(parents))
        child = np.einsum("p,peb->eb", w / w.sum(), np.array([weights for _, weights in parents]))
        if self._o.mutation == "coefficients":
            child += self._rng.normal(0.0, self._o.sigma, (len(child), 1))
        else:
            child[self._best[k][1]] += self._rng.uniform(0.0, self._o.rate, len(BANDS))
        # As the recipe is written, so that members are what was scored, to the digit.
        return child.round(DECIMALS), tuple(i for i, _ in parents)

    def _candidates(self, k: int) -> tuple[list[Member], Array]:
        """Who may be a parent in archive k, and how probably."""
        archive = self._archives[k]
        if not archive.elites:
            return self._seeds, np.full(len(self._seeds), 1 / len(self._seeds))
        dimensions = self._dimensions[:k] + self._dimensions[k + 1 :]
        places = np.array(np.unravel_index(list(archive.elites), [d.cells for d in dimensions])).T
        signs = np.array([1.0 if d.higher else -1.0 for d in dimensions])
        losses = np.array([loss for loss, _ in archive.elites.values()])
        return [member for _, member in archive.elites.values()], elite_shares(-losses, places * signs)

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result; what failed or misses constraints stays out of the archives.

        Raises ValueError for a stranger, told twice, a NaN loss, or other than as many finite measures as there are.
        """
        check_told(p, r, self._waiting)
        if math.isfinite(r.loss) and r.violation == 0.0:
            if r.measures.shape != (len(self._dimensions),):
                raise ValueError(f"{len(self._dimensions)} measures are needed, told {r.measures.tolist()}")
            for k, (archive, d) in enumerate(zip(self._archives, self._dimensions, strict=True)):
                quality = float(r.measures[k]) if d.higher else -float(r.measures[k])
                archive.add(np.delete(r.measures, k), -quality, (p.id, self._waiting[p.id]))
                if not p.parents and quality > self._best[k][0]:
                    self._best[k] = quality, int(self._waiting[p.id][:, 0].argmax())
        del self._waiting[p.id]

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the elites are among the driver's candidates."""
        return []
