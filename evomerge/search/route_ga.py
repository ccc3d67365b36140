"""A genetic algorithm on layer routes themselves: paths of any length are varied hop by hop, no vector stands for them.

The data-flow space of Akiba et al. 2024, "Evolutionary Optimization of Model Merging Recipes", arXiv 2403.13187,
section 3.2, in which tokens go through layers of several models, some of them repeatedly, others never. The paper
encodes paths as an array of switches over repeated lists of all layers; here they are what is mutated and crossed, as
the strings of variable length of Goldberg, Korb and Deb 1989, "Messy genetic algorithms" (cut and splice).

Layers of the same index do similar work in models of one family, so that layers are inserted near their own depth,
swapped for another model's of the same index, and paths are spliced where their layers' indices are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evomerge.manifest import Manifest
from evomerge.proposal import Proposal
from evomerge.recipe import DECIMALS, MAX_HOPS, Hop, Recipe, Route
from evomerge.search.base import Ids, Needs, Start
from evomerge.search.elite import Generations
from evomerge.space import Axis

Rng = np.random.Generator
TRIES = 8
"""How often a child is mutated again where its model was proposed before; then it is let through as it is."""
MUTATIONS: Mapping[str, float] = {
    **dict.fromkeys(("insert", "delete", "duplicate", "move", "swap", "scale"), 1.0),
    # There is little to find out about ends: as many as there are models.
    "ends": 0.25,
}
"""How common each mutation is beside the others that a path allows."""


class Step(NamedTuple):
    """One hop: layer `layer` (from 0) of a source; `scale` multiplies the stream that enters it."""

    source: str
    layer: int
    scale: float = 1.0


Steps = tuple[Step, ...]


class Path(NamedTuple):
    """A genotype: the hops, and the model whose embedding, final norm and head go with them."""

    ends: str
    steps: Steps


@dataclass(frozen=True)
class Bounds:
    """What paths may be: sources with their numbers of layers, how many hops, and how far a scale is perturbed
    (the standard deviation of its logarithm; 0 where there are no scales)."""

    layers: Mapping[str, int]
    least: int
    most: int
    sigma: float = 0.0


# -- mutations of hops: a path's hops -> hops, all randomness from the generator ----------------------------------


def run_of(n: int, most: int, rng: Rng) -> tuple[int, int]:
    """(start, stop) of a run of 1 to `most` of n hops. Lengths are log-uniform: short ones are common."""
    length = min(int(math.exp(rng.uniform(0.0, math.log(most + 1)))), most)
    start = int(rng.integers(n - length + 1))
    return start, start + length


def inserted(steps: Steps, layers: Mapping[str, int], rng: Rng) -> Steps:
    """One more hop: with each step away from the index of the layer whose place it takes half as likely."""
    at = int(rng.integers(len(steps) + 1))
    depth = steps[at].layer if at < len(steps) else steps[-1].layer + 1
    source = list(layers)[int(rng.integers(len(layers)))]
    near = 0.5 ** np.abs(np.arange(layers[source]) - min(depth, layers[source] - 1))
    layer = int(rng.choice(layers[source], p=near / near.sum()))
    return (*steps[:at], Step(source, layer), *steps[at:])


def deleted(steps: Steps, least: int, rng: Rng) -> Steps:
    """Without a run of hops, of which half may be lost, down to `least`. Needs more than `least` hops."""
    start, stop = run_of(len(steps), min(len(steps) - least, -(-len(steps) // 2)), rng)
    return steps[:start] + steps[stop:]


def duplicated(steps: Steps, most: int, rng: Rng) -> Steps:
    """A run of hops is gone through twice in a row. Needs fewer than `most` hops."""
    start, stop = run_of(len(steps), min(most - len(steps), len(steps)), rng)
    return steps[:stop] + steps[start:]


def moved(steps: Steps, rng: Rng) -> Steps:
    """A run of hops at another place. Needs two hops."""
    start, stop = run_of(len(steps), len(steps) - 1, rng)
    rest = steps[:start] + steps[stop:]
    at = int(rng.integers(len(rest)))
    at += at >= start  # not where it was
    return rest[:at] + steps[start:stop] + rest[at:]


def swapped(steps: Steps, layers: Mapping[str, int], rng: Rng) -> Steps:
    """A run of hops through another model's layers of the same indices, where it has them."""
    start, stop = run_of(len(steps), len(steps), rng)
    others = [n for n, count in layers.items() if n != steps[start].source and count > steps[start].layer]
    if not others:
        return steps
    other = others[int(rng.integers(len(others)))]
    run = (s._replace(source=other) if s.layer < layers[other] else s for s in steps[start:stop])
    return (*steps[:start], *run, *steps[stop:])


