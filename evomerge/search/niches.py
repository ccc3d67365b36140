"""M2N2: natural niches. Members compete for items, mates are chosen for what the other lacks, children are split.

"Competition and Attraction Improve Model Fusion", arXiv 2508.16204 (GECCO 2025). Where its released code and its
equations differ, the code is followed: one SLERP angle over the whole vector, 0 in place of an epsilon.

No checkpoint is ever kept. Without mutation a member is exactly a piecewise constant linear mix of the sources, cut
where its ancestors were; the Gram matrices of the sources between the cuts are all that SLERP needs to know.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.proposal import Proposal, Result
from evomerge.recipe import Recipe, Segments
from evomerge.search.base import Column, Geometry, Ids, Needs, Start, check_renewed, check_told
from evomerge.space import Axis

Array = NDArray[np.float64]
Member = TypeVar("Member")
FILL = 50
"""At most so many children of seeds fill the archive before parents are chosen (published for language models)."""


# -- competition and attraction: pure functions of scores, shape (n_members, n_items), in [0, 1] ------------------


def worth(scores: Array, alpha: float) -> Array:
    """c_j / z_j^alpha of every item, shape (n_items,): what one point on it brings to whoever scores there.

    The capacity c_j is the item's best score, which for right-or-wrong items that anybody solves is 1; z_j is the
    sum of its scores. With alpha 0 nobody competes.
    """
    z = scores.sum(axis=0)
    out: Array = scores.max(axis=0) / np.where(z > 0.0, z, 1.0) ** alpha
    return out


def shared_fitness(scores: Array, alpha: float) -> Array:
    """f_i = sum_j c_j s_ij / z_j^alpha, shape (n_members,)."""
    out: Array = scores @ worth(scores, alpha)
    return out


def attraction(scores: Array, first: int, alpha: float) -> Array:
    """g(A, B) = sum_j c_j / z_j^alpha max(s_Bj - s_Aj, 0) for A = `first`, shape (n_members,); 0 for A itself."""
    out: Array = np.maximum(scores - scores[first], 0.0) @ worth(scores, alpha)
    return out


def choose_parents(scores: Array, rng: np.random.Generator, alpha: float, *, attracted: bool) -> tuple[int, int]:
    """Positions of two different members: the first by fitness, the second by attraction or by fitness too.

    Where nobody has what the first lacks, the second is drawn by fitness; where all fitness is 0, uniformly.
    """
    fitness = shared_fitness(scores, alpha)
    first = _draw(fitness, rng)
    mates = attraction(scores, first, alpha) if attracted else fitness.copy()
    if mates.sum() <= 0.0:
        mates = fitness.copy()
    mates[first] = 0.0
    if mates.sum() <= 0.0:
        mates = np.ones(len(scores))
        mates[first] = 0.0
    return first, _draw(mates, rng)


def _draw(shares: Array, rng: np.random.Generator) -> int:
    total = shares.sum()
    return int(rng.choice(len(shares), p=shares / total if total > 0.0 else None))


def arc(t: float, aa: float, ab: float, bb: float) -> tuple[float, float]:
    """Coefficients of A and B in SLERP at t, from <A,A>, <A,B> and <B,B>.

    Linear where the directions are parallel or opposite (sine at most 1e-6), and where a norm is 0.
    """
    cosine = ab / math.sqrt(aa) / math.sqrt(bb) if aa > 0.0 and bb > 0.0 else 1.0
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    sine = math.sin(angle)
    if sine <= 1e-6:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


class Archive(Generic[Member]):
    """At most `size` members with their scores. Slots that are still empty are nobody's parents."""

    def __init__(self, size: int, alpha: float) -> None:
        self.size = size
        self.alpha = alpha
        self.members: list[Member] = []
        self.scores: Array = np.zeros((0, 0))

    def add(self, member: Member, scores: Array) -> None:
        """Take a member in; where it is one too many, the one of lowest fitness leaves, of equals the first in line."""
        rows = [scores] if not self.members else [*self.scores, scores]
        self.members.append(member)
        if len(self.members) <= self.size:
            self.scores = np.array(rows)
            return
        worst = int(np.argmin(shared_fitness(np.array(rows), self.alpha)))
        # The newcomer takes the place, so that the order of the others stays as it was.
        self.members[worst], rows[worst] = self.members[-1], rows[-1]
        self.members.pop()
        self.scores = np.array(rows[:-1])

    def renew(self, scores: Sequence[Array | None]) -> None:
        """New scores of all members in their order; those that have none leave."""
        self.members = [m for m, s in zip(self.members, scores, strict=True) if s is not None]
        self.scores = np.array([s for s in scores if s is not None])


