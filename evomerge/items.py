"""Which items a candidate is scored on while the search runs: all, a fresh sample for each generation, or rungs.

A sample is common to a generation, so losses on it are compared within that generation and nowhere else: who survives
into the next one is scored on its sample again, and that counts as any other evaluation. What has to last - baselines,
probes, a stage's answers, finalists - is scored in full. Sampled items are drawn by task, in the
tasks' proportions, by a generator seeded with the run's seed, the stage and the generation: neither the number of
workers nor a resume changes them. A policy learns from committed results alone.

Successive halving: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", AISTATS. Growing a sample by the agreement of its halves is ours; split-half reliability itself goes back
to Spearman 1910 and Brown 1910.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.config import AdaptiveItems, HalvingItems, ItemsSpec, SampleItems
from evomerge.pareto import Losses, order
from evomerge.proposal import ItemSet, Result, Scores

POLICIES: Mapping[str, tuple[str, ...]] = {
    "none": ("full", "sample"),
    "generation": ("full", "sample", "adaptive", "halving"),
    "incumbents": ("full", "sample", "adaptive"),
    "best": ("full", "halving"),
    "archive": ("full",),
}
"""The policies that an algorithm accepts, by its `Needs.scope`."""

HALVINGS = 10
"""Random halvings that a split-half correlation is the mean of."""

_SAMPLE, _HALVES = 1, 2
"""What a generator is for. Last in its seed and not 0, since numpy pads seeds with zeros."""

LossesOn = Callable[[ItemSet], Callable[[Scores], Losses]]
"""Items of the search split -> scores on them -> losses, with the references on the same items."""


class ItemPolicy(Protocol):
    """Decides what is scored, in the order of the journal."""

    def first(self, group: int) -> ItemSet:
        """The items on which a generation's members begin. The generations before it are told in full."""
        ...

    def more(self, group: int, rung: int, got: Mapping[int, Result]) -> Mapping[int, ItemSet]:
        """Further items for some of the members, given the results of those on this rung; {} ends the generation."""
        ...

    @property
    def price(self) -> int:
        """Items that the next candidate takes, halving's by the average."""
        ...


class Full:
    """All items for everybody: losses are comparable over the whole run."""

    def __init__(self, whole: ItemSet) -> None:
        self._whole = whole
        self.price = whole.count

    def first(self, group: int) -> ItemSet:
        """The search split."""
        return self._whole

    def more(self, group: int, rung: int, got: Mapping[int, Result]) -> Mapping[int, ItemSet]:
        """Nothing."""
        return {}


class Sample:
    """Fresh common items for each generation, `count` of them: minibatches for algorithms that average over steps."""

    def __init__(self, spec: SampleItems, whole: ItemSet, seed: Sequence[int]) -> None:
        """`seed` is the run's and the stage's number."""
        self._spec, self._whole, self._seed = spec, whole, seed
        self.price = self.first(0).count

    def first(self, group: int) -> ItemSet:
        """The generation's sample."""
        return samples(self._whole, [self._spec.count], self._seed, group)[0]

    def more(self, group: int, rung: int, got: Mapping[int, Result]) -> Mapping[int, ItemSet]:
        """Nothing."""
        return {}


class Adaptive:
    """Fresh common items for each generation; how many follows from how well the last ones ranked its members.

    Where the split-half rank correlation was below `threshold`, or there were too few members to have one, the next
    generation has `grow` times as many items, else `shrink` times fewer: from `start` up to all.
    """

    def __init__(self, spec: AdaptiveItems, whole: ItemSet, seed: Sequence[int], losses_on: LossesOn) -> None:
        """`seed` is the run's and the stage's number."""
        self._spec, self._whole, self._seed, self._losses_on = spec, whole, seed, losses_on
        self._size = self._next = float(min(spec.start, whole.count))
        self._group = -1
        self._items = whole
        self._got: list[Scores] = []

    def first(self, group: int) -> ItemSet:
        """The generation's sample."""
        if group != self._group:
            self._group, self._got = group, []
            self._size = self._next
            self._items = samples(self._whole, [round(self._size)], self._seed, group)[0]
        return self._items

    def more(self, group: int, rung: int, got: Mapping[int, Result]) -> Mapping[int, ItemSet]:
        """Nothing; sets the size of the next sample."""
        self._got += [r.scores for r in got.values() if r.scores]
        rho = split_half(self._got, self._items, self._seed, group, self._losses_on)
        grown = self._size / self._spec.shrink if rho >= self._spec.threshold else self._size * self._spec.grow
        self._next = min(max(grown, self._spec.start), self._whole.count)
        return {}

    @property
    def price(self) -> int:
        """Size of the next sample, or about that."""
        return samples(self._whole, [round(self._next)], self._seed, self._group + 1)[0].count


