"""The genetic algorithm on routes: what each operator does to a path, and that whole searches find hidden paths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.prepare import baselines
from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search import make_optimizer, make_options
from evomerge.search.base import Start
from evomerge.search.route_ga import (
    Bounds,
    Path,
    Step,
    Steps,
    crossed,
    deleted,
    duplicated,
    inserted,
    moved,
    mutated,
    own_path,
    run_of,
    scaled,
    swapped,
)

LAYERS = {"base": 6, "a": 6, "deep": 9}


def rng_of(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


one_step = st.sampled_from([(n, i) for n, count in LAYERS.items() for i in range(count)]).map(lambda s: Step(*s))
some_steps = st.lists(one_step, min_size=1, max_size=14).map(tuple)
paths = st.builds(Path, st.sampled_from(list(LAYERS)), some_steps)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def bounded(draw: st.DrawFn) -> tuple[Bounds, list[Path]]:
    """Bounds, and two paths within them."""
    two = [draw(paths), draw(paths)]
    lengths = [len(p.steps) for p in two]
    least = draw(st.integers(1, min(lengths)))
    most = draw(st.integers(max(lengths), max(lengths) + 8))
    return Bounds(LAYERS, least, most, draw(st.sampled_from([0.0, 0.3]))), two


def valid(path: Path, bounds: Bounds) -> bool:
    return (
        bounds.least <= len(path.steps) <= bounds.most
        and path.ends in bounds.layers
        and all(0 <= s.layer < bounds.layers[s.source] and 1e-3 <= s.scale <= 1e3 for s in path.steps)
    )


# -- every operator ---------------------------------------------------------------------------------------------------


@given(bounded(), seeds)
def test_children_are_valid(case: tuple[Bounds, list[Path]], seed: int) -> None:
    """Mutations and crossovers, one after the other, stay within the bounds; equal generators give equal children."""
    bounds, (a, b) = case
    for path in (a, b, a):
        child = crossed(path, mutated(b, bounds, rng_of(seed)), bounds, rng_of(seed))
        assert valid(child, bounds)
        assert child == crossed(path, mutated(b, bounds, rng_of(seed)), bounds, rng_of(seed))
        assert valid(mutated(child, bounds, rng_of(seed)), bounds)


@given(bounded(), seeds)
def test_crossover_keeps_order(case: tuple[Bounds, list[Path]], seed: int) -> None:
    """A beginning of the first parent, a run of the second, an end of the first; the first's own ends."""
    bounds, (a, b) = case
    child = crossed(a, b, bounds, rng_of(seed))

    def spliced(first: int, last: int) -> bool:
        middle = child.steps[first : len(child.steps) - (len(a.steps) - last)]
        runs = {b.steps[i:j] for i in range(len(b.steps)) for j in range(i + 1, len(b.steps) + 1)}
        return child.steps == a.steps[:first] + middle + a.steps[last:] and middle in runs

    n = len(a.steps)
    assert child.ends == a.ends
    assert child == a or any(spliced(i, k) for i in range(1, n) for k in range(i + 1, n + 1))


def test_crossover_is_where_layers_are_alike() -> None:
    """Of two whole models of one depth: the child has every layer once, whichever cuts are drawn."""
    bounds = Bounds(LAYERS, 1, 12)
    a, b = (own_path(n, bounds, rng_of(0)) for n in ("base", "a"))
    children = {crossed(a, b, bounds, rng_of(seed)) for seed in range(100)}

    assert all([s.layer for s in c.steps] == list(range(6)) for c in children)
    once = sum("base" in {c.steps[-1].source} for c in children)
    assert len(children) == 5 + 10  # cuts behind hops 1 to 5, and pairs of them
    assert once == 10


@given(some_steps, seeds)
def test_insertion(steps: Steps, seed: int) -> None:
    """One hop more; without it the path is what it was."""
    child = inserted(steps, LAYERS, rng_of(seed))

    assert any(child[:i] + child[i + 1 :] == steps for i in range(len(child)))


def test_insertion_is_near_its_place() -> None:
    """Into a whole model, layers are mostly within two of the one whose place they take, of all sources alike."""
    steps = tuple(Step("deep", i) for i in range(9))
    near, sources = [], []
    for seed in range(300):
        child = inserted(steps, LAYERS, rng_of(seed))
        at = next(i for i in range(10) if child[:i] + child[i + 1 :] == steps and (i == 9 or child[i] != steps[i]))
        near.append(abs(child[at].layer - min(at, LAYERS[child[at].source] - 1)) <= 2)
        sources.append(child[at].source)

    assert np.mean(near) > 0.8
    assert all(70 < sources.count(n) < 130 for n in LAYERS)