# -- merging without weights ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """A piecewise constant mix of sources: from `cuts[i]` to the next cut the shares `weights[i]`.

    `cuts` begin with 0 and rise; `weights` have the shape (n_cuts, n_sources).
    """

    cuts: tuple[int, ...]
    weights: Array

    def at(self, position: int) -> Array:
        """The shares of the segment that holds a flat position, shape (n_sources,)."""
        out: Array = self.weights[bisect.bisect_right(self.cuts, position) - 1]
        return out


@dataclass(frozen=True)
class Group:
    """Stretches of the flat layout that get a share and a split point of their own ("chromosomes")."""

    spans: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(stop - start for start, stop in self.spans)

    def place(self, index: int) -> int:
        """The flat position of the group's element `index`."""
        for start, stop in self.spans:
            if index < stop - start:
                return start + index
            index -= stop - start
        raise IndexError(index)


def merged(
    a: Mix,
    b: Mix,
    geometry: Geometry,
    groups: Sequence[Group],
    shares: Sequence[float],
    splits: Sequence[int],
    *,
    origin: Array,
    per_side: bool = False,
) -> Mix:
    """SLERP with a split point: within a group, elements before its split take the share w of B, others 1 - w.

    `splits` are flat positions, one a group. `origin` is the mix that vectors are measured from, shape (n_sources,):
    zeros for whole weights, all base for deltas. One angle a group, or one on each side of its split (`per_side`).
    """
    edges = {0, *a.cuts, *b.cuts, *splits, *(x for g in groups for span in g.spans for x in span)}
    owner = sorted((start, stop, n) for n, g in enumerate(groups) for start, stop in g.spans)
    starts = [start for start, _, _ in owner]
    end = owner[-1][1]
    pieces = []
    products: dict[tuple[int, bool], Array] = {}
    for start, stop in pairwise(sorted(x for x in edges if x <= end)):
        n = owner[bisect.bisect_right(starts, start) - 1][2]
        before = start < splits[n]
        x, y = a.at(start) - origin, b.at(start) - origin
        gram = geometry.gram(start, stop)
        key = (n, before if per_side else True)
        products[key] = products.get(key, 0.0) + np.array([x @ gram @ x, x @ gram @ y, y @ gram @ y])
        pieces.append((start, n, before, key, x, y))
    rows = []
    for _, n, before, key, x, y in pieces:
        p, q = arc(shares[n] if before else 1.0 - shares[n], *products[key].tolist())
        rows.append(origin + p * x + q * y)
    return Mix(tuple(p[0] for p in pieces), np.array(rows))


# -- the algorithm ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file; the defaults are those published for language models."""

    population: int = 15
    """Members of the archive."""
    alpha: float = 1.0
    """How hard members compete for items: 0 not at all, above 1 crowding is punished."""
    attraction: bool = True
    """Whether mates are drawn for what the first parent lacks."""
    split: bool = True
    """Whether the share changes at a split point; else one share holds for all weights."""
    per_side: bool = False
    """SLERP on each side of the split by itself, as the paper prints it; its code has one angle."""
    vectors: Literal["weights", "deltas"] = "weights"
    """What SLERP turns: whole weights or differences from the base; the base, then of length 0, is mixed linearly."""
    groups: Literal["all", "module"] = "all"
    """One share and split point for all weights, or one for each kind of module."""

    def __post_init__(self) -> None:
        if self.population < 2:
            raise ValueError(f"population: at least 2 are needed, got {self.population}")
        if not 0.0 <= self.alpha < math.inf:
            raise ValueError(f"alpha: `0 <= alpha` must hold, but got {self.alpha:g}")