def scaled(steps: Steps, sigma: float, rng: Rng) -> Steps:
    """One hop's scale times a log-normal factor, within what a recipe takes."""
    at = int(rng.integers(len(steps)))
    scale = min(max(steps[at].scale * math.exp(rng.normal(0.0, sigma)), 1e-3), 1e3)
    return (*steps[:at], steps[at]._replace(scale=round(scale, DECIMALS)), *steps[at + 1 :])


# -- paths ----------------------------------------------------------------------------------------------------------


def mutated(path: Path, bounds: Bounds, rng: Rng) -> Path:
    """One mutation, of those that the path and its bounds allow; the path itself where there are none."""
    ends, steps = path
    n, several = len(steps), len(bounds.layers) > 1
    allowed = {
        "insert": n < bounds.most,
        "delete": n > bounds.least,
        "duplicate": n < bounds.most,
        "move": n > 1,
        "swap": several,
        "scale": bounds.sigma > 0.0,
        "ends": several,
    }
    kinds = [k for k in MUTATIONS if allowed[k]]
    if not kinds:
        return path
    shares = np.array([MUTATIONS[k] for k in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    if kind == "ends":
        others = [n for n in bounds.layers if n != ends]
        return Path(others[int(rng.integers(len(others)))], steps)
    if kind == "insert":
        return Path(ends, inserted(steps, bounds.layers, rng))
    if kind == "delete":
        return Path(ends, deleted(steps, bounds.least, rng))
    if kind == "duplicate":
        return Path(ends, duplicated(steps, bounds.most, rng))
    if kind == "move":
        return Path(ends, moved(steps, rng))
    if kind == "swap":
        return Path(ends, swapped(steps, bounds.layers, rng))
    return Path(ends, scaled(steps, bounds.sigma, rng))


def crossed(a: Path, b: Path, bounds: Bounds, rng: Rng) -> Path:
    """One path up to a cut, then the other; in every second case, back to the first behind another cut.

    A cut of `a` is drawn; in `b` it is where the layer's index is nearest to the layer of `a` behind the cut, of
    those cuts that give a child within bounds. Without any, and of a single hop, the child is `a`. Ends are a's.
    """
    n, m = len(a.steps), len(b.steps)
    if n < 2:
        return a
    twice = n > 2 and rng.random() < 0.5
    cuts = [int(c) for c in np.sort(1 + rng.choice(n - 1, size=1 + twice, replace=False))]
    first, last = cuts[0], cuts[-1] if twice else n
    there = np.array([s.layer for s in b.steps])
    starts = np.arange(m)[:, None]
    stops = np.arange(1, m)[None, :] if twice else np.array([[m]])
    apart = np.abs(there - a.steps[first].layer)[starts]
    if twice:
        apart = apart + np.abs(there - a.steps[last].layer)[stops]
    lengths = first + (stops - starts) + (n - last)
    fits = (starts < stops) & (bounds.least <= lengths) & (lengths <= bounds.most)
    if not fits.any():
        return a
    nearest = np.argwhere(fits & (apart == apart[fits].min()))
    row, column = nearest[int(rng.integers(len(nearest)))]
    return Path(a.ends, a.steps[:first] + b.steps[row : stops[0, column]] + a.steps[last:])


def own_path(source: str, bounds: Bounds, rng: Rng) -> Path:
    """A model's own path; without some of its layers, or with some twice, where it is out of bounds."""
    steps = tuple(Step(source, i) for i in range(bounds.layers[source]))
    while len(steps) > bounds.most:
        steps = deleted(steps, bounds.most, rng)
    while len(steps) < bounds.least:
        steps = duplicated(steps, bounds.least, rng)
    return Path(source, steps)


def recipe_of(path: Path, manifest: Manifest, dtype: str) -> Recipe:
    """The canonical recipe of a path: a plain merge where it takes every layer once and in order."""
    hops = tuple(Hop.model_validate({"from": s.source, "layer": s.layer, "scale": s.scale}) for s in path.steps)
    route = Route(embed=path.ends, final_norm=path.ends, head=path.ends, hops=hops)
    return Recipe.model_validate({"base": manifest.base, "dtype": dtype, "route": route}).canonical(manifest)


# -- the algorithm ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    population: int = 20
    """Candidates per generation; the first one begins with the models' own paths, however many these are."""
    tournament: int = 3
    """How many are drawn for each parent; the best of them is it."""
    elite: int = 2
    """How many of the best survive beside their children."""
    min_hops: int = 1
    """The shortest path."""
    max_hops: int | None = None
    """The longest path; default twice as many as the deepest model has layers, or `min_hops` where that is more."""
    crossover: float = 0.5
    """Share of children that have two parents."""
    mutations: int = 1
    """Mutations of every child."""
    scales: bool = False
    """Whether the stream is scaled where it enters a hop; exported weights have that folded in."""
    sigma: float = 0.1
    """Standard deviation of the logarithm of what a mutated scale is multiplied by."""

    def __post_init__(self) -> None:
        if self.population < 2:
            raise ValueError(f"population: at least 2 are needed, got {self.population}")
        if self.tournament < 1:
            raise ValueError(f"tournament: at least 1 is needed, got {self.tournament}")
        if not 0 <= self.elite < self.population:
            raise ValueError(f"elite: `0 <= elite < population` must hold, but got {self.elite}")
        if not 1 <= self.min_hops <= MAX_HOPS:
            raise ValueError(f"min_hops: `1 <= min_hops <= {MAX_HOPS}` must hold, but got {self.min_hops}")
        if self.max_hops is not None and not self.min_hops <= self.max_hops <= MAX_HOPS:
            raise ValueError(f"max_hops: `min_hops <= max_hops <= {MAX_HOPS}` must hold, but got {self.max_hops}")
        if not 0.0 <= self.crossover <= 1.0:
            raise ValueError(f"crossover: `0 <= crossover <= 1` must hold, but got {self.crossover:g}")
        if self.mutations < 1:
            raise ValueError(f"mutations: at least 1 is needed, got {self.mutations}")
        if not 0.0 < self.sigma <= 3.0:
            raise ValueError(f"sigma: `0 < sigma <= 3` must hold, but got {self.sigma:g}")

    def bounds(self, manifest: Manifest) -> Bounds:
        """Of paths through a pool."""
        layers = {n: manifest.layers[n] for n in (manifest.base, *sorted({*manifest.layers} - {manifest.base}))}
        most = self.max_hops or max(min(2 * max(layers.values()), MAX_HOPS), self.min_hops)
        return Bounds(layers, self.min_hops, most, self.sigma if self.scales else 0.0)


class RouteGa(Generations[Path]):
    """Paths, crossed and mutated. The first generation has each model's own, of which the baselines know the scores."""

    needs = Needs(scope="incumbents", proposes="recipes", routes=True)

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: Rng,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        assert start.manifest is not None
        self._manifest, self._dtype = start.manifest, start.dtype
        self._o = options or Options()
        self._bounds = self._o.bounds(start.manifest)
        super().__init__(rng, self._o.tournament, self._o.elite)
        self._ids = ids
        self._group = -1
        self._proposed: set[str] = set()
        self._seeds: list[tuple[int, Path]] = []

    def _next_generation(self) -> None:
        self._group += 1
        if not self._group:
            for source in self._bounds.layers:
                i = self._propose(own_path(source, self._bounds, self._rng), ())
                self._seeds.append((i, self._waiting[i]))
        while len(self._queue) < self._o.population:
            self._propose(*self._child())

    def _propose(self, path: Path, parents: tuple[int, ...]) -> int:
        """Queue a path as the generation's next member, another one near it where it was proposed before."""
        recipe = recipe_of(path, self._manifest, self._dtype)
        for _ in range(TRIES):
            if recipe.id not in self._proposed:
                break
            path = mutated(path, self._bounds, self._rng)
            recipe = recipe_of(path, self._manifest, self._dtype)
        self._proposed.add(recipe.id)
        p = Proposal(next(self._ids), self._group, recipe=recipe, parents=parents)
        self._queue.append(p)
        self._waiting[p.id] = path
        return p.id

    def _child(self) -> tuple[Path, tuple[int, ...]]:
        """A child of tournaments' winners; while nobody has a loss, the next model's own path, mutated once."""
        if not self._able:
            i, path = self._seeds[len(self._queue) % len(self._seeds)]
            return mutated(path, self._bounds, self._rng), (i,)
        i, path = self._parent()
        parents = [i]
        if self._rng.random() < self._o.crossover:
            j, other = self._parent()
            path = crossed(path, other, self._bounds, self._rng)
            parents.append(j)
        for _ in range(self._o.mutations):
            path = mutated(path, self._bounds, self._rng)
        return path, tuple(dict.fromkeys(parents))