@given(some_steps, st.integers(1, 13), seeds)
def test_deletion(steps: Steps, least: int, seed: int) -> None:
    """A run is gone, half a path at most."""
    if len(steps) <= least:
        return
    child = deleted(steps, least, rng_of(seed))
    lost = len(steps) - len(child)

    assert max(least, len(steps) // 2) <= len(child) < len(steps)
    assert any(steps[:i] + steps[i + lost :] == child for i in range(len(steps)))


@given(some_steps, st.integers(1, 20), seeds)
def test_duplication(steps: Steps, room: int, seed: int) -> None:
    """A run stands there twice in a row."""
    child = duplicated(steps, len(steps) + room, rng_of(seed))
    more = len(child) - len(steps)

    assert 0 < more <= room
    assert any(
        child == steps[: i + more] + steps[i:] and child[i : i + more] == child[i + more : i + 2 * more]
        for i in range(len(steps))
    )


@given(seeds, st.integers(2, 12))
def test_moving(seed: int, n: int) -> None:
    """The same hops, of which a run stands elsewhere."""
    steps = tuple(Step("base", i % 6, 1.0 + i) for i in range(n))
    child = moved(steps, rng_of(seed))

    assert child != steps
    assert sorted(child) == sorted(steps)
    breaks = sum(b.scale - a.scale != 1.0 for a, b in itertools.pairwise(child))
    assert breaks <= 3


@given(some_steps, seeds)
def test_swapping(steps: Steps, seed: int) -> None:
    """The same layers; where the source is another one, it is the same one throughout a run."""
    child = swapped(steps, LAYERS, rng_of(seed))

    assert [s.layer for s in child] == [s.layer for s in steps]
    changed = [new.source for old, new in zip(steps, child, strict=True) if new != old]
    assert len(set(changed)) == 1 or (not changed and all(s == Step("deep", s.layer) for s in steps if s.layer > 5))
    assert all(s.layer < LAYERS[s.source] for s in child)


@given(some_steps, seeds)
def test_scaling(steps: Steps, seed: int) -> None:
    """One hop's scale, as digits of a recipe."""
    child = scaled(steps, 0.2, rng_of(seed))
    [at] = [i for i, (old, new) in enumerate(zip(steps, child, strict=True)) if new != old]

    assert child[at].scale == round(child[at].scale, 6) != 1.0
    assert child[at]._replace(scale=1.0) == steps[at]


def test_scales_are_log_normal() -> None:
    """The logarithms of many have the standard deviation that is set, and mean 0."""
    logs = [math.log(scaled((Step("base", 0),), 0.2, rng_of(s))[0].scale) for s in range(1000)]

    assert np.mean(logs) == pytest.approx(0.0, abs=0.03)
    assert np.std(logs) == pytest.approx(0.2, abs=0.02)


@given(st.integers(1, 40), st.data(), seeds)
def test_runs(n: int, data: st.DataObject, seed: int) -> None:
    """A run lies within the path and is no longer than allowed."""
    most = data.draw(st.integers(1, n))
    start, stop = run_of(n, most, rng_of(seed))

    assert 0 <= start < stop <= n
    assert stop - start <= most


def test_every_mutation_happens() -> None:
    """Of one path: longer, shorter, reordered, through other models, scaled where that is set, with other ends."""
    bounds = Bounds(LAYERS, 1, 12, 0.1)
    path = own_path("base", bounds, rng_of(0))

    def kinds(bounds: Bounds) -> list[str]:
        out = []
        for seed in range(400):
            child = mutated(path, bounds, rng_of(seed))
            if child.ends != path.ends:
                out.append("ends")
            elif len(child.steps) != 6:
                out.append("longer" if len(child.steps) > 6 else "shorter")
            elif {s.scale for s in child.steps} != {1.0}:
                out.append("scale")
            else:
                out.append("move" if sorted(child.steps) == sorted(path.steps) else "swap")
        return out

    found = kinds(bounds)
    assert {*found} == {"ends", "longer", "shorter", "scale", "move", "swap"}
    assert 1.4 < found.count("longer") / found.count("shorter") < 3.0  # inserted or duplicated
    assert found.count("ends") < found.count("scale")
    assert {*kinds(replace(bounds, sigma=0.0))} == {*found} - {"scale"}
    assert {*kinds(replace(bounds, most=6, least=6))} == {*found} - {"longer", "shorter"}
    assert {*kinds(replace(bounds, layers={"base": 6}))} == {*found} - {"ends", "swap"}
    alone = Path("base", (Step("base", 0),))
    assert mutated(alone, Bounds({"base": 1}, 1, 1), rng_of(0)) == alone


@given(seeds)
def test_own_paths_are_fitted(seed: int) -> None:
    """A model's layers in order; some are left out, or stand there twice, where bounds say so."""
    whole = [own_path(n, Bounds(LAYERS, 1, 20), rng_of(seed)) for n in LAYERS]
    short = own_path("deep", Bounds(LAYERS, 1, 4), rng_of(seed))
    long = own_path("base", Bounds(LAYERS, 15, 16), rng_of(seed))

    assert [[s.layer for s in p.steps] for p in whole] == [list(range(n)) for n in LAYERS.values()]
    assert [s.layer for s in short.steps] == sorted({s.layer for s in short.steps})
    assert len(short.steps) == 4
    assert len(long.steps) == 15
    assert {s.layer for s in long.steps} == set(range(6))


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(manifest_of: Callable[..., Manifest]) -> Manifest:
    """Base and two experts of four layers, and a model of six."""
    m, deep = manifest_of(4), manifest_of(6)
    return replace(
        m,
        layers={**m.layers, "deep": 6},
        hashes={**m.hashes, "deep": "d" * 64},
        layouts={"deep": deep.tensors},
    )


def optimizer(manifest: Manifest, seed: int = 1, **given: Any) -> Any:
    start = Start(frozen_genome([]), manifest=manifest)
    options = make_options("route-ga", {"population": 10, **given})
    return make_optimizer("route-ga", (), start, rng_of(seed), itertools.count(), options)


def steps_of(p: Proposal, manifest: Manifest) -> list[tuple[str, int]]:
    """What tokens go through, of routes and of merges whose layers are of one source each."""
    assert p.recipe is not None
    if p.recipe.route is not None:
        return [(h.from_, h.layer) for h in p.recipe.route.hops]
    rules = p.recipe.blocks
    names = [f"layers.{i}.mlp" for i in range(manifest.layers[manifest.base])]
    return [(next(iter(rules[n].sources)) if n in rules else "base", i) for i, n in enumerate(names)]


def test_first_individuals(pool: Manifest) -> None:
    """The models' own paths first, which are the recipes of the baselines, then mutations of each."""
    group = optimizer(pool).ask(100)
    plain = baselines(pool, "float32")

    assert [group[i].recipe.id for i in (0, 1, 3)] == [plain[n].id for n in ("base", "code", "math")]
    assert steps_of(group[2], pool) == [("deep", i) for i in range(6)]
    assert [p.parents for p in group] == [(), (), (), (), *((i % 4,) for i in range(4, 10))]
    assert len({p.recipe.id for p in group}) == 10
    few = optimizer(pool, population=2, elite=1).ask(100)
    assert [p.recipe.route is None for p in few] == [True, True, False, True]


def test_ends_go_with_the_path(pool: Manifest) -> None:
    """Embedding, final norm and head are of one model, at first the path's own; tied models agree on both."""
    for p in optimizer(pool).ask(100)[:4]:
        ends = {e: next(iter(r.sources)) for e, r in p.recipe.blocks.items() if not e.startswith("layers.")}
        source = steps_of(p, pool)[0][0]
        assert ends == ({} if source == "base" else dict.fromkeys(("embed", "final_norm", "head"), source))


def test_tied_models(manifest_of: Callable[..., Manifest]) -> None:
    """A head that is the embedding is no block of its own, and 200 candidates say nothing else."""
    tied = manifest_of(4, tied=True)
    for p in searched(optimizer(tied), tied, lambda _: 0.0, 200):
        assert "head" not in p.recipe.blocks
        assert p.recipe.canonical(tied).id == p.recipe.id


def test_children_stay_within_bounds(pool: Manifest) -> None:
    """Paths are as long as the settings allow, by default to twice the deepest model; scales appear where set."""
    for given_, least, most in (
        ({}, 1, 12),
        ({"min_hops": 14}, 14, 14),
        ({"min_hops": 3, "max_hops": 5, "scales": True}, 3, 5),
    ):
        done = searched(optimizer(pool, **given_), pool, lambda s: -float(len(s)), 300)
        lengths = {len(steps_of(p, pool)) for p in done}
        scales = {h.scale for p in done if p.recipe.route is not None for h in p.recipe.route.hops}

        assert least <= min(lengths) <= max(lengths) == most
        assert (scales != {1.0}) == ("scales" in given_)


def test_models_are_proposed_once(pool: Manifest) -> None:
    """Of 300 candidates none is another one's model, where there are many left to try."""
    done = searched(optimizer(pool), pool, lambda s: distance(s, TARGET), 300)

    assert len({p.recipe.id for p in done}) == 300


def test_a_small_space_is_gone_over_again(manifest_of: Callable[..., Manifest]) -> None:
    """Where nothing new is left the search still asks."""
    m = manifest_of(1, experts=("a",))
    done = searched(optimizer(m, max_hops=1), m, lambda s: 0.0, 60)

    assert len(done) == 60
    assert len({p.recipe.id for p in done}) == 4  # two layers, two kinds of ends


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"min_hops": 0}, "min_hops: `1 <= min_hops <= 1000` must hold, but got 0"),
        ({"min_hops": 5, "max_hops": 4}, "max_hops: `min_hops <= max_hops <= 1000` must hold, but got 4"),
        ({"crossover": 1.5}, "crossover: `0 <= crossover <= 1`"),
        ({"mutations": 0}, "mutations: at least 1"),
        ({"sigma": 0.0}, "sigma: `0 < sigma <= 3`"),
        ({"scales": 1}, "scales should be true or false"),
        ({"elite": 10}, "elite: `0 <= elite < population`"),
        ({"tournament": 0}, "tournament: at least 1"),
        ({"population": 1}, "population: at least 2"),
    ],
)
def test_wrong_settings(pool: Manifest, given_: dict[str, Any], words: str) -> None:
    """Refused in one line."""
    with pytest.raises(UserError) as caught:
        optimizer(pool, **given_)

    assert words in str(caught.value)


