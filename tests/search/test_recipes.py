"""The exam of algorithms that propose recipes, and what each of them is known to find."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evomerge.manifest import Manifest
from evomerge.merge.methods import BANDS
from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search import ALGORITHMS, make_optimizer, make_options, needs_of
from evomerge.search.archive import Dimension
from evomerge.search.base import Column, Needs, Optimizer, Start
from evomerge.search.recipes import mixture

RECIPES = [a for a in ALGORITHMS if needs_of(a).proposes == "recipes"]
each = pytest.mark.parametrize("algorithm", RECIPES)
Loss = Callable[[dict[str, float]], float]


@pytest.fixture
def manifest(manifest_of: Callable[..., Manifest]) -> Manifest:
    return manifest_of(experts=("a", "b", "c", "d"))


class Orthogonal:
    """Sources that have nothing in common: their inner products are those of unit vectors, spread evenly."""

    def __init__(self, manifest: Manifest) -> None:
        self.sources = (manifest.base, *manifest.experts)

    def gram(self, start: int, stop: int) -> np.ndarray:
        return np.eye(len(self.sources)) * (stop - start)


COLUMNS = (Column("task", "accuracy", higher=True, share=1.0),)
MEASURES = (Dimension("first", 0.0, 1.0, 5), Dimension("second", 0.0, 1.0, 5))


def told(loss: float, opt: Optimizer) -> Result:
    """A result whose items, and one of whose measures, are the better the lower the loss; so is a second objective."""
    losses = np.array([loss, 2 * loss])[: objectives(opt.needs)]
    if not math.isfinite(loss):
        return Result(losses, "failed:nan")
    right = np.array([math.exp(-abs(loss)), 0.3, math.exp(-2 * abs(loss))], dtype=np.float32)
    measures = np.array([math.exp(-abs(loss)), abs(math.sin(9 * loss))])
    return Result(losses, scores={"task": {"accuracy": right}}, measures=measures)


def objectives(needs: Needs) -> int:
    return 2 if needs.objectives == "several" else 1


def optimizer(algorithm: str, manifest: Manifest, first_id: int = 0, **settings: Any) -> Optimizer:
    rng = np.random.Generator(np.random.PCG64(1))
    start = Start(
        frozen_genome([]),
        objectives(needs_of(algorithm)),
        manifest=manifest,
        columns=COLUMNS,
        geometry=Orthogonal(manifest),
        measures=MEASURES,
    )
    return make_optimizer(algorithm, (), start, rng, itertools.count(first_id), make_options(algorithm, settings))


def mix_of(p: Proposal, manifest: Manifest) -> dict[str, float]:
    """Source -> share of the mean that a recipe builds; a block without a rule is the base. What task arithmetic adds
    to the base is taken from the base's share.

    Of segments the mean shares over the flat layout, of bands of singular values the mean of the bands, of routes the
    shares of the hops, and where they come to a merge whose blocks are of one source each, the shares of the blocks.
    """
    assert p.recipe is not None
    if p.recipe.route is not None:
        return counted([h.from_ for h in p.recipe.route.hops])
    if p.recipe.segments is not None:
        out: dict[str, float] = {}
        for start, stop, weights in p.recipe.segments.within(0, manifest.elements):
            for n, w in weights.items():
                out[n] = out.get(n, 0.0) + w * (stop - start) / manifest.elements
        return out
    blocks = p.recipe.blocks
    if not blocks:
        return {manifest.base: 1.0}
    whole = {manifest.base: {"weight": 1.0}}
    rules = [blocks[b].sources if b in blocks else whole for b in manifest.blocks]
    if any(r != rules[0] for r in rules) and all(len(r) == 1 and {"weight": 1.0} in r.values() for r in rules):
        return counted([n for r in rules for n in r])
    assert all(r == rules[0] for r in rules), "one mix for the whole model"
    mix = {n: c["weight"] * np.mean([c[b] for b in BANDS if b in c] or [1.0]) for n, c in rules[0].items()}
    if {r.method for r in blocks.values()} <= {"spectral", "task_arithmetic"}:  # which add to the base
        mix[manifest.base] = 1.0 - sum(mix.values())
    return mix


def counted(names: list[str]) -> dict[str, float]:
    return {n: names.count(n) / len(names) for n in dict.fromkeys(names)}


def search(opt: Optimizer, manifest: Manifest, loss: Loss, budget: int = 400, slice_: int = 100) -> list[Any]:
    done: list[Any] = []
    while len(done) < budget and not opt.stop():
        group = opt.ask(min(slice_, budget - len(done)))
        assert group, "either it asks or it stops"
        for p in group:
            value = loss(mix_of(p, manifest))
            opt.tell(p, told(value, opt))
            done.append((mix_of(p, manifest), value, p))
    return done


def shares(mix: dict[str, float], manifest: Manifest) -> np.ndarray:
    return np.array([mix.get(n, 0.0) for n in (manifest.base, *manifest.experts)])


@each
def test_recipes_are_canonical_mixes(algorithm: str, manifest: Manifest) -> None:
    """Every proposal is a canonical recipe whose shares sum to 1 (on SLERP's arc to more), numbered without gaps."""
    done = search(optimizer(algorithm, manifest, 7), manifest, lambda m: -m.get("b", 0.0))

    assert [p.id for _, _, p in done] == list(range(7, 7 + len(done)))
    for mix, _, p in done:
        assert p.genome is None
        assert p.recipe.canonical(manifest).id == p.recipe.id
        total = sum(mix.values())
        assert total == pytest.approx(1.0, abs=1e-5) if p.recipe.segments is None else 1.0 <= total <= 5**0.5


@each
def test_slicing_and_replay(algorithm: str, manifest: Manifest) -> None:
    """One by one or by rounds, again and again: the same recipes."""

    def loss(mix: dict[str, float]) -> float:
        return float(((shares(mix, manifest) - [0.0, 0.5, 0.2, 0.3, 0.0]) ** 2).sum())

    runs = [search(optimizer(algorithm, manifest), manifest, loss, slice_=n) for n in (100, 1, 3)]

    assert len({tuple(p.recipe.id for _, _, p in run) for run in runs}) == 1


@each
def test_strangers_nan_and_failures(algorithm: str, manifest: Manifest) -> None:
    """Strangers and NaN are refused; where everything fails the search ends by itself or goes on asking."""
    opt = optimizer(algorithm, manifest)
    [first] = opt.ask(1)
    with pytest.raises(ValueError, match="not waiting"):
        opt.tell(Proposal(99, 0, recipe=first.recipe), Result(np.array([1.0])))
    with pytest.raises(ValueError, match="NaN"):
        opt.tell(first, told(math.nan, opt))
    opt.tell(first, told(math.inf, opt))

    search(opt, manifest, lambda _: math.inf, budget=60)
    assert opt.recommend(2) == []


def test_greedy_soup_is_algorithm_1(manifest: Manifest) -> None:
    """Best first; d hurts and stays out; a tie comes in. Written out by hand."""
    value = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}

    def loss(mix: dict[str, float]) -> float:
        # A plain mean of a, b, c is as good as a; with d it is worse.
        return 0.0 if "d" not in mix and "a" in mix else 1.0 - max(value[n] for n in mix) + 0.5 * ("d" in mix)

    done = [mix for mix, _, _ in search(optimizer("greedy-soup", manifest), manifest, loss)]

    assert [set(m) for m in done[:4]] == [{"a"}, {"b"}, {"c"}, {"d"}]
    assert [set(m) for m in done[4:]] == [{"a", "b"}, {"a", "b", "c"}, {"a", "b", "c", "d"}]
    assert done[5] == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-5)