class Halving:
    """A generation begins on the first rung's items; the best share `keep` of a rung's members goes on to the next.

    Each rung holds the items of those before it, which are not scored again.
    """

    def __init__(self, spec: HalvingItems, whole: ItemSet, seed: Sequence[int]) -> None:
        """`seed` is the run's and the stage's number."""
        self._spec, self._whole, self._seed = spec, whole, seed
        steps = np.diff([0, *(min(r, whole.count) for r in spec.rungs)])
        self.price = math.ceil(sum(size * spec.keep**n for n, size in enumerate(steps)))

    def _rungs(self, group: int) -> list[ItemSet]:
        return samples(self._whole, self._spec.rungs, self._seed, group)

    def first(self, group: int) -> ItemSet:
        """The generation's first rung."""
        return self._rungs(group)[0]

    def more(self, group: int, rung: int, got: Mapping[int, Result]) -> Mapping[int, ItemSet]:
        """The next rung for the best of this one; {} behind the last, and where nobody could be scored."""
        able = [i for i, r in got.items() if np.isfinite(r.losses).all()]
        if rung + 1 == len(self._spec.rungs) or not able:
            return {}
        best = order(np.array([got[i].losses for i in able]))[: max(1, round(len(got) * self._spec.keep))]
        return {able[i]: self._rungs(group)[rung + 1] for i in sorted(best)}


def make_policy(spec: ItemsSpec, whole: ItemSet, seed: Sequence[int], losses_on: LossesOn) -> ItemPolicy:
    """The policy of an experiment's `search.items` for one stage."""
    if isinstance(spec, SampleItems):
        return Sample(spec, whole, seed)
    if isinstance(spec, AdaptiveItems):
        return Adaptive(spec, whole, seed, losses_on)
    if isinstance(spec, HalvingItems):
        return Halving(spec, whole, seed)
    return Full(whole)


def behind(told: Mapping[int, Losses], better: Iterable[Losses]) -> dict[int, Losses]:
    """Losses of members that stopped on a rung, moved behind those of all that went on; their own order stays."""
    finite = [x for x in told.values() if np.isfinite(x).all()]
    above = [x for x in better if np.isfinite(x).all()]
    if not finite or not above:
        return dict(told)
    shift = np.max(above, axis=0) - np.min(finite, axis=0)
    return {i: x + np.maximum(shift, 0.0) for i, x in told.items()}


# -- samples --------------------------------------------------------------------------------------------------


def samples(whole: ItemSet, sizes: Sequence[int], seed: Sequence[int], group: int) -> list[ItemSet]:
    """Nested random samples of about `sizes` items, by task in the tasks' proportions; `whole` itself where it is all.

    A task has at least two items, or all it has, so that halves of a sample have items of every task.
    """
    rng = _generator(seed, group, _SAMPLE)
    shuffled = {t: rng.permutation(np.array(at)) for t, at in whole.tasks.items()}
    out = []
    for rung, size in enumerate(sizes):
        share = size / whole.count
        tasks = {t: tuple(sorted(at[: max(2, round(len(at) * share))].tolist())) for t, at in shuffled.items()}
        name = f"{whole.name} {'.'.join(map(str, (*seed[1:], group, rung)))}"
        part = ItemSet(name, tasks)
        out.append(part if part.count < whole.count else whole)
    return out


def taken(scores: Scores, there: ItemSet, wanted: ItemSet) -> Scores:
    """Scores on some of the items that were scored, in the order of `wanted`. Raises KeyError for others."""
    out = {}
    for task, at in wanted.tasks.items():
        place = {p: i for i, p in enumerate(there.tasks[task])}
        rows = [place[p] for p in at]
        out[task] = {m: c[rows] for m, c in scores[task].items()}
    return out


def _generator(seed: Sequence[int], group: int, use: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*seed, group, use])))


# -- split-half correlation -----------------------------------------------------------------------------------


def split_half(
    members: Sequence[Scores], items: ItemSet, seed: Sequence[int], group: int, losses_on: LossesOn
) -> float:
    """How far two halves of the items agree on the order of a generation's members, from -1 to 1.

    Spearman's rank correlation of the losses on random halves of every task's items, the mean over HALVINGS halvings
    and the objectives; NaN for fewer than three members. Halves where all members tie count as 0: they tell nothing.
    """
    if len(members) < 3:
        return math.nan
    rng = _generator(seed, group, _HALVES)
    found = []
    for _ in range(HALVINGS):
        columns = []
        for half in halves(items, rng):
            loss = losses_on(half)
            columns.append(np.array([loss(taken(s, items, half)) for s in members]))
        found.append(np.mean([rank_correlation(a, b) for a, b in zip(*(c.T for c in columns), strict=True)]))
    return float(np.mean(found))


def halves(items: ItemSet, rng: np.random.Generator) -> tuple[ItemSet, ItemSet]:
    """Every task's items in two random halves; one that has a single item has it in both."""
    first, second = {}, {}
    for task, at in items.tasks.items():
        mixed = rng.permutation(np.array(at)).tolist()
        cut = len(mixed) // 2
        first[task], second[task] = tuple(mixed[:cut] or mixed), tuple(mixed[cut:])
    return ItemSet("half", first), ItemSet("half", second)


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, ties at their mean rank; 0 where all values of one side tie."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: NDArray[np.float64] = ends - (counts - 1) / 2
    return mean[where]
