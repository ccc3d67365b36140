"""Nested MAP: two models at a time become one, until one is left. For more experts than MAP has candidates for.

arXiv 2406.07529, its nested variant: of the models that are left, the two whose own metrics are closest are merged by
MAP over two coefficients, and the merge takes their place. Its preference, the objectives that it is to be good at, is
the sum of theirs. Merges add to the base what is scaled from it, so a merge of merges is one recipe of task
arithmetic with multiplied weights, and nothing has to be written in between. An expert's own objective is the one
that it stands out in; metrics are in standard deviations over the experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from evomerge.pareto import Losses
from evomerge.proposal import Proposal, Result
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.search.map import space_filling
from evomerge.search.recipes import Mix, arithmetic
from evomerge.search.surrogate import Points, Values, fit, front_of, losses_of, unknowns
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    samples: int = 20
    """Candidates of the design of every merge; the optimum of its surrogates comes on top."""

    def __post_init__(self) -> None:
        if self.samples < unknowns(2):
            raise ValueError(f"samples: at least {unknowns(2)} are needed, got {self.samples}")

    def evaluations(self, experts: int) -> int:
        """Candidates until one model is left."""
        return experts + (experts - 1) * (self.samples + 1)


@dataclass(frozen=True)
class Model:
    """An expert or a merge: its weights by expert, its losses, and how much of each objective it stands for."""

    weights: Mix
    losses: Losses
    preference: Losses


@dataclass(frozen=True)
class Units:
    """Standard deviations over the experts, in which losses of several objectives are compared."""

    zero: Losses
    one: Losses

    @classmethod
    def of(cls, losses: Losses) -> Units:
        """Of the experts' losses, shape (n_experts, n_objectives)."""
        std = losses.std(axis=0)
        return cls(losses.mean(axis=0), np.where(std > 0, std, 1.0))

    def scaled(self, losses: Losses) -> Losses:
        """Losses in these units, shape (..., n_objectives)."""
        return (losses - self.zero) / self.one  # type: ignore[no-any-return]

    def mean(self, losses: Losses, preference: Losses) -> Values:
        """Means over the objectives, weighted by preference, shape (...)."""
        return self.scaled(losses) @ preference / preference.sum()  # type: ignore[no-any-return]


class NestedMap:
    """Rounds: every expert alone, then for each merge its design and the optimum of its surrogates."""

    needs = Needs(
        objectives="several",
        proposes="recipes",
        methods=("task_arithmetic",),
        scope="archive",
        design=lambda experts, options: options.evaluations(experts),
    )

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        assert start.manifest is not None
        self._manifest, self._dtype, self._objectives = start.manifest, start.dtype, start.objectives
        self._ids = ids
        self._samples = (options or Options()).samples
        self._merges = 0
        self._rounds = self._search(rng)
        self._group = 0
        self._queue: list[Mix] = next(self._rounds)
        self._told: dict[int, Losses | None] = {}
        """Of this round's proposals, in the order of asking; None while they wait."""

    def _search(self, rng: np.random.Generator) -> Generator[list[Mix], list[Losses]]:
        """Yields rounds of mixes, and is sent their losses."""
        experts = self._manifest.experts
        told = yield [{e: 1.0} for e in experts]
        alone = [(e, losses) for e, losses in zip(experts, told, strict=True) if np.isfinite(losses).all()]
        if not alone:
            return
        units = Units.of(np.array([losses for _, losses in alone]))
        own = np.eye(self._objectives)
        models = [Model({e: 1.0}, losses, own[np.argmin(units.scaled(losses))]) for e, losses in alone]
        filling = space_filling(2, rng)
        while len(models) > 1:
            metrics = [float(units.mean(m.losses, m.preference)) for m in models]
            pairs = itertools.combinations(range(len(models)), 2)
            i, j = min(pairs, key=lambda at: abs(metrics[at[0]] - metrics[at[1]]))
            pair, preference = (models[i], models[j]), models[i].preference + models[j].preference
            points = list(itertools.islice(filling, self._samples))
            told = yield [_combined(pair, c) for c in points]
            # Each of the two alone is known already.
            known = [(corner, m.losses) for corner, m in zip(np.eye(2), pair, strict=True)]
            known += [(c, losses) for c, losses in zip(points, told, strict=True) if np.isfinite(losses).all()]
            if len(known) >= unknowns(2):
                optimum = _optimum(known, partial(units.mean, preference=preference), rng)
                [losses] = yield [_combined(pair, optimum)]
                known += [(optimum, losses)] if np.isfinite(losses).all() else []
            best, losses = known[np.argmin(units.mean(np.array([x for _, x in known]), preference))]
            models = [m for k, m in enumerate(models) if k not in (i, j)]
            models.append(Model(_combined(pair, best), losses, preference))
            self._merges += 1

    def ask(self, n: int) -> list[Proposal]:
        """Up to n recipes of the round; [] while tells are awaited, and at the end."""
        out = []
        for mix in self._queue[:n]:
            p = Proposal(next(self._ids), self._group, recipe=arithmetic(mix, self._manifest, self._dtype))
            self._told[p.id] = None
            out.append(p)
        self._queue = self._queue[n:]
        return out

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        check_told(p, r, [i for i, known in self._told.items() if known is None], self._objectives)
        self._told[p.id] = r.losses
        told = [x for x in self._told.values() if x is not None]
        if self._queue or len(told) < len(self._told):
            return
        self._told = {}
        self._group += 1
        with suppress(StopIteration):
            self._queue = self._rounds.send(told)

    def stop(self) -> Mapping[str, float]:
        """When one model is left, or nothing could be scored."""
        return {} if self._queue or self._told else {"merges": float(self._merges)}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already."""
        return []


def _optimum(
    known: Sequence[tuple[Points, Losses]], mean: Callable[[Losses], Values], rng: np.random.Generator
) -> Points:
    """The two coefficients that are best by preference on the surrogates. They lie on the surrogates' front."""
    points, losses = (np.array(x) for x in zip(*known, strict=True))
    surrogates = [fit(points, column) for column in losses.T]
    best, _ = front_of(lambda x: mean(losses_of(surrogates, x))[:, None], points, rng)
    return best[0]  # type: ignore[no-any-return]


def _combined(pair: tuple[Model, Model], c: Losses) -> Mix:
    """The weights of base + c[0] (first - base) + c[1] (second - base)."""
    out: dict[str, float] = {}
    for model, scale in zip(pair, c, strict=True):
        for expert, weight in model.weights.items():
            out[expert] = out.get(expert, 0.0) + float(scale) * weight
    return out