def test_frank_wolfe_reaches_the_optimum_of_a_bowl(manifest: Manifest) -> None:
    """A convex loss inside the simplex: within 400 scores closer than its last step."""
    target = np.array([0.1, 0.5, 0.0, 0.3, 0.1])

    done = search(
        optimizer("frank-wolfe", manifest), manifest, lambda m: float(((shares(m, manifest) - target) ** 2).sum())
    )

    best = min(done, key=lambda d: d[1])
    assert np.abs(shares(best[0], manifest) - target).max() < 0.03
    assert best[1] < min(loss for _, loss, _ in done[:5]) / 100


def own_tasks(p: Proposal, manifest: Manifest) -> Result:
    """Task j wants expert j's weight at 0.6 and all others' at 0, at a tenth of the price; a and c are easier."""
    w = shares(mix_of(p, manifest), manifest)[1:]
    ease = np.array([0.0, 1.0, 0.01, 1.01])
    return Result(ease + np.array([(w[j] - 0.6) ** 2 + 0.1 * (np.delete(w, j) ** 2).sum() for j in range(4)]))


def nested(manifest: Manifest) -> Optimizer:
    start = Start(frozen_genome([]), 4, manifest=manifest)
    options = make_options("nested-map", {"samples": 8})
    return make_optimizer("nested-map", (), start, np.random.default_rng(1), itertools.count(), options)


def test_nested_map_merges_pairs(manifest: Manifest) -> None:
    """Experts alone, then pairs by preference, then the pair of pairs: 4 + 3 x 9 candidates to the best of the sum.

    The sum of the tasks is least where every weight w has its least (w - 0.6)^2 + 0.3 w^2: at 0.6 / 1.3.
    """
    opt, done = nested(manifest), []
    while not opt.stop():
        for p in opt.ask(7):
            opt.tell(p, own_tasks(p, manifest))
            done.append(p)

    assert opt.stop() == {"merges": 3.0}
    assert len(done) == 4 + 3 * 9 == make_options("nested-map", {"samples": 8}).evaluations(4)
    used = [frozenset(set(mix_of(p, manifest)) - {"base"}) for p in done]
    assert used[:4] == [frozenset(e) for e in "abcd"]
    groups = [set(used[i : i + 9]) for i in (4, 13, 22)]
    assert groups[2] == {frozenset("abcd")}
    assert groups[0] | groups[1] in (
        {frozenset("ab"), frozenset("cd")},
        {frozenset("ac"), frozenset("bd")},
        {frozenset("ad"), frozenset("bc")},
    )
    assert shares(mix_of(done[-1], manifest), manifest)[1:] == pytest.approx(0.6 / 1.3, abs=0.02)


def test_nested_map_without_enough_scores(manifest: Manifest) -> None:
    """Where all merges fail the better of two models takes the pair's place, and an expert that fails is left out."""
    opt, done = nested(manifest), []
    while not opt.stop():
        for p in opt.ask(100):
            alone = len(set(mix_of(p, manifest)) - {"base"}) == 1
            fine = alone and "d" not in mix_of(p, manifest)
            opt.tell(p, own_tasks(p, manifest) if fine else Result(np.full(4, np.inf), "failed:nan"))
            done.append(p)

    assert opt.stop() == {"merges": 2.0}
    assert len(done) == 4 + 2 * 8
    assert not any("d" in mix_of(p, manifest) for p in done[4:])


def test_mixture_leaves_out_crumbs(manifest: Manifest) -> None:
    """Shares below what a recipe can write are left out, and a mix of the base alone is the base."""
    recipe = mixture({"a": 1.0 - 1e-9, "b": 1e-9}, manifest, "float32")

    assert set(recipe.sources) == {"base", "a"}
    assert not mixture({"base": 1.0}, manifest, "float32").blocks