class Niches:
    """Steady state: one child a step, or as many under way as the run's lag says."""

    needs = Needs(scope="incumbents", per_item_scores=True, proposes="recipes", steady=True, geometry=True)

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        assert start.manifest is not None
        assert start.geometry is not None
        self._o = options or Options()
        self._manifest, self._geometry, self._dtype = start.manifest, start.geometry, start.dtype
        self._columns = start.columns
        self._waits = start.lag is None
        self._sampled = start.sampled
        self._rng, self._ids = rng, ids
        self._sources = self._geometry.sources
        n = len(self._sources)
        self._seeds = [Mix((0,), np.eye(n)[[i]]) for i in range(n)]
        self._origin = np.zeros(n)
        if self._o.vectors == "deltas":
            self._origin[self._sources.index(self._manifest.base)] = 1.0
        self._groups = groups_of(self._manifest, self._o.groups)
        self._archive: Archive[tuple[Mix, int]] = Archive(self._o.population, self._o.alpha)
        self._filling = min(FILL, max(self._o.population - len(self._seeds), 0))
        self._seeding = list(self._seeds)
        self._seed_ids: list[int] = []
        self._waiting: dict[int, Mix] = {}
        self._step = 0

    def ask(self, n: int) -> list[Proposal]:
        """Up to n: the seeds, children of seeds, then one child at a time. Without a lag, [] while tells are awaited.

        The seeds are recipes that every run scores as baselines already, so they cost nothing.
        """
        if self._waits and self._waiting and not (self._seeding or self._filling):
            return []
        out: list[Proposal] = []
        parents: tuple[int, ...]
        while len(out) < n:
            if self._seeding:
                mix, parents = self._seeding.pop(0), ()
            elif self._waits and (out or self._waiting) and not self._filling:
                break
            else:
                mix, parents = self._child()
            out.append(self._proposal(mix, parents))
        return out

    def _proposal(self, mix: Mix, parents: tuple[int, ...]) -> Proposal:
        recipe = recipe_of(mix, self._sources, self._manifest, self._dtype)
        if parents:
            self._step += 1
        # With items of its own a generation is as many children as the archive has members, the first one with seeds.
        group = max(self._step - 1, 0) // self._o.population if self._sampled else self._step
        p = Proposal(next(self._ids), group, recipe=recipe, parents=parents)
        if not parents:
            self._seed_ids.append(p.id)
        self._waiting[p.id] = mix_of(recipe, self._sources, mix)
        return p

    def _child(self) -> tuple[Mix, tuple[int, ...]]:
        """A child of two seeds while the archive is being filled, or has not two members; then of two members."""
        members = self._archive.members
        filling, self._filling = self._filling, max(self._filling - 1, 0)
        if filling or len(members) < 2:
            pair = self._rng.choice(len(self._seeds), size=2, replace=False)
            (a, i), (b, j) = ((self._seeds[k], self._seed_ids[k]) for k in pair)
        else:
            first, second = choose_parents(self._archive.scores, self._rng, self._o.alpha, attracted=self._o.attraction)
            (a, i), (b, j) = members[first], members[second]
        shares = [float(self._rng.random()) for _ in self._groups]
        # At a split of 0 every element takes 1 - w, which is as uniform as w.
        splits = [g.place(int(self._rng.integers(g.size))) if self._o.split else 0 for g in self._groups]
        child = merged(
            a, b, self._geometry, self._groups, shares, splits, origin=self._origin, per_side=self._o.per_side
        )
        return child, (i, j)

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result; what failed or misses constraints stays out of the archive.

        Raises ValueError for a stranger, told twice, or a NaN loss; UserError for scores outside of [0, 1].
        """
        check_told(p, r, self._waiting)
        mix = self._waiting.pop(p.id)
        row = self._row(r)
        if row is not None:
            self._archive.add((mix, p.id), row)

    def _row(self, r: Result) -> Array | None:
        return resources(r, self._columns) if math.isfinite(r.loss) and r.violation == 0.0 else None

    def incumbents(self) -> list[int]:
        """The archive, where the next child begins a generation."""
        begins = self._step and self._step % self._o.population == 0 and not self._waiting
        return [i for _, i in self._archive.members] if begins else []

    def renew(self, results: Mapping[int, Result]) -> None:
        """New scores of the archive; who fails or misses constraints leaves it.

        Raises ValueError for anybody else and where a member is missing, as all scores must be on the same items;
        ValueError for a NaN loss, UserError for scores outside of [0, 1].
        """
        members = [i for _, i in self._archive.members]
        check_renewed(results, members)
        if missing := {*members} - {*results}:
            raise ValueError(f"proposals {sorted(missing)} were not renewed; members are compared on the same items")
        self._archive.renew([self._row(results[i]) for i in members])

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already: the best member is among the driver's candidates."""
        return []