# -- whole searches ---------------------------------------------------------------------------------------------------

Loss = Callable[[list[tuple[str, int]]], float]
TARGET = [("base", 0), ("base", 1), ("math", 1), ("math", 2), ("deep", 3), ("deep", 4), ("base", 2), ("base", 3)]


def distance(steps: list[tuple[str, int]], target: list[tuple[str, int]]) -> float:
    """Hops to insert, delete or replace until one path is the other (Levenshtein)."""
    row = list(range(len(target) + 1))
    for i, s in enumerate(steps, 1):
        last, row[0] = row[0], i
        for j, t in enumerate(target, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (s != t))
    return float(row[-1])


def searched(opt: Any, manifest: Manifest, loss: Loss, budget: int) -> list[Proposal]:
    done: list[Proposal] = []
    while len(done) < budget:
        group = opt.ask(budget - len(done))
        for p in group:
            opt.tell(p, Result(np.array([loss(steps_of(p, manifest))])))
        done += group
    return done


def random_best(layers: Mapping[str, int], loss: Loss, budget: int, seed: int) -> float:
    """Of paths of random lengths, each hop of the next layer or the same or the one after it, of any model."""
    rng, best = rng_of(seed), math.inf
    for _ in range(budget):
        at, steps = 0, []
        for _ in range(int(rng.integers(1, 13))):
            source = sorted(layers)[int(rng.integers(len(layers)))]
            steps.append((source, min(at, layers[source] - 1)))
            at = max(0, at + int(rng.integers(-1, 3)))
        best = min(best, loss(steps))
    return best