def resources(r: Result, columns: Sequence[Column]) -> Array:
    """All items' scores side by side, in [0, 1], each times its share of the objective; shape (n_items,).

    Where lower is better a score x counts as exp(-x): of a cross-entropy that is the probability. The best item has
    the share 1, so with one task these are the plain scores. Raises UserError where scores leave [0, 1].
    """
    parts = []
    shares = []
    for c in columns:
        x = np.asarray(r.scores[c.task][c.metric], dtype=np.float64)
        if not c.higher:
            x = np.exp(-x)
        if not (np.all(x >= 0.0) and np.all(x <= 1.0)):
            low, high = float(x.min()), float(x.max())
            raise UserError(
                f"search: niches share out items by scores in [0, 1], but task {c.task!r} has {c.metric} from "
                f"{low:g} to {high:g}; use a metric such as accuracy or probability"
            )
        parts.append(x)
        shares.append(c.share / len(x))
    top = max(shares)
    return np.concatenate([x * (share / top) for x, share in zip(parts, shares, strict=True)])


def groups_of(manifest: Manifest, by: str) -> tuple[Group, ...]:
    """The whole layout as one group, or a group for each kind of module in the order of their first blocks.

    An alignment gap belongs to the block before it.
    """
    if by == "all":
        return (Group(((0, manifest.elements),)),)
    blocks = list(manifest.blocks.values())
    ends = [*(b.start for b in blocks[1:]), manifest.elements]
    spans: dict[str, list[tuple[int, int]]] = {}
    for b, stop in zip(blocks, ends, strict=True):
        spans.setdefault(b.module, []).append((b.start, stop))
    return tuple(Group(tuple(s)) for s in spans.values())


def recipe_of(mix: Mix, sources: Sequence[str], manifest: Manifest, dtype: str) -> Recipe:
    """The canonical recipe of a mix; `sources` name the columns of its weights."""
    weights = {n: tuple(column.tolist()) for n, column in zip(sources, mix.weights.T, strict=True)}
    segments = Segments(layout=manifest.layout, cuts=mix.cuts, weights=weights)
    return Recipe.model_validate({"base": manifest.base, "dtype": dtype, "segments": segments}).canonical(manifest)


def mix_of(recipe: Recipe, sources: Sequence[str], seed: Mix) -> Mix:
    """The mix that a canonical recipe builds, rounded as the recipe is: members are what was scored, to the digit.

    A recipe of whole sources is the seed that it came from.
    """
    if recipe.segments is None:
        return Mix((0,), seed.weights[:1].round())
    s = recipe.segments
    zeros = (0.0,) * len(s.cuts)
    return Mix(s.cuts, np.array([s.weights.get(n, zeros) for n in sources]).T)