def test_a_hidden_path_is_found(pool: Manifest) -> None:
    """With 400 candidates closer than random paths are with as many, and than any model's own, for each of four seeds;
    by one hop and more in the mean."""

    def loss(steps: list[tuple[str, int]]) -> float:
        return distance(steps, TARGET)

    found, drawn = [], []
    own = min(loss([(n, i) for i in range(count)]) for n, count in pool.layers.items())
    for seed in range(4):
        done = searched(optimizer(pool, seed, population=20), pool, loss, 400)
        found.append(min(loss(steps_of(p, pool)) for p in done))
        drawn.append(random_best(pool.layers, loss, 400, seed))

        assert found[-1] < min(drawn[-1], own)
    assert np.mean(found) <= np.mean(drawn) - 1.0


def test_replayed_results_give_the_same_search(pool: Manifest) -> None:
    """Recorded losses, failures among them, told to a fresh search: the same proposals, however they are sliced."""

    def loss(steps: list[tuple[str, int]]) -> float:
        return math.inf if len(steps) % 3 == 0 else distance(steps, TARGET)

    recorded = searched(optimizer(pool, scales=True), pool, loss, 120)
    again = optimizer(pool, scales=True)
    for p in recorded:
        [q] = again.ask(1)
        assert (q.id, q.group, q.parents, q.recipe.id) == (p.id, p.group, p.parents, p.recipe.id)
        again.tell(q, Result(np.array([loss(steps_of(q, pool))])))


def test_without_any_result(pool: Manifest) -> None:
    """Where everything fails, own paths are mutated again."""
    done = searched(optimizer(pool), pool, lambda _: math.inf, 60)

    assert all(p.parents in [(0,), (1,), (2,), (3,)] for p in done[4:])
    assert len({p.recipe.id for p in done}) == 60
